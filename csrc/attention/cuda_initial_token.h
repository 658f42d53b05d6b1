// The initial token's share of attention whose other keys a kernel of torch computes
// (docs/how-it-works.md, "CUDA prefill by exclusion and merge" and "Backward").
#pragma once

#include "attention/cuda_arguments.h"

namespace zerotuning::attention {

// Merges the initial token into torch's attention over the other keys, row by row:
//   s = scale q·k_0 + log_scale;  m = max(s, lse)
//   o = (e^{s-m} v_0 + e^{lse-m} o_1) / (e^{s-m} + e^{lse-m})
// `partial` (o_1) and `partial_logsumexp` (lse) hold rows first_row, first_row + 1, ... of the
// result; rows before first_row attend to the initial token only. 16-bit dtypes.
cudaError_t initial_token_merge(const CudaAttention& arguments, const Strided4<const void>& partial,
                                const Strided4<const void>& partial_logsumexp, int32_t first_row,
                                const CudaDevice& device, cudaStream_t stream);

// Copies key and value for torch's backward kernel, with row 0 replaced by row 1. So torch's
// kernel reads whole tiles from the beginning of the arrays, and no weight is larger than 1 (row 0
// of the weights is not used). The gradient of query then holds key 1's contribution twice;
// initial_token_backward subtracts the duplicate.
cudaError_t replace_initial_key(const CudaAttention& arguments, const Strided4<void>& key,
                                const Strided4<void>& value, cudaStream_t stream);

// The gradient of query by a torch kernel that ran without the initial token's key, or with that
// key replaced by key 1 (replace_initial_key).
struct TorchKernelGradients {
  Strided4<const void> query;  // may be grad_query itself
  bool initial_key_replaced;
};

// Completes torch's gradients with the initial token's share. With a = exp(scale q·k_0 + log_scale
// - lse) and ds = a (do·v_0 - do·o), where v_0 - o is
// -output_minus_initial_value if that array is given:
//   grad_query = torch.query + scale ds k_0;  grad_key[0] = sum scale ds q;
//   grad_value[0] = sum a do;  grad_log_scale = sum ds
// The caller passes torch's arrays as grad_key and grad_value: only the row of the scaled key is
// written. The scaled key is the only key of its sample's span. 16-bit dtypes; the sums are added
// in a fixed order.
int64_t initial_token_backward_scratch(const CudaAttention& arguments);  // bytes
cudaError_t initial_token_backward(const CudaAttention& arguments,
                                   const CudaAttentionGradients& gradients,
                                   const TorchKernelGradients& torch, const CudaDevice& device,
                                   cudaStream_t stream);

// Writes the additive bias [batch, 1, 1, keys] that excludes keys from torch's kernel: -inf for
// padding and for the first real key, else 0. Contiguous, of the query's 16-bit dtype.
cudaError_t exclusion_bias(const CudaAttention& arguments, void* bias, cudaStream_t stream);

// Replaces -inf by +inf: for rows that attend to no key, exp(logit - logsumexp) is then 0, not NaN.
cudaError_t negate_minus_infinity(float* values, int64_t count, cudaStream_t stream);

}  // namespace zerotuning::attention
