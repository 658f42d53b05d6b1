// Numbers in registers: conversions, exponentials, and reductions over lanes of a warp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

namespace zerotuning::attention::device {

constexpr float log2_e = 1.44269504f, ln_2 = 0.693147181f;

// The type in which products of numbers of type T are summed.
template <typename T>
using AccumulatorOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ double widened(double x) { return x; }
__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ float widened(__half x) { return __half2float(x); }
__device__ __forceinline__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T narrowed(AccumulatorOf<T> x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// Two numbers as one register of a tensor core's operand, `low` in its lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

// 2^x, subnormal results flushed to 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The offset of a softmax's exponents, exp(logit - offset): the largest logit. A row without a
// visible key has row_max -inf and offset 0, since exp(-inf + inf) would be NaN.
template <typename C>
__device__ __forceinline__ C softmax_offset(C row_max) {
  return row_max == -INFINITY ? C{0} : row_max;
}

// Reductions over `lanes` neighbouring lanes. Each of these lanes receives the result.
template <int lanes, typename C>
__device__ __forceinline__ C lane_sum(C x) {
#pragma unroll
  for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}
template <int lanes, typename C>
__device__ __forceinline__ C lane_max(C x) {
#pragma unroll
  for (int step = lanes / 2; step > 0; step /= 2) x = max(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

// Over the four neighbouring lanes that hold a row of a tensor core's result.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

}  // namespace zerotuning::attention::device
