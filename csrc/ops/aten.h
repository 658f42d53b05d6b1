// The few aten operators that ours are composed of, called through LibTorch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace zerotuning::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

namespace aten {

// Calls aten::name.overload; `outputs` results replace the arguments on the stack.
template <size_t outputs, typename... Arguments>
auto call(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, (sizeof...(Arguments) > outputs ? sizeof...(Arguments) : outputs)> stack{
      torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  std::array<StableIValue, outputs> results;
  std::copy_n(stack.begin(), outputs, results.begin());
  return results;
}

template <typename... Arguments>
Tensor tensor(const char* name, const char* overload, const Arguments&... arguments) {
  return torch::stable::detail::to<Tensor>(call<1>(name, overload, arguments...)[0]);
}

inline Tensor narrow(const Tensor& self, int64_t dim, int64_t begin, int64_t end) {
  return tensor("aten::narrow", "", self, dim, begin, end - begin);
}
inline Tensor as_strided(const Tensor& self, const Sizes& sizes, const Sizes& strides,
                         int64_t offset = 0) {
  return tensor("aten::as_strided", "", self, sizes, strides,
                std::optional<int64_t>(self.storage_offset() + offset));
}
inline Tensor flip(const Tensor& self, const Sizes& dims) {
  return tensor("aten::flip", "", self, dims);
}
inline Tensor transpose(const Tensor& self, int64_t a, int64_t b) {
  return tensor("aten::transpose", "int", self, a, b);
}
inline Tensor contiguous(const Tensor& self) {
  return tensor("aten::clone", "", self,
                std::optional(torch::headeronly::MemoryFormat::Contiguous));
}
inline Tensor clone(const Tensor& self) { return torch::stable::clone(self); }
inline Tensor zeros_like(const Tensor& self) {
  Tensor result = torch::stable::empty_like(self);
  return torch::stable::zero_(result);
}
inline void copy_(const Tensor& self, const Tensor& source) {
  tensor("aten::copy_", "", self, source, false);
}
// Zeros appended to the last dimension.
inline Tensor pad_columns(const Tensor& self, int64_t columns) {
  if (columns == self.size(3)) return self;
  return torch::stable::pad(self, Sizes{0, columns - self.size(3)});
}

// torch's CPU flash attention with an additive bias (any strides, stride 0 included) beside its
// causal mask, which is aligned at the top left. Returns (output [B, H, Tq, D], logsumexp [B, H,
// Tq]). A row that sees no key gives output 0 and logsumexp 0.
inline std::tuple<Tensor, Tensor> flash_attention_cpu(const Tensor& query, const Tensor& key,
                                                      const Tensor& value, bool causal,
                                                      const Tensor& bias, double scale) {
  auto stack = call<2>("aten::_scaled_dot_product_flash_attention_for_cpu", "", query, key, value,
                       0.0, causal, std::optional(bias), std::optional(scale));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

// Its backward. `output` and `logsumexp` may be those of a softmax over more keys than are given
// here.
inline std::tuple<Tensor, Tensor, Tensor> flash_attention_cpu_backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& output, const Tensor& logsumexp, bool causal, const Tensor& bias, double scale) {
  auto stack = call<3>("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "",
                       grad_output, query, key, value, output, logsumexp, 0.0, causal,
                       std::optional(bias), std::optional(scale));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1]),
          torch::stable::detail::to<Tensor>(stack[2])};
}

}  // namespace aten
}  // namespace zerotuning::ops
