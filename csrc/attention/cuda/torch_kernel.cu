// Inputs for torch's own kernels: the bias that excludes keys, and a logsumexp without -inf.
#include <cmath>

#include "attention/cuda_initial_token.h"

namespace zerotuning::attention {
namespace {

constexpr int threads = 256;

__global__ void write_exclusion_bias(const CudaGeometry geometry, bool float16, int keys,
                                     uint16_t* bias) {
  const int key = blockIdx.x * threads + threadIdx.x, sample = blockIdx.y;
  if (key >= keys) return;
  const bool is_real =
      !geometry.key_mask || geometry.key_mask[sample * geometry.key_mask_batch_stride + key];
  const int initial = geometry.first_key ? geometry.first_key[sample] : 0;
  const uint16_t minus_infinity = float16 ? 0xfc00 : 0xff80;
  bias[static_cast<int64_t>(sample) * keys + key] = is_real && key != initial ? 0 : minus_infinity;
}

__global__ void replace_minus_infinity(float* values, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (i < count && values[i] == -INFINITY) values[i] = INFINITY;
}

}  // namespace

cudaError_t exclusion_bias(const CudaAttention& c, void* bias, cudaStream_t stream) {
  const dim3 blocks((c.keys + threads - 1) / threads, c.batch);
  write_exclusion_bias<<<blocks, threads, 0, stream>>>(c.geometry, c.dtype == DType::float16,
                                                       c.keys, static_cast<uint16_t*>(bias));
  return cudaGetLastError();
}

cudaError_t negate_minus_infinity(float* values, int64_t count, cudaStream_t stream) {
  replace_minus_infinity<<<static_cast<unsigned>((count + threads - 1) / threads), threads, 0,
                           stream>>>(values, count);
  return cudaGetLastError();
}

}  // namespace zerotuning::attention
