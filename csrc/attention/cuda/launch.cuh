// Launches kernels, with programmatic dependent launch and large shared memory.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <type_traits>

#include "attention/cuda_arguments.h"

namespace zerotuning::attention::device {

// Whether this code runs on a device with programmatic dependent launch
// (CudaDevice::supports_dependent_launch, seen from the device).
#if __CUDA_ARCH__ >= 900
constexpr bool has_dependent_launch = true;
#else
constexpr bool has_dependent_launch = false;
#endif

// After this call the stream's next kernel may start, if that kernel was launched as dependent.
__device__ __forceinline__ void allow_dependent_launch() {
  if constexpr (has_dependent_launch)
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
// In a dependent kernel: waits until the previous kernel of the stream has ended.
__device__ __forceinline__ void wait_for_previous_kernel() {
  if constexpr (has_dependent_launch) asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Raises the kernel's limit of dynamic shared memory above the default of 48 KiB. `bytes` must be
// the same at each call for a device: only the first call reaches the driver, which takes about a
// microsecond.
template <auto kernel>
cudaError_t allow_shared_bytes(int bytes, const CudaDevice& device) {
  static std::atomic<uint64_t> allowed{0};
  static_assert(max_devices <= 64);
  const uint64_t bit = uint64_t{1} << device.index;
  if (allowed.load(std::memory_order_relaxed) & bit) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) allowed.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

// dependent: the kernel may start before the previous one of the stream ends, and calls
// wait_for_previous_kernel itself.
template <typename... Parameters>
cudaError_t launch_kernel(void (*kernel)(Parameters...), const dim3& grid, int threads,
                          int shared_bytes, bool dependent, cudaStream_t stream,
                          const std::common_type_t<Parameters>&... parameters) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = static_cast<unsigned>(threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, parameters...);
  return cudaGetLastError();
}

}  // namespace zerotuning::attention::device
