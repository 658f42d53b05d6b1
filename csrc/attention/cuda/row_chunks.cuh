// Rows of 16-bit numbers, read and written in chunks of 16 bytes, one chunk a lane.
#pragma once

#include "attention/cuda/addresses.cuh"
#include "attention/cuda/numbers.cuh"

namespace zerotuning::attention::device {

constexpr int chunk_size = 8;  // numbers in 16 bytes

struct Chunk {
  float x[chunk_size];
};

template <typename T>
__device__ __forceinline__ Chunk unpack_chunk(const uint4& bytes) {
  const T* numbers = reinterpret_cast<const T*>(&bytes);
  Chunk chunk;
#pragma unroll
  for (int i = 0; i < chunk_size; ++i) chunk.x[i] = widened(numbers[i]);
  return chunk;
}

template <typename T>
__device__ __forceinline__ uint4 pack_chunk(const Chunk& chunk) {
  uint4 bytes;
  T* numbers = reinterpret_cast<T*>(&bytes);
#pragma unroll
  for (int i = 0; i < chunk_size; ++i) numbers[i] = narrowed<T>(chunk.x[i]);
  return bytes;
}

// The lane's chunk of a row of `columns` numbers; zeros beyond the row's end.
template <typename T>
__device__ __forceinline__ uint4 read_chunk(const Strided4<const void>& array, int sample, int head,
                                            int row, int lane, int columns) {
  if (lane * chunk_size >= columns) return uint4{0, 0, 0, 0};
  return *reinterpret_cast<const uint4*>(row_of<T>(array, sample, head, row) + lane * chunk_size);
}
template <typename T>
__device__ __forceinline__ void write_chunk(const Strided4<void>& array, int sample, int head,
                                            int row, int lane, int columns, const Chunk& chunk) {
  if (lane * chunk_size >= columns) return;
  *reinterpret_cast<uint4*>(written_row_of<T>(array, sample, head, row) + lane * chunk_size) =
      pack_chunk<T>(chunk);
}

__device__ __forceinline__ Chunk difference(const Chunk& a, const Chunk& b) {
  Chunk result;
#pragma unroll
  for (int i = 0; i < chunk_size; ++i) result.x[i] = a.x[i] - b.x[i];
  return result;
}

__device__ __forceinline__ float dot(const Chunk& a, const Chunk& b) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < chunk_size; ++i) sum += a.x[i] * b.x[i];
  return sum;
}

}  // namespace zerotuning::attention::device
