// What Hopper's kernels, forward and backward, do with tiles: their maps for the copy engine, rings
// of them, products, and a warpgroup's share of a result.
//
// Tiles lie in shared memory as [64-column block][row][128 bytes], swizzled. A thread of a
// warpgroup holds of its warp's 16 rows those at lane/4 and lane/4 + 8, and of those the columns
// 8i + 2(lane % 4) + {0, 1}, at [4i + 2(row half) + column].
#pragma once

#include <algorithm>

#include "attention/cuda/hopper/ptx.cuh"

namespace zerotuning::attention::hopper {

using device::pack;

constexpr int warpgroup = 128;
constexpr int block_columns = 64;  // 128 bytes, the widest box of the swizzle

// How many tiles have gone through a ring of stages.
template <int stages>
struct Ring {
  uint32_t count = 0;
  __device__ int stage() const { return count % stages; }
  __device__ uint32_t parity() const { return count / stages & 1; }
};

__device__ __forceinline__ void arrive_warp(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) arrive(barrier);
}

// Whether all keys [first, first + count) are real.
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

// Of a thread's number at [i]: its column, and its row within the warpgroup's 64.
__device__ __forceinline__ int column_at(int i) {
  return i / 4 * 8 + static_cast<int>(threadIdx.x % 4) * 2 + (i & 1);
}
__device__ __forceinline__ int row_at(int i) {
  const int thread = threadIdx.x % warpgroup;
  return thread / 32 * 16 + thread % 32 / 4 + (i & 2) * 4;
}

template <typename T, int count>
__device__ __forceinline__ void to_left_matrices(const float (&weights)[count],
                                                 uint32_t (&matrices)[count / 8][4]) {
#pragma unroll
  for (int i = 0; i < count; i += 2)
    matrices[i / 8][i % 8 / 2] = pack<T>(weights[i], weights[i + 1]);
}

// result = left right^T: 64 rows of a tile of left_rows, all of a tile of right_rows.
template <typename T, int columns, int left_rows, int right_rows>
__device__ __forceinline__ void start_row_products(float (&result)[right_rows / 2],
                                                   const uint16_t* left, const uint16_t* right) {
  const uint64_t left_matrix = matrix(left, 16, 8 * 128), right_matrix = matrix(right, 16, 8 * 128);
  begin_products();
#pragma unroll
  for (int k = 0; k < columns; k += 16) {
    const int block = k / block_columns, column = k % block_columns;
    multiply<T>(result, moved(left_matrix, block * left_rows * 128 + column * 2),
                moved(right_matrix, block * right_rows * 128 + column * 2), k > 0);
  }
  commit_products();
}

// sums += weights tile.
template <typename T, int columns, int rows>
__device__ __forceinline__ void start_weighted_sums(float (&sums)[columns / 2],
                                                    const uint32_t (&weights)[rows / 16][4],
                                                    const uint16_t* tile) {
  const uint64_t right = matrix(tile, rows * 128, 8 * 128);
  begin_products();
#pragma unroll
  for (int k = 0; k < rows; k += 16) multiply_add<T>(sums, weights[k / 16], moved(right, k * 128));
  commit_products();
}

// Writes numbers times their row half's factor to rows [first, first + 64) of a tile.
template <typename T, int columns, int rows>
__device__ __forceinline__ void write_tile(uint16_t* tile, int first,
                                           const float (&numbers)[columns / 2],
                                           const float (&factor)[2]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % warpgroup / 32;
  const int row = first + warp * 16 + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
  for (int i = 0; i < columns / 2; i += 8) {
    const int chunk = i / 4 + lane / 16;  // of 8 columns
    const uint32_t to = shared_address(tile + chunk / 8 * rows * block_columns) + row * 128 +
                        ((chunk % 8) ^ (row % 8)) * 16;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                 "r"(pack<T>(numbers[i] * factor[0], numbers[i + 1] * factor[0])),
                 "r"(pack<T>(numbers[i + 2] * factor[1], numbers[i + 3] * factor[1])),
                 "r"(pack<T>(numbers[i + 4] * factor[0], numbers[i + 5] * factor[0])),
                 "r"(pack<T>(numbers[i + 6] * factor[1], numbers[i + 7] * factor[1]))
                 : "memory");
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function, without linking the driver.
inline EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* address = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &address,
                                                               12000, cudaEnableDefault, &found);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &address, cudaEnableDefault, &found);
#endif
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess
               ? reinterpret_cast<EncodeTiled>(address)
               : nullptr;
  }();
  return function;
}

// The stride of a dimension of size 1 is any number, which the driver might refuse.
inline cuuint64_t map_stride(int64_t stride, int size) {
  return static_cast<cuuint64_t>(size > 1 ? stride * 2 : 16);
}

template <int dimensions>
cudaError_t encode_map(CUtensorMap* map, DType dtype, const void* data,
                       const cuuint64_t (&sizes)[dimensions],
                       const cuuint64_t (&strides)[dimensions - 1],
                       const cuuint32_t (&box)[dimensions]) {
  cuuint32_t steps[dimensions];
  std::fill_n(steps, dimensions, 1);
  const EncodeTiled encode = encode_tiled();
  if (!encode) return cudaErrorNotSupported;
  const CUresult result = encode(
      map,
      dtype == DType::float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      dimensions, const_cast<void*>(data), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// [batch, heads, rows, columns] in boxes of `box_rows` rows and 64 columns.
inline cudaError_t make_map(CUtensorMap* map, DType dtype, const Strided4<const void>& array,
                            int batch, int heads, int rows, int columns, int box_rows) {
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
                               static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(batch)};
  const cuuint64_t strides[3] = {map_stride(array.row_stride, rows),
                                 map_stride(array.head_stride, heads),
                                 map_stride(array.batch_stride, batch)};
  const cuuint32_t box[4] = {block_columns, static_cast<cuuint32_t>(box_rows), 1, 1};
  return encode_map<4>(map, dtype, array.data, sizes, strides, box);
}

}  // namespace zerotuning::attention::hopper
