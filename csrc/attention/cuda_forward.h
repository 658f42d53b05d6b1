// Forward attention on CUDA: the launchers of the plain and the Hopper kernels.
#pragma once

#include "attention/cuda_arguments.h"

namespace zerotuning::attention {

// Any dtype, head size up to 256, length and geometry, without tensor cores: float32 arithmetic
// (float64 for float64). The exact route, against which the fast routes are tested.
cudaError_t attention_plain(const CudaAttention& arguments, cudaStream_t stream);

// Tensor cores of Hopper (sm_90a): bfloat16 or float16, head sizes up to 256 (multiples of 8),
// strides and pointers that are multiples of 16 bytes; any geometry.
cudaError_t attention_hopper(const CudaAttention& arguments, int32_t multiprocessors,
                             cudaStream_t stream);

}  // namespace zerotuning::attention
