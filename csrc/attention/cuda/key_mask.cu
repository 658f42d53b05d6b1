// What is found in a key mask once for all kernels that read it.
#include "attention/cuda_key_mask.h"

namespace zerotuning::attention {
namespace {

constexpr int threads = 256;

__global__ void __launch_bounds__(threads)
    find_runs(const bool* key_mask, int64_t batch_stride, int keys, int32_t* first_key,
              int32_t* end_key, int32_t* past_key) {
  const bool* mask = key_mask + blockIdx.x * batch_stride;
  __shared__ int first, end, past;
  if (threadIdx.x == 0) {
    first = end = keys;
    past = 0;
  }
  __syncthreads();
  for (int key = threadIdx.x; key < keys; key += threads) {
    const bool real = mask[key];
    // Few keys begin or end a run.
    if (real && (key == 0 || !mask[key - 1])) atomicMin(&first, key);
    if (real && (key == keys - 1 || !mask[key + 1])) atomicMax(&past, key + 1);
  }
  __syncthreads();
  for (int key = first + 1 + threadIdx.x; key < keys; key += threads) {
    if (!mask[key]) {
      atomicMin(&end, key);
      break;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    first_key[blockIdx.x] = first;
    end_key[blockIdx.x] = end;
    past_key[blockIdx.x] = past;
  }
}

__global__ void __launch_bounds__(threads)
    pack_step(const bool* key_mask, int64_t batch_stride, int length, const StepWords step,
              int64_t* words) {
  const bool* mask = key_mask + blockIdx.x * batch_stride;
  words += blockIdx.x * (step.header + step.key_words);
  __shared__ int first;
  if (threadIdx.x == 0) first = length;
  __syncthreads();
  bool found = false;
  for (int64_t word = threadIdx.x; word < step.key_words; word += threads) {
    uint64_t bytes = 0;
#pragma unroll
    for (int i = 0; i < StepWords::word_keys; ++i) {
      const int64_t key = word * StepWords::word_keys + i;
      if (key >= length || !mask[key]) continue;
      bytes |= uint64_t{1} << 8 * i;
      if (!found) atomicMin(&first, static_cast<int>(key));
      found = true;
    }
    words[step.header + word] = static_cast<int64_t>(bytes);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const int initial = first < length ? first : 0;
    words[0] = step.query_start;
    words[step.header - 2] = initial;
    words[step.header - 1] = initial + 1;
  }
}

}  // namespace

cudaError_t find_real_keys(const bool* key_mask, int64_t batch_stride, int32_t batch, int32_t keys,
                           int32_t* first_key, int32_t* end_key, int32_t* past_key,
                           cudaStream_t stream) {
  find_runs<<<batch, threads, 0, stream>>>(key_mask, batch_stride, keys, first_key, end_key,
                                           past_key);
  return cudaGetLastError();
}

cudaError_t pack_step_words(const bool* key_mask, int64_t batch_stride, int32_t batch,
                            int32_t length, const StepWords& step, int64_t* words,
                            cudaStream_t stream) {
  pack_step<<<batch, threads, 0, stream>>>(key_mask, batch_stride, length, step, words);
  return cudaGetLastError();
}

}  // namespace zerotuning::attention
