// The arguments of one attention call, and their checks, which all devices share.
#pragma once

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "attention/arguments.h"
#include "ops/aten.h"

namespace zerotuning::ops {

// A tensor's sizes, written as "[2, 3]" into an error message.
struct Shape {
  const Tensor& tensor;
};
std::ostream& operator<<(std::ostream& stream, const Shape& shape);

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  ((message << parts), ...);
  throw std::invalid_argument(message.str());
}
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

// The arguments that the schemas of all operators share, in the schemas' order.
struct AttentionArguments {
  Tensor query, key, value, log_scale;
  std::optional<Tensor> key_mask;     // bool or uint8 (0, 1) [batch, keys]
  std::optional<Tensor> span;         // int64 [batch, 2]
  std::optional<Tensor> query_start;  // int64 [batch]
  int64_t window;                     // 0 = none
  double scale;
};

// One attention call. Sizes as in PyTorch: query [batch, heads, queries, head_size], key [batch,
// key_heads, keys, head_size], value [batch, key_heads, keys, value_head_size].
struct Problem : AttentionArguments {
  attention::DType dtype{};
  int64_t batch = 0, heads = 0, key_heads = 0, queries = 0, keys = 0;
  int64_t head_size = 0, value_head_size = 0;

  bool log_scale_per_sample() const { return log_scale.dim() == 2; }
};

// Throws std::invalid_argument that names the argument, what was expected and what came.
Problem check_problem(AttentionArguments arguments);

// Throws like check_problem, for the arguments of _encode_key_mask (cpu/encode_key_mask.h).
void check_key_mask_to_encode(const Tensor& key_mask, int64_t keys);

// The results of a call's forward pass, and the gradient of the loss with respect to `output`.
struct BackwardArguments {
  Tensor grad_output, output, logsumexp;
  std::optional<Tensor> output_minus_initial_value;  // none or empty if forward did not compute it
};

// Throws like check_problem.
void check_backward(const Problem& problem, const BackwardArguments& backward);

}  // namespace zerotuning::ops
