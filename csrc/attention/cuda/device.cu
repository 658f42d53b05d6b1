// The compute capability that this library's kernels were compiled for.
#include "attention/cuda_arguments.h"

namespace zerotuning::attention {
namespace {

// Compiled like the library's other kernels; never launched.
__global__ void probe() {}

}  // namespace

cudaError_t compiled_capability_of_kernels(int32_t& capability) {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe);
  // Clears the error: otherwise the launcher of the next kernel would return this error.
  if (error != cudaSuccess) cudaGetLastError();
  capability = attributes.ptxVersion;
  return error;
}

}  // namespace zerotuning::attention
