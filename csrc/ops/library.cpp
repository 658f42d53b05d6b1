// The operators' schemas, and which function runs on which device. Fake kernels and autograd are
// registered from Python (python/zerotuning/ops.py), as LibTorch's stable ABI intends.
#include <torch/csrc/stable/library.h>

#include "ops/attention_cpu.h"
#include "ops/geometry_cpu.h"
#include "ops/layout.h"

namespace {

using zerotuning::ops::check_problem;
using zerotuning::ops::FourTensors;
using zerotuning::ops::Problem;
using zerotuning::ops::Tensor;
using zerotuning::ops::ThreeTensors;
using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> attention(Tensor query, Tensor key, Tensor value, Tensor log_scale,
                                     OptionalTensor key_mask, OptionalTensor span,
                                     OptionalTensor query_start, int64_t window, double scale) {
  return zerotuning::ops::attention_cpu(
      check_problem(query, key, value, log_scale, key_mask, span, query_start, window, scale));
}

// No output_minus_initial_value is kept here (attention_cuda.h).
ThreeTensors attention_by_route(Tensor query, Tensor key, Tensor value, Tensor log_scale,
                                OptionalTensor key_mask, OptionalTensor span,
                                OptionalTensor query_start, int64_t window, double scale,
                                bool /*output_minus_initial_value*/, int64_t route) {
  auto [output, logsumexp] = zerotuning::ops::attention_cpu(
      check_problem(query, key, value, log_scale, key_mask, span, query_start, window, scale),
      static_cast<zerotuning::ops::CpuRoute>(route));
  return {output, logsumexp, zerotuning::ops::aten::empty(query, {0}, query.scalar_type())};
}

ThreeTensors attention_with_output_minus_initial_value(Tensor query, Tensor key, Tensor value,
                                                       Tensor log_scale, OptionalTensor key_mask,
                                                       OptionalTensor span,
                                                       OptionalTensor query_start, int64_t window,
                                                       double scale) {
  return attention_by_route(query, key, value, log_scale, key_mask, span, query_start, window,
                            scale, true, 0);
}

FourTensors attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value,
                               Tensor log_scale, Tensor output, Tensor logsumexp,
                               OptionalTensor key_mask, OptionalTensor span,
                               OptionalTensor query_start, int64_t window, double scale,
                               OptionalTensor /*output_minus_initial_value*/) {
  const Problem problem =
      check_problem(query, key, value, log_scale, key_mask, span, query_start, window, scale);
  zerotuning::ops::check_backward(problem, grad_output, output, logsumexp);
  return zerotuning::ops::attention_backward_cpu(problem, grad_output, output, logsumexp);
}

Tensor decode_attention(Tensor query, Tensor key, Tensor value, Tensor log_scale,
                        OptionalTensor key_mask, OptionalTensor span, OptionalTensor query_start,
                        int64_t window, double scale) {
  return zerotuning::ops::decode_attention_cpu(
      check_problem(query, key, value, log_scale, key_mask, span, query_start, window, scale));
}

Tensor decode_attention_transposed(Tensor query, Tensor key, Tensor value, Tensor log_scale,
                                   OptionalTensor key_mask, OptionalTensor span,
                                   OptionalTensor query_start, int64_t window, double scale) {
  return zerotuning::ops::transposed(
      decode_attention(query, key, value, log_scale, key_mask, span, query_start, window, scale));
}

Tensor step_geometry(Tensor key_mask, int64_t keys, std::optional<int64_t> query_start) {
  return zerotuning::ops::step_geometry_cpu(key_mask, keys, query_start);
}

}  // namespace

STABLE_TORCH_LIBRARY(zerotuning, library) {
  library.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor log_scale, Tensor? key_mask, "
      "Tensor? span, "
      "Tensor? query_start, int window, float scale) -> (Tensor output, Tensor logsumexp)");
  library.def(
      "attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor "
      "log_scale, Tensor output, "
      "Tensor logsumexp, Tensor? key_mask, Tensor? span, Tensor? query_start, int window, float "
      "scale, Tensor? output_minus_initial_value=None) -> "
      "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_log_scale)");
  library.def(
      "decode_attention(Tensor query, Tensor key, Tensor value, Tensor log_scale, Tensor? "
      "key_mask, Tensor? span, "
      "Tensor? query_start, int window, float scale) -> Tensor");
  // Its output as models go on with it, [B, Tq, H, Dv].
  library.def(
      "_decode_attention_transposed(Tensor query, Tensor key, Tensor value, Tensor log_scale, "
      "Tensor? key_mask, Tensor? span, Tensor? query_start, int window, float scale) -> Tensor");
  // What is kept for a gradient: with the output_minus_initial_value (ops/attention_cuda.h), [0]
  // where none is needed.
  library.def(
      "_attention_with_output_minus_initial_value(Tensor query, Tensor key, Tensor value, Tensor "
      "log_scale, Tensor? "
      "key_mask, Tensor? span, Tensor? query_start, int window, float scale) -> (Tensor output, "
      "Tensor logsumexp, Tensor output_minus_initial_value)");
  // What a patched model's mask function says of a generation step (attention/arguments.h).
  library.def("_step_geometry(Tensor key_mask, int keys, int? query_start) -> Tensor");
  // Routes by number (ops/attention_cpu.h, ops/attention_cuda.h, attention/cuda_decode.h), for
  // tests and benchmarks.
  library.def(
      "_attention_by_route(Tensor query, Tensor key, Tensor value, Tensor log_scale, Tensor? "
      "key_mask, Tensor? span, Tensor? query_start, int window, float scale, bool "
      "output_minus_initial_value, int "
      "route) -> (Tensor output, Tensor logsumexp, Tensor output_minus_initial_value)");
  library.def(
      "_attention_backward_by_route(Tensor grad_output, Tensor query, Tensor key, Tensor value, "
      "Tensor log_scale, Tensor output, Tensor logsumexp, Tensor? key_mask, Tensor? span, Tensor? "
      "query_start, int window, float scale, Tensor? output_minus_initial_value, int route) -> "
      "(Tensor grad_query, "
      "Tensor grad_key, Tensor grad_value, Tensor grad_log_scale)");
  library.def(
      "_decode_attention_by_route(Tensor query, Tensor key, Tensor value, Tensor log_scale, "
      "Tensor? key_mask, Tensor? span, Tensor? query_start, int window, float scale, int route) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(zerotuning, CPU, library) {
  library.impl("attention", TORCH_BOX(&attention));
  library.impl("_attention_with_output_minus_initial_value",
               TORCH_BOX(&attention_with_output_minus_initial_value));
  library.impl("attention_backward", TORCH_BOX(&attention_backward));
  library.impl("decode_attention", TORCH_BOX(&decode_attention));
  library.impl("_decode_attention_transposed", TORCH_BOX(&decode_attention_transposed));
  library.impl("_attention_by_route", TORCH_BOX(&attention_by_route));
  library.impl("_step_geometry", TORCH_BOX(&step_geometry));
}
