// Key masks on the device: their first and last real keys, found once for all kernels that read a
// mask, and the encoding of a decode step's mask.
#include "attention/cuda_key_mask.h"
#include "attention/key_mask_layout.h"

namespace zerotuning::attention {
namespace {

constexpr int threads = 256;

// A block for each sample.
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
    const bool is_real = mask[key];
    // Only keys that begin or end a run of real keys need an atomic operation.
    if (is_real && (key == 0 || !mask[key - 1])) atomicMin(&first, key);
    if (is_real && (key == keys - 1 || !mask[key + 1])) atomicMax(&past, key + 1);
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

// A block for each sample, a thread for each word.
__global__ void __launch_bounds__(threads)
    write_encoding(const bool* key_mask, int64_t batch_stride, int length, int64_t words,
                   int64_t query_start, int64_t* encoded) {
  using Layout = KeyMaskLayout;
  const bool* mask = key_mask + blockIdx.x * batch_stride;
  encoded += blockIdx.x * (Layout::header + words);
  __shared__ int first;
  if (threadIdx.x == 0) first = length;
  __syncthreads();
  bool has_real_key = false;
  for (int64_t word = threadIdx.x; word < words; word += threads) {
    uint64_t bytes = 0;
#pragma unroll
    for (int i = 0; i < Layout::keys_per_word; ++i) {
      const int64_t key = word * Layout::keys_per_word + i;
      if (key >= length || !mask[key]) continue;
      bytes |= uint64_t{1} << 8 * i;
      if (!has_real_key) atomicMin(&first, static_cast<int>(key));
      has_real_key = true;
    }
    encoded[Layout::header + word] = static_cast<int64_t>(bytes);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const int initial = first < length ? first : 0;
    encoded[Layout::query_start] = query_start;
    encoded[Layout::first_scaled_key] = initial;
    encoded[Layout::end_of_scaled_keys] = initial + 1;
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

cudaError_t encode_key_mask(const bool* key_mask, int64_t batch_stride, int32_t batch,
                            int32_t length, int32_t keys, int64_t query_start, int64_t* encoded,
                            cudaStream_t stream) {
  write_encoding<<<batch, threads, 0, stream>>>(key_mask, batch_stride, length,
                                                KeyMaskLayout::words(keys), query_start, encoded);
  return cudaGetLastError();
}

}  // namespace zerotuning::attention
