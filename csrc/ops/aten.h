// The aten operators that csrc/ops calls, through LibTorch's stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
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
using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;
using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

namespace aten {

// Calls aten::name.overload. The dispatcher replaces the arguments on the stack by the results.
template <size_t outputs, typename... Arguments>
auto call(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, (sizeof...(Arguments) > outputs ? sizeof...(Arguments) : outputs)> stack{
      torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  std::array<StableIValue, outputs> results{};
  std::copy_n(stack.begin(), outputs, results.begin());
  return results;
}

template <typename... Arguments>
Tensor tensor(const char* name, const char* overload, const Arguments&... arguments) {
  return torch::stable::detail::to<Tensor>(call<1>(name, overload, arguments...)[0]);
}

// Tensors and views come from the C shim itself, not from the dispatcher: for short sequences the
// number of dispatched calls limits the speed.
inline Tensor empty_strided(const Tensor& like, const Sizes& sizes, const Sizes& strides,
                            ScalarType type) {
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), dtype, device_type,
                                                  like.get_device_index(), &result));
  return Tensor(result);
}
inline Tensor empty(const Tensor& like, const Sizes& sizes, ScalarType type) {
  Sizes strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  return empty_strided(like, sizes, strides, type);
}
// `offset` counts from self's own first element.
inline Tensor as_strided(const Tensor& self, const Sizes& sizes, const Sizes& strides,
                         int64_t offset = 0) {
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(self.get(), static_cast<int64_t>(sizes.size()), sizes.data(),
                                     strides.data(), offset, &result));
  return Tensor(result);
}
inline Tensor narrow(const Tensor& self, int64_t dim, int64_t begin, int64_t end) {
  Sizes sizes(self.sizes().begin(), self.sizes().end());
  sizes[dim] = end - begin;
  return as_strided(self, sizes, Sizes(self.strides().begin(), self.strides().end()),
                    begin * self.stride(dim));
}
inline Tensor flip(const Tensor& self, const Sizes& dims) {
  return tensor("aten::flip", "", self, dims);
}
// A contiguous copy.
inline Tensor clone_contiguous(const Tensor& self) {
  return tensor("aten::clone", "", self,
                std::optional(torch::headeronly::MemoryFormat::Contiguous));
}
// The tensor itself if it is contiguous, else a copy.
inline Tensor contiguous(const Tensor& self) {
  return self.is_contiguous() ? self : clone_contiguous(self);
}
inline Tensor clone(const Tensor& self) { return torch::stable::clone(self); }
inline Tensor zeros_like(const Tensor& self) {
  Tensor result = torch::stable::empty_like(self);
  return torch::stable::zero_(result);
}
inline void copy_(const Tensor& self, const Tensor& source) {
  tensor("aten::copy_", "", self, source, false);
}
// The tensor with zeros appended to its last dimension.
inline Tensor pad_columns(const Tensor& self, int64_t columns) {
  if (columns == self.size(3)) return self;
  return torch::stable::pad(self, Sizes{0, columns - self.size(3)});
}

// Torch's CPU flash attention with an additive bias (any strides, also 0) and a causal mask aligned
// at the top left. Returns (output [B, H, Tq, D], logsumexp [B, H, Tq]). A row that attends to no
// key gives output 0 and logsumexp 0.
inline std::tuple<Tensor, Tensor> flash_attention_cpu(const Tensor& query, const Tensor& key,
                                                      const Tensor& value, bool causal,
                                                      const Tensor& bias, double scale) {
  auto stack = call<2>("aten::_scaled_dot_product_flash_attention_for_cpu", "", query, key, value,
                       0.0, causal, std::optional(bias), std::optional(scale));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

// The backward pass of flash_attention_cpu. `output` and `logsumexp` may belong to a softmax over
// more keys than `key` holds.
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
