// Tiles of the plain kernels: sizes, loads and loops that forward and backward share.
//
// The plain kernels are flash attention without tensor cores, for any dtype, head size up to 256
// and geometry. Tiles lie in shared memory in the accumulator's type.
#pragma once

#include <algorithm>
#include <type_traits>

#include "attention/cuda/addresses.cuh"
#include "attention/cuda/numbers.cuh"
#include "attention/cuda/visibility.cuh"

namespace zerotuning::attention::plain {

using namespace device;

constexpr int threads = 256;

// Tile sizes by the accumulator and the largest head size; all tiles of a kernel fit in 100 KB.
template <typename C, int size>
struct Tiles {
  static constexpr int rows = (size > 128 ? 16 : 32) / (sizeof(C) / 4);
  static constexpr int columns = rows;
  static constexpr int stride = size + 1;  // rows in different banks
  static constexpr int row_threads = threads / rows;
  static constexpr int values = size / row_threads;  // of a row, in one thread
};

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }

// Loads rows [first, first + rows) of one head into shared memory; zeros beyond the end of the rows
// and of the columns.
template <typename T, typename C, int size, int rows>
__device__ void load(C* tile, const Strided4<const void>& array, int sample, int head, int first,
                     int end, int columns) {
  using Tile = Tiles<C, size>;
  for (int i = threadIdx.x; i < rows * size; i += threads) {
    const int row = i / size, column = i % size;
    C x = 0;
    if (first + row < end && column < columns)
      x = widened(row_of<T>(array, sample, head, first + row)[column]);
    tile[row * Tile::stride + column] = x;
  }
}

template <typename C, int size>
__device__ __forceinline__ C dot(const C* a, const C* b) {
  C sum = 0;
#pragma unroll 8
  for (int i = 0; i < size; ++i) sum += a[i] * b[i];
  return sum;
}

// The keys that queries [row, end) of the sample may attend to under causal mask and window.
__device__ __forceinline__ void key_range(const Visibility& v, int row, int end, int* begin,
                                          int* last) {
  *begin = v.window ? max(0, v.start + row - v.window + 1) : 0;
  *last = min(v.keys, v.start + end);
}

inline int tile_count(int rows, int tile) { return (rows + tile - 1) / tile; }

// Calls launch with the element type and the smallest of 64, 128, 256 that holds the head sizes.
template <typename T, typename Launch>
cudaError_t with_size(const CudaAttention& call, const Launch& launch) {
  const int size = std::max(call.head_size, call.value_head_size);
  if (size <= 64) return launch(T{}, std::integral_constant<int, 64>());
  if (size <= 128) return launch(T{}, std::integral_constant<int, 128>());
  if (size <= 256) return launch(T{}, std::integral_constant<int, 256>());
  return cudaErrorNotSupported;
}
template <typename Launch>
cudaError_t with_type(const CudaAttention& call, const Launch& launch) {
  switch (call.dtype) {
    case DType::float64:
      return with_size<double>(call, launch);
    case DType::float32:
      return with_size<float>(call, launch);
    case DType::bfloat16:
      return with_size<__nv_bfloat16>(call, launch);
    default:
      return with_size<__half>(call, launch);
  }
}

}  // namespace zerotuning::attention::plain
