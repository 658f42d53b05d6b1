// ZeroTuning's attention for LibTorch programs: zerotuning::attention, with gradients, and
// zerotuning::decode_attention. Link LibTorch, 2.10 or newer, and zerotuning::ops, which registers
// the operators; for tensors on a GPU also zerotuning::ops_cuda.
//
//   auto [output, logsumexp] = zerotuning::attention(query, key, value, log_scale);
//
// query [B, H, Tq, D], key [B, Hkv, Tk, D], value [B, Hkv, Tk, Dv] in float32, bfloat16, float16 or
// float64; H a multiple of Hkv. log_scale [H] or [B, H] = log γ, float32 (float64 with a float64
// query). Options as in python/zerotuning/ops.py. Errors: std::exception whose text names the
// argument, what was expected and what came.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>
#include <optional>
#include <tuple>

namespace zerotuning {

struct AttentionOptions {
  std::optional<at::Tensor>
      key_mask;  // bool [B, Tk], true = real key; the initial token is the first real key
  std::optional<at::Tensor>
      span;  // int64 [B, 2]: keys [first, end) scaled instead of the initial token
  std::optional<at::Tensor>
      query_start;     // int64 [B]: position of the first query among the keys, default Tk - Tq
  int64_t window = 0;  // number of keys that a query attends to, its own included; 0 = all
  std::optional<double> scale;  // of the logits, default D^-0.5
};

namespace detail {

using OptionalTensor = std::optional<at::Tensor>;
using ForwardSignature = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, int64_t, double);
using PlainSignature = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&,
                                                          const at::Tensor&, const at::Tensor&,
                                                          const OptionalTensor&,
                                                          const OptionalTensor&,
                                                          const OptionalTensor&, int64_t, double);
using DecodeSignature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                   const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
                                   const OptionalTensor&, int64_t, double);
using BackwardSignature = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
    const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
    const OptionalTensor&, int64_t, double, const OptionalTensor&);

template <typename Signature>
auto operator_named(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline OptionalTensor present(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

class Attention : public torch::autograd::Function<Attention> {
 public:
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context,
                                                const at::Tensor& query, const at::Tensor& key,
                                                const at::Tensor& value,
                                                const at::Tensor& log_scale,
                                                const AttentionOptions& options, double scale) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    static const auto forward_operator =
        operator_named<ForwardSignature>("zerotuning::_attention_with_output_minus_initial_value");
    auto [output, logsumexp, output_minus_initial_value] =
        forward_operator.call(query, key, value, log_scale, options.key_mask, options.span,
                              options.query_start, options.window, scale);
    context->save_for_backward(
        {query, key, value, log_scale, output, logsumexp, options.key_mask.value_or(at::Tensor()),
         options.span.value_or(at::Tensor()), options.query_start.value_or(at::Tensor()),
         output_minus_initial_value});
    context->saved_data["window"] = options.window;
    context->saved_data["scale"] = scale;
    context->mark_non_differentiable({logsumexp});
    return {output, logsumexp};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    static const auto backward_operator =
        operator_named<BackwardSignature>("zerotuning::attention_backward");
    const auto saved = context->get_saved_variables();
    auto [query, key, value, log_scale] = backward_operator.call(
        gradients[0], saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], present(saved[6]),
        present(saved[7]), present(saved[8]), context->saved_data["window"].toInt(),
        context->saved_data["scale"].toDouble(), present(saved[9]));
    return {query, key, value, log_scale, at::Tensor(), at::Tensor()};
  }
};

inline double softmax_scale(const at::Tensor& query, const AttentionOptions& options) {
  return options.scale.value_or(1.0 / std::sqrt(static_cast<double>(query.size(-1))));
}

}  // namespace detail

// (output [B, H, Tq, Dv], logsumexp [B, H, Tq]); differentiable in query, key, value and log_scale.
inline std::tuple<at::Tensor, at::Tensor> attention(const at::Tensor& query, const at::Tensor& key,
                                                    const at::Tensor& value,
                                                    const at::Tensor& log_scale,
                                                    const AttentionOptions& options = {}) {
  const double scale = detail::softmax_scale(query, options);
  const bool needs_gradient =
      at::GradMode::is_enabled() && (query.requires_grad() || key.requires_grad() ||
                                     value.requires_grad() || log_scale.requires_grad());
  if (!needs_gradient) {
    static const auto plain_operator =
        detail::operator_named<detail::PlainSignature>("zerotuning::attention");
    return plain_operator.call(query, key, value, log_scale, options.key_mask, options.span,
                               options.query_start, options.window, scale);
  }
  auto results = detail::Attention::apply(query, key, value, log_scale, options, scale);
  return {results[0], results[1]};
}

// output [B, H, Tq, Dv] of few queries against many keys (generation); no gradient.
inline at::Tensor decode_attention(const at::Tensor& query, const at::Tensor& key,
                                   const at::Tensor& value, const at::Tensor& log_scale,
                                   const AttentionOptions& options = {}) {
  at::NoGradGuard no_grad;
  static const auto decode_operator =
      detail::operator_named<detail::DecodeSignature>("zerotuning::decode_attention");
  return decode_operator.call(query, key, value, log_scale, options.key_mask, options.span,
                              options.query_start, options.window,
                              detail::softmax_scale(query, options));
}

}  // namespace zerotuning
