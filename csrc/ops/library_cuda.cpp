// The operators on CUDA: a library of its own, which torch without CUDA does not load.
#include <torch/csrc/stable/library.h>

#include "ops/attention_cuda.h"

namespace {

using zerotuning::ops::check_problem;
using zerotuning::ops::FourTensors;
using zerotuning::ops::Route;
using zerotuning::ops::Tensor;
using zerotuning::ops::ThreeTensors;
using OptionalTensor = std::optional<Tensor>;

ThreeTensors attention_by_route(Tensor query, Tensor key, Tensor value, Tensor log_scale,
                                OptionalTensor key_mask, OptionalTensor span,
                                OptionalTensor query_start, int64_t window, double scale,
                                bool output_minus_initial_value, int64_t route) {
  return zerotuning::ops::attention_cuda(
      check_problem(query, key, value, log_scale, key_mask, span, query_start, window, scale),
      static_cast<Route>(route), output_minus_initial_value);
}

ThreeTensors attention_with_output_minus_initial_value(Tensor query, Tensor key, Tensor value,
                                                       Tensor log_scale, OptionalTensor key_mask,
                                                       OptionalTensor span,
                                                       OptionalTensor query_start, int64_t window,
                                                       double scale) {
  return attention_by_route(query, key, value, log_scale, key_mask, span, query_start, window,
                            scale, true, 0);
}

std::tuple<Tensor, Tensor> attention(Tensor query, Tensor key, Tensor value, Tensor log_scale,
                                     OptionalTensor key_mask, OptionalTensor span,
                                     OptionalTensor query_start, int64_t window, double scale) {
  const auto [output, logsumexp, none] = attention_by_route(
      query, key, value, log_scale, key_mask, span, query_start, window, scale, false, 0);
  return {output, logsumexp};
}

FourTensors attention_backward_by_route(Tensor grad_output, Tensor query, Tensor key, Tensor value,
                                        Tensor log_scale, Tensor output, Tensor logsumexp,
                                        OptionalTensor key_mask, OptionalTensor span,
                                        OptionalTensor query_start, int64_t window, double scale,
                                        OptionalTensor output_minus_initial_value, int64_t route) {
  const auto problem =
      check_problem(query, key, value, log_scale, key_mask, span, query_start, window, scale);
  zerotuning::ops::check_backward(problem, grad_output, output, logsumexp,
                                  output_minus_initial_value);
  return zerotuning::ops::attention_backward_cuda(problem, grad_output, output, logsumexp,
                                                  output_minus_initial_value,
                                                  static_cast<Route>(route));
}

FourTensors attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value,
                               Tensor log_scale, Tensor output, Tensor logsumexp,
                               OptionalTensor key_mask, OptionalTensor span,
                               OptionalTensor query_start, int64_t window, double scale,
                               OptionalTensor output_minus_initial_value) {
  return attention_backward_by_route(grad_output, query, key, value, log_scale, output, logsumexp,
                                     key_mask, span, query_start, window, scale,
                                     output_minus_initial_value, 0);
}

Tensor decode_attention_by_route(Tensor query, Tensor key, Tensor value, Tensor log_scale,
                                 OptionalTensor key_mask, OptionalTensor span,
                                 OptionalTensor query_start, int64_t window, double scale,
                                 int64_t route) {
  return zerotuning::ops::decode_attention_cuda(
      check_problem(query, key, value, log_scale, key_mask, span, query_start, window, scale),
      static_cast<zerotuning::attention::DecodeRoute>(route));
}

Tensor decode_attention(Tensor query, Tensor key, Tensor value, Tensor log_scale,
                        OptionalTensor key_mask, OptionalTensor span, OptionalTensor query_start,
                        int64_t window, double scale) {
  return decode_attention_by_route(query, key, value, log_scale, key_mask, span, query_start,
                                   window, scale, 0);
}

Tensor decode_attention_transposed(Tensor query, Tensor key, Tensor value, Tensor log_scale,
                                   OptionalTensor key_mask, OptionalTensor span,
                                   OptionalTensor query_start, int64_t window, double scale) {
  return zerotuning::ops::decode_attention_cuda(
      check_problem(query, key, value, log_scale, key_mask, span, query_start, window, scale),
      zerotuning::attention::DecodeRoute::automatic, true);
}

Tensor step_geometry(Tensor key_mask, int64_t keys, std::optional<int64_t> query_start) {
  return zerotuning::ops::step_geometry_cuda(key_mask, keys, query_start);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zerotuning, CUDA, library) {
  library.impl("attention", TORCH_BOX(&attention));
  library.impl("_attention_with_output_minus_initial_value",
               TORCH_BOX(&attention_with_output_minus_initial_value));
  library.impl("attention_backward", TORCH_BOX(&attention_backward));
  library.impl("decode_attention", TORCH_BOX(&decode_attention));
  library.impl("_decode_attention_by_route", TORCH_BOX(&decode_attention_by_route));
  library.impl("_decode_attention_transposed", TORCH_BOX(&decode_attention_transposed));
  library.impl("_attention_by_route", TORCH_BOX(&attention_by_route));
  library.impl("_step_geometry", TORCH_BOX(&step_geometry));
  library.impl("_attention_backward_by_route", TORCH_BOX(&attention_backward_by_route));
}
