// Calls of torch's attention kernels: forward over all keys but the initial token's, and backward
// for these keys (docs/how-it-works.md, "CUDA prefill by exclusion and merge" and
// "Backward").
#pragma once

#include "ops/cuda/call.h"

namespace zerotuning::ops::cuda {

struct Gradients {
  Tensor query, key, value;
};

// Uninitialised, in memory order [batch, rows, heads, columns].
Tensor gradient_like(const Tensor& tensor);
Gradients new_gradients(const Problem& problem);

// The attention of queries 1… over keys 1…, causal: (output, logsumexp). route: cudnn or flash.
std::tuple<Tensor, Tensor> torch_forward(const Problem& problem, const Call& call, Route route);

// The gradients of all keys but the initial key, given output and logsumexp of all keys. The
// results hold other numbers for the initial key (cuda_initial_token.h). grad_output, output and
// logsumexp must have the same layout in all calls: the key of torch's cache of cuDNN graphs
// contains the layouts of query, key and value only.
Gradients torch_backward(const Problem& problem, const Call& call, Route route,
                         const Tensor& grad_output, const Tensor& output, const Tensor& logsumexp);

}  // namespace zerotuning::ops::cuda
