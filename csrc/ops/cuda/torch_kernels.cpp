// Calls of torch's attention kernels (torch_kernels.h).
#include "ops/cuda/torch_kernels.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include <array>

#include "attention/cuda_initial_token.h"
#include "ops/layout.h"

namespace zerotuning::ops::cuda {
namespace {

using torch::stable::detail::to;

Tensor undefined() {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_uninitialized_tensor(&handle));
  return Tensor(handle);
}

Tensor rows_from(const Tensor& t, int64_t begin) { return aten::narrow(t, 2, begin, t.size(2)); }

// cuDNN's additive bias [B, 1, 1, Tk], which excludes padding and the initial token.
Tensor exclusion_bias(const Problem& p, const Call& call) {
  const Tensor bias = aten::empty(p.query, Sizes{p.batch, 1, 1, p.keys}, p.query.scalar_type());
  check(attention::exclusion_bias(call.arguments, bias.mutable_data_ptr(), call.stream), "bias");
  return bias;
}

// Torch's kernels compute exp(logit - logsumexp). For rows that attend to no key this is NaN if
// logsumexp is -inf, and 0 if logsumexp is +inf.
Tensor logsumexp_for_torch(const Problem& p, const Call& call, const Tensor& logsumexp) {
  if (!p.key_mask) return logsumexp;
  const Tensor copy = aten::clone_contiguous(logsumexp);
  check(attention::negate_minus_infinity(static_cast<float*>(copy.mutable_data_ptr()), copy.numel(),
                                         call.stream),
        "logsumexp");
  return copy;
}

}  // namespace

Tensor gradient_like(const Tensor& t) {
  return empty_bthd(t, {t.size(0), t.size(1), t.size(2), t.size(3)}, t.scalar_type());
}

Gradients new_gradients(const Problem& p) {
  return {gradient_like(p.query), gradient_like(p.key), gradient_like(p.value)};
}

// Calls torch's C functions, not the dispatcher: the results include sequence lengths, which the
// dispatcher's stable interface does not return.
std::tuple<Tensor, Tensor> torch_forward(const Problem& p, const Call& call, Route route) {
  const Tensor query = rows_from(call.query, 1), key = rows_from(call.key, 1),
               value = rows_from(call.value, 1);
  double scale = p.scale;
  std::array<AtenTensorHandle, 7> results{};
  int64_t max_queries, max_keys;
  if (route == Route::cudnn) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cuda__scaled_dot_product_cudnn_attention(
        query.get(), key.get(), value.get(), nullptr, true, 0.0, true, false, &scale, &results[0],
        &results[1], &results[2], &results[3], &max_queries, &max_keys, &results[4], &results[5],
        &results[6]));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cuda__scaled_dot_product_flash_attention(
        query.get(), key.get(), value.get(), 0.0, true, false, &scale, &results[0], &results[1],
        &results[2], &results[3], &max_queries, &max_keys, &results[4], &results[5], &results[6]));
  }
  for (size_t unused = 2; unused < results.size(); ++unused) {
    if (results[unused]) Tensor freed(results[unused]);
  }
  return {Tensor(results[0]), Tensor(results[1])};
}

Gradients torch_backward(const Problem& p, const Call& call, Route route, const Tensor& grad_output,
                         const Tensor& output, const Tensor& logsumexp) {
  const Tensor sums = logsumexp_for_torch(p, call, logsumexp);
  const Tensor seed = aten::empty(p.query, Sizes{}, ScalarType::Long);
  Tensor key = call.key, value = call.value, bias = undefined();
  if (p.key_mask) {
    bias = exclusion_bias(p, call);
  } else {
    key = gradient_like(p.key);
    value = gradient_like(p.value);
    check(attention::replace_initial_key(call.arguments, mutable_array(key), mutable_array(value),
                                         call.stream),
          "keys");
  }
  const auto stack = [&] {
    if (route == Route::flash) {
      return aten::call<3>("aten::_scaled_dot_product_flash_attention_backward", "", grad_output,
                           call.query, key, value, output, sums, undefined(), undefined(),
                           p.queries, p.keys, 0.0, true, seed, seed, std::optional(p.scale));
    }
    const Tensor column = aten::tensor("aten::unsqueeze", "", sums, int64_t{3});
    return aten::call<3>("aten::_scaled_dot_product_cudnn_attention_backward", "", grad_output,
                         call.query, key, value, output, column, seed, seed, bias, undefined(),
                         undefined(), p.queries, p.keys, 0.0, true, std::optional(p.scale));
  }();
  const auto rows = [](const Tensor& t) { return to_bthd(t, t.size(3)); };
  return {to<Tensor>(stack[0]), rows(to<Tensor>(stack[1])), rows(to<Tensor>(stack[2]))};
}

}  // namespace zerotuning::ops::cuda
