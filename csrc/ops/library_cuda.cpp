// The operators' functions for CUDA, in a separate library, which needs a torch with CUDA.
#include <torch/csrc/stable/library.h>

#include "ops/attention_cuda.h"
#include "ops/registration.h"

namespace zerotuning::ops {
namespace {

ThreeTensors attention_by_route(const Problem& problem, bool output_minus_initial_value,
                                int64_t route) {
  return attention_cuda(problem, static_cast<Route>(route), output_minus_initial_value);
}

ThreeTensors attention_with_output_minus_initial_value(const Problem& problem) {
  return attention_cuda(problem, Route::automatic, true);
}

std::tuple<Tensor, Tensor> attention(const Problem& problem) {
  const auto [output, logsumexp, none] = attention_cuda(problem);
  return {output, logsumexp};
}

FourTensors attention_backward_by_route(const Problem& problem, const BackwardArguments& backward,
                                        int64_t route) {
  return attention_backward_cuda(problem, backward, static_cast<Route>(route));
}

FourTensors attention_backward(const Problem& problem, const BackwardArguments& backward) {
  return attention_backward_cuda(problem, backward);
}

Tensor decode_attention_by_route(const Problem& problem, int64_t route) {
  return decode_attention_cuda(problem, static_cast<DecodeRoute>(route));
}

Tensor decode_attention(const Problem& problem) { return decode_attention_cuda(problem); }

Tensor decode_attention_transposed(const Problem& problem) {
  return decode_attention_cuda(problem, DecodeRoute::automatic, true);
}

Tensor encode_key_mask(Tensor key_mask, int64_t keys, int64_t query_start) {
  return encode_key_mask_cuda(key_mask, keys, query_start);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zerotuning, CUDA, library) {
  library.impl("attention", TORCH_BOX(&Forward<attention>::call));
  library.impl("_attention_with_output_minus_initial_value",
               TORCH_BOX(&Forward<attention_with_output_minus_initial_value>::call));
  library.impl("attention_backward", TORCH_BOX(&Backward<attention_backward>::call));
  library.impl("decode_attention", TORCH_BOX(&Forward<decode_attention>::call));
  library.impl("_decode_attention_transposed",
               TORCH_BOX(&Forward<decode_attention_transposed>::call));
  library.impl("_attention_by_route", TORCH_BOX(&Forward<attention_by_route>::call));
  library.impl("_attention_backward_by_route",
               TORCH_BOX(&Backward<attention_backward_by_route>::call));
  library.impl("_decode_attention_by_route", TORCH_BOX(&Forward<decode_attention_by_route>::call));
  library.impl("_encode_key_mask", TORCH_BOX(&encode_key_mask));
}

}  // namespace zerotuning::ops
