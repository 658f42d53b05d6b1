// Rows of 16-bit numbers, read and written 16 bytes a thread.
#pragma once

#include "attention/cuda/device.cuh"

namespace zerotuning::attention::device {

constexpr int chunk = 8;  // numbers in 16 bytes

struct Chunk {
  float x[chunk];
};

template <typename T>
__device__ __forceinline__ Chunk unpack(const uint4& bytes) {
  const T* numbers = reinterpret_cast<const T*>(&bytes);
  Chunk c;
#pragma unroll
  for (int i = 0; i < chunk; ++i) c.x[i] = widened(numbers[i]);
  return c;
}

template <typename T>
__device__ __forceinline__ uint4 packed(const Chunk& c) {
  uint4 bytes;
  T* numbers = reinterpret_cast<T*>(&bytes);
#pragma unroll
  for (int i = 0; i < chunk; ++i) numbers[i] = narrowed<T>(c.x[i]);
  return bytes;
}

// The lane's 16 bytes of a row; zeros beyond its end.
template <typename T>
__device__ __forceinline__ uint4 read(const Strided4<const void>& a, int sample, int head, int row,
                                      int lane, int columns) {
  if (lane * chunk >= columns) return uint4{0, 0, 0, 0};
  return *reinterpret_cast<const uint4*>(row_of<T>(a, sample, head, row) + lane * chunk);
}
template <typename T>
__device__ __forceinline__ void write(const Strided4<void>& a, int sample, int head, int row,
                                      int lane, int columns, const Chunk& c) {
  if (lane * chunk >= columns) return;
  *reinterpret_cast<uint4*>(written_row_of<T>(a, sample, head, row) + lane * chunk) = packed<T>(c);
}

__device__ __forceinline__ Chunk difference(const Chunk& a, const Chunk& b) {
  Chunk c;
#pragma unroll
  for (int i = 0; i < chunk; ++i) c.x[i] = a.x[i] - b.x[i];
  return c;
}

__device__ __forceinline__ float dot(const Chunk& a, const Chunk& b) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < chunk; ++i) sum += a.x[i] * b.x[i];
  return sum;
}

template <int lanes>
__device__ __forceinline__ float lane_sum(float x) {
#pragma unroll
  for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

}  // namespace zerotuning::attention::device
