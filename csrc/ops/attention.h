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
  // bool [B, Tk], true = real key. The initial token is the first real key.
  std::optional<at::Tensor> key_mask;
  // int64 [B, 2]: the scaled keys [first, end), default the initial token.
  std::optional<at::Tensor> span;
  // int64 [B]: the position of the first query among the keys, default Tk - Tq.
  std::optional<at::Tensor> query_start;
  // The number of keys that a query attends to, the query's own key included; 0 = all.
  int64_t window = 0;
  // Factor of the logits, default D^-0.5.
  std::optional<double> scale;
};

namespace detail {

using OptionalTensor = std::optional<at::Tensor>;

// The arguments that the forward operators share (ops/library.cpp).
template <typename Result>
using ForwardOperator = c10::TypedOperatorHandle<Result(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& log_scale, const OptionalTensor& key_mask, const OptionalTensor& span,
    const OptionalTensor& query_start, int64_t window, double scale)>;

using BackwardOperator =
    c10::TypedOperatorHandle<std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
        const at::Tensor& grad_output, const at::Tensor& query, const at::Tensor& key,
        const at::Tensor& value, const at::Tensor& log_scale, const at::Tensor& output,
        const at::Tensor& logsumexp, const OptionalTensor& key_mask, const OptionalTensor& span,
        const OptionalTensor& query_start, int64_t window, double scale,
        const OptionalTensor& output_minus_initial_value)>;

using TwoTensors = std::tuple<at::Tensor, at::Tensor>;
using ThreeTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name,
                                                  c10::TypedOperatorHandle<Signature>*) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// The operator with this name; Handle is a ForwardOperator or the BackwardOperator.
template <typename Handle>
Handle operator_named(const char* name) {
  return find_operator(name, static_cast<Handle*>(nullptr));
}

template <typename Result>
Result call_forward(const ForwardOperator<Result>& forward, const at::Tensor& query,
                    const at::Tensor& key, const at::Tensor& value, const at::Tensor& log_scale,
                    const AttentionOptions& options, double scale) {
  return forward.call(query, key, value, log_scale, options.key_mask, options.span,
                      options.query_start, options.window, scale);
}

// In the variables of save_for_backward, an undefined tensor stands for an absent argument.
inline OptionalTensor optional_if_defined(const at::Tensor& tensor) {
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
    static const auto forward_operator = operator_named<ForwardOperator<ThreeTensors>>(
        "zerotuning::_attention_with_output_minus_initial_value");
    auto [output, logsumexp, output_minus_initial_value] =
        call_forward(forward_operator, query, key, value, log_scale, options, scale);
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
        operator_named<BackwardOperator>("zerotuning::attention_backward");
    const auto saved = context->get_saved_variables();
    auto [query, key, value, log_scale] = backward_operator.call(
        gradients[0], saved[0], saved[1], saved[2], saved[3], saved[4], saved[5],
        optional_if_defined(saved[6]), optional_if_defined(saved[7]), optional_if_defined(saved[8]),
        context->saved_data["window"].toInt(), context->saved_data["scale"].toDouble(),
        optional_if_defined(saved[9]));
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
    static const auto attention_operator =
        detail::operator_named<detail::ForwardOperator<detail::TwoTensors>>(
            "zerotuning::attention");
    return detail::call_forward(attention_operator, query, key, value, log_scale, options, scale);
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
      detail::operator_named<detail::ForwardOperator<at::Tensor>>("zerotuning::decode_attention");
  return detail::call_forward(decode_operator, query, key, value, log_scale, options,
                              detail::softmax_scale(query, options));
}

}  // namespace zerotuning
