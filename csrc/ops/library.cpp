// The operators' schemas, and their functions for the CPU. Fake kernels and autograd are
// registered from Python (python/zerotuning/ops.py), as LibTorch's stable ABI intends.
#include <torch/csrc/stable/library.h>

#include "ops/attention_cpu.h"
#include "ops/cpu/encode_key_mask.h"
#include "ops/layout.h"
#include "ops/registration.h"

namespace zerotuning::ops {
namespace {

std::tuple<Tensor, Tensor> attention(const Problem& problem) { return attention_cpu(problem); }

// On the CPU backward does not need output_minus_initial_value (attention_cuda.h).
ThreeTensors attention_by_route(const Problem& problem, bool /*output_minus_initial_value*/,
                                int64_t route) {
  const Tensor none = aten::empty(problem.query, {0}, problem.query.scalar_type());
  auto [output, logsumexp] = attention_cpu(problem, static_cast<CpuRoute>(route));
  return {output, logsumexp, none};
}

ThreeTensors attention_with_output_minus_initial_value(const Problem& problem) {
  return attention_by_route(problem, true, static_cast<int64_t>(CpuRoute::automatic));
}

Tensor decode_attention_transposed(const Problem& problem) {
  return transposed(decode_attention_cpu(problem));
}

Tensor encode_key_mask(Tensor key_mask, int64_t keys, int64_t query_start) {
  return encode_key_mask_cpu(key_mask, keys, query_start);
}

}  // namespace

// Parts of schemas. Macros, because the compiler joins adjacent string literals.
#define TENSORS "Tensor query, Tensor key, Tensor value, Tensor log_scale"
#define GEOMETRY "Tensor? key_mask, Tensor? span, Tensor? query_start, int window, float scale"
#define BACKWARD_ARGUMENTS \
  "Tensor grad_output, " TENSORS ", Tensor output, Tensor logsumexp, " GEOMETRY
#define FORWARD_RESULTS "(Tensor output, Tensor logsumexp, Tensor output_minus_initial_value)"
#define GRADIENTS "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_log_scale)"

STABLE_TORCH_LIBRARY(zerotuning, library) {
  library.def("attention(" TENSORS ", " GEOMETRY ") -> (Tensor output, Tensor logsumexp)");
  library.def("attention_backward(" BACKWARD_ARGUMENTS
              ", Tensor? output_minus_initial_value=None) -> " GRADIENTS);
  library.def("decode_attention(" TENSORS ", " GEOMETRY ") -> Tensor");
  // decode_attention with its output as [B, Tq, H, Dv], the layout that a model's output projection
  // reads.
  library.def("_decode_attention_transposed(" TENSORS ", " GEOMETRY ") -> Tensor");
  // attention for a call that needs gradients. output_minus_initial_value (ops/attention_cuda.h) is
  // [0] if backward does not need it.
  library.def("_attention_with_output_minus_initial_value(" TENSORS ", " GEOMETRY
              ") -> " FORWARD_RESULTS);
  // The key mask of a decode step, int64 [B, 1, words, 1] (attention/key_mask_layout.h).
  library.def("_encode_key_mask(Tensor key_mask, int keys, int query_start) -> Tensor");
  // Routes by number (ops/attention_cpu.h, ops/attention_cuda.h, attention/cuda_decode.h), for
  // tests and benchmarks.
  library.def("_attention_by_route(" TENSORS ", " GEOMETRY
              ", bool output_minus_initial_value, int route) -> " FORWARD_RESULTS);
  library.def("_attention_backward_by_route(" BACKWARD_ARGUMENTS
              ", Tensor? output_minus_initial_value, int route) -> " GRADIENTS);
  library.def("_decode_attention_by_route(" TENSORS ", " GEOMETRY ", int route) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(zerotuning, CPU, library) {
  library.impl("attention", TORCH_BOX(&Forward<attention>::call));
  library.impl("_attention_with_output_minus_initial_value",
               TORCH_BOX(&Forward<attention_with_output_minus_initial_value>::call));
  library.impl("attention_backward", TORCH_BOX(&Backward<attention_backward_cpu>::call));
  library.impl("decode_attention", TORCH_BOX(&Forward<decode_attention_cpu>::call));
  library.impl("_decode_attention_transposed",
               TORCH_BOX(&Forward<decode_attention_transposed>::call));
  library.impl("_attention_by_route", TORCH_BOX(&Forward<attention_by_route>::call));
  library.impl("_encode_key_mask", TORCH_BOX(&encode_key_mask));
}

}  // namespace zerotuning::ops
