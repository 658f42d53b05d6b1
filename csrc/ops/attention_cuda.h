// Attention with a scaled initial token on NVIDIA GPUs. Without a route, cuda_routes.h chooses the
// kernel.
#pragma once

#include "ops/cuda_routes.h"
#include "ops/problem.h"

namespace zerotuning::ops {

// (output [B, H, Tq, Dv] in memory order [B, Tq, H, Dv]; logsumexp [B, H, Tq], contiguous;
// output_minus_initial_value: output minus the initial token's value, with output's shape and
// memory order if the caller requests this tensor and backward needs it (torch_gradient_lengths),
// else [0]).
ThreeTensors attention_cuda(const Problem& problem, Route route = Route::automatic,
                            bool with_output_minus_initial_value = false);

// Gradients of query, key, value and log_scale.
FourTensors attention_backward_cuda(const Problem& problem, const BackwardArguments& backward,
                                    Route route = Route::automatic);

// output [B, H, Tq, Dv], or transposed [B, Tq, H, Dv]. With up to 16 queries, keys and values are
// read once for up to 32 rows (heads times queries) of a key head.
Tensor decode_attention_cuda(const Problem& problem, DecodeRoute route = DecodeRoute::automatic,
                             bool transpose = false);

// encode_key_mask_cpu's result (cpu/encode_key_mask.h), without waiting for the device.
Tensor encode_key_mask_cuda(const Tensor& key_mask, int64_t keys, int64_t query_start);

}  // namespace zerotuning::ops
