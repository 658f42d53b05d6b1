// What the CUDA kernels share: number conversions, and what a sample's geometry says.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <type_traits>

#include "attention/cuda_kernels.h"

namespace zerotuning::attention::device {

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

__device__ __forceinline__ int clamped(int64_t x, int low, int high) {
  return static_cast<int>(x < low ? low : x > high ? high : x);
}

// One sample's geometry.
struct Sight {
  const bool* key_mask;  // or null
  int start;             // position of query row 0
  int window, span_begin, span_end, keys;

  __device__ __forceinline__ bool visible(int key, int position) const {
    return key < keys && key <= position && (!window || key > position - window) &&
           (!key_mask || key_mask[key]);
  }
  __device__ __forceinline__ bool scaled(int key) const {
    return key >= span_begin && key < span_end;
  }
};

__device__ __forceinline__ Sight sight_of(const CudaAttention& c, int sample) {
  const CudaGeometry& g = c.geometry;
  Sight s;
  s.key_mask = g.key_mask ? g.key_mask + sample * g.key_mask_batch_stride : nullptr;
  const int latest = c.keys > c.queries ? c.keys - c.queries : 0;
  s.start = g.query_start ? clamped(g.query_start[sample * g.query_start_stride], 0, latest)
                          : c.keys - c.queries;
  s.window = g.window;
  s.keys = c.keys;
  if (g.span) {
    const int64_t* span = g.span + sample * g.span_batch_stride;
    s.span_begin = clamped(span[0], 0, c.keys);
    s.span_end = clamped(span[g.span_stride], s.span_begin, c.keys);
  } else {
    s.span_begin = g.first_key ? clamped(g.first_key[sample], 0, c.keys) : 0;
    s.span_end = min(s.span_begin + 1, c.keys);
  }
  return s;
}

__device__ __forceinline__ int64_t offset(const Array4& a, int64_t sample, int64_t head,
                                          int64_t row) {
  return sample * a.batch_stride + head * a.head_stride + row * a.row_stride;
}
template <typename T>
__device__ __forceinline__ const T* row_of(const Array4& a, int64_t sample, int64_t head,
                                           int64_t row) {
  return static_cast<const T*>(a.data) + offset(a, sample, head, row);
}
template <typename T>
__device__ __forceinline__ T* written_row_of(const Array4& a, int64_t sample, int64_t head,
                                             int64_t row) {
  return static_cast<T*>(const_cast<void*>(a.data)) + offset(a, sample, head, row);
}

}  // namespace zerotuning::attention::device
