// Backward attention on CUDA: the launchers of the plain and the Hopper kernels. Both add in a
// fixed order, so gradients repeat bit by bit.
#pragma once

#include "attention/cuda_arguments.h"

namespace zerotuning::attention {

// Supports the same calls as attention_plain.
int64_t attention_backward_plain_scratch(const CudaAttention& arguments);  // bytes
cudaError_t attention_backward_plain(const CudaAttention& arguments,
                                     const CudaAttentionGradients& gradients, cudaStream_t stream);

// Supports the same calls as attention_hopper, up to head size 128.
int64_t attention_backward_hopper_scratch(const CudaAttention& arguments);  // bytes
cudaError_t attention_backward_hopper(const CudaAttention& arguments,
                                      const CudaAttentionGradients& gradients,
                                      int32_t multiprocessors, cudaStream_t stream);

}  // namespace zerotuning::attention
