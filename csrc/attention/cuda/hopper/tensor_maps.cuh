// Tensor maps: descriptions of arrays in global memory for Hopper's bulk copy engine.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "attention/arguments.h"

namespace zerotuning::attention::hopper {

constexpr int block_columns = 64;  // 128 bytes: the widest box with a swizzle of 128 bytes

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function, looked up at run time: the library does not link the driver.
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

// A stride in bytes. The stride of a dimension of size 1 is arbitrary, and the driver refuses some
// values.
inline cuuint64_t map_stride(int64_t stride, int size) {
  return static_cast<cuuint64_t>(size > 1 ? stride * 2 : 16);
}

// `sizes` in elements, `strides` (of all dimensions but the innermost) in bytes.
template <int dimensions>
cudaError_t encode_tensor_map(CUtensorMap* map, DType dtype, const void* data,
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

// The map of an array [batch, heads, rows, columns] whose boxes have `box_rows` rows and 64
// columns.
inline cudaError_t make_tensor_map(CUtensorMap* map, DType dtype, const Strided4<const void>& array,
                                   int batch, int heads, int rows, int columns, int box_rows) {
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
                               static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(batch)};
  const cuuint64_t strides[3] = {map_stride(array.row_stride, rows),
                                 map_stride(array.head_stride, heads),
                                 map_stride(array.batch_stride, batch)};
  const cuuint32_t box[4] = {block_columns, static_cast<cuuint32_t>(box_rows), 1, 1};
  return encode_tensor_map<4>(map, dtype, array.data, sizes, strides, box);
}

}  // namespace zerotuning::attention::hopper
