// Addresses: rows of strided arrays in global memory, and pointers into shared memory.
#pragma once

#include <cstdint>

#include "attention/arguments.h"

namespace zerotuning::attention::device {

template <typename A>
__device__ __forceinline__ int64_t offset(const Strided4<A>& array, int64_t sample, int64_t head,
                                          int64_t row) {
  return sample * array.batch_stride + head * array.head_stride + row * array.row_stride;
}
// The first element of a row that is read.
template <typename T, typename A>
__device__ __forceinline__ const T* row_of(const Strided4<A>& array, int64_t sample, int64_t head,
                                           int64_t row) {
  return static_cast<const T*>(array.data) + offset(array, sample, head, row);
}
// The first element of a row that is written.
template <typename T>
__device__ __forceinline__ T* written_row_of(const Strided4<void>& array, int64_t sample,
                                             int64_t head, int64_t row) {
  return static_cast<T*>(array.data) + offset(array, sample, head, row);
}

// log_scale of a head. `arguments` is a CudaAttention or the arguments of a kernel.
template <typename C, typename Arguments>
__device__ __forceinline__ C log_scale_of(const Arguments& arguments, int64_t sample,
                                          int64_t head) {
  return static_cast<const C*>(arguments.log_scale)[sample * arguments.log_scale_batch_stride +
                                                    head * arguments.log_scale_head_stride];
}

// The 32-bit address that PTX instructions expect for shared memory.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace zerotuning::attention::device
