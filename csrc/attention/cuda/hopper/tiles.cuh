// Tiles in shared memory and their products, for the forward and backward kernels.
//
// A tile lies in shared memory as [64-column block][row][128 bytes], swizzled by 128 bytes. Of a
// 64-row result, the warpgroup's warp w holds rows 16 w to 16 w + 15. Of the warp's rows, a thread
// holds rows lane / 4 and lane / 4 + 8, columns 8 i + 2 (lane % 4) + {0, 1}, at
// [4 i + 2 (row half) + column].
#pragma once

#include "attention/cuda/hopper/ptx.cuh"
#include "attention/cuda/hopper/tensor_maps.cuh"

namespace zerotuning::attention::hopper {

using device::pack;

constexpr int warpgroup = 128;  // threads

// The position in a ring of `stages` tiles: the number of tiles that have gone through the ring.
template <int stages>
struct PipelineState {
  uint32_t count = 0;
  __device__ int stage() const { return count % stages; }
  // A consumer waits for this parity of the stage's full barrier, a producer for the opposite
  // parity of its empty barrier.
  __device__ uint32_t parity() const { return count / stages & 1; }
};

// One arrival for the whole warp.
__device__ __forceinline__ void arrive_warp(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) arrive(barrier);
}

// Whether all existing keys of [first, first + count) are real.
template <int count>
__device__ __forceinline__ bool all_real(const bool* key_mask, int first, int keys) {
  bool real = true;
#pragma unroll
  for (int j = 0; j < count / 32; ++j) {
    const int key = first + j * 32 + static_cast<int>(threadIdx.x % 32);
    real = real && (key >= keys || key_mask[key]);
  }
  return __all_sync(~0u, real);
}

// The column and the row (within the warpgroup's 64) of the number that a thread holds at [i].
__device__ __forceinline__ int column_at(int i) {
  return i / 4 * 8 + static_cast<int>(threadIdx.x % 4) * 2 + (i & 1);
}
__device__ __forceinline__ int row_at(int i) {
  const int thread = threadIdx.x % warpgroup;
  return thread / 32 * 16 + thread % 32 / 4 + (i & 2) * 4;
}

// A result rounded to 16 bits, as the left operand of further products.
template <typename T, int count>
__device__ __forceinline__ void to_left_operand(const float (&result)[count],
                                                uint32_t (&operand)[count / 8][4]) {
#pragma unroll
  for (int i = 0; i < count; i += 2) operand[i / 8][i % 8 / 2] = pack<T>(result[i], result[i + 1]);
}

// Starts result = left right^T: 64 rows of a tile of left_rows, all rows of a tile of right_rows.
template <typename T, int columns, int left_rows, int right_rows>
__device__ __forceinline__ void start_product_with_transpose(float (&result)[right_rows / 2],
                                                             const uint16_t* left,
                                                             const uint16_t* right) {
  const uint64_t left_matrix = matrix_descriptor(left, 16, 8 * 128);
  const uint64_t right_matrix = matrix_descriptor(right, 16, 8 * 128);
  begin_products();
#pragma unroll
  for (int k = 0; k < columns; k += 16) {
    const int block = k / block_columns, column = k % block_columns;
    multiply<T>(result, advanced(left_matrix, block * left_rows * 128 + column * 2),
                advanced(right_matrix, block * right_rows * 128 + column * 2), k > 0);
  }
  commit_products();
}

// Starts sums += left tile.
template <typename T, int columns, int rows>
__device__ __forceinline__ void start_multiply_add(float (&sums)[columns / 2],
                                                   const uint32_t (&left)[rows / 16][4],
                                                   const uint16_t* tile) {
  const uint64_t right = matrix_descriptor(tile, rows * 128, 8 * 128);
  begin_products();
#pragma unroll
  for (int k = 0; k < rows; k += 16) multiply_add<T>(sums, left[k / 16], advanced(right, k * 128));
  commit_products();
}

// Writes a result to rows [first, first + 64) of a tile, each thread's two rows times their factor.
template <typename T, int columns, int rows>
__device__ __forceinline__ void write_tile(uint16_t* tile, int first,
                                           const float (&result)[columns / 2],
                                           const float (&factor)[2]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % warpgroup / 32;
  const int row = first + warp * 16 + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
  for (int i = 0; i < columns / 2; i += 8) {
    const int chunk = i / 4 + lane / 16;  // of 8 columns
    const uint32_t to = shared_address(tile + chunk / 8 * rows * block_columns) + row * 128 +
                        ((chunk % 8) ^ (row % 8)) * 16;
    store_matrices(to, pack<T>(result[i] * factor[0], result[i + 1] * factor[0]),
                   pack<T>(result[i + 2] * factor[1], result[i + 3] * factor[1]),
                   pack<T>(result[i + 4] * factor[0], result[i + 5] * factor[0]),
                   pack<T>(result[i + 6] * factor[1], result[i + 7] * factor[1]));
  }
  fence_for_copy_engine();
}

}  // namespace zerotuning::attention::hopper
