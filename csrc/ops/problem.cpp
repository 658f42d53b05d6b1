// Checks of the operators' arguments (problem.h).
#include "ops/problem.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cmath>
#include <limits>
#include <utility>

namespace zerotuning::ops {
namespace {

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    default:
      return "another type";
  }
}

attention::DType dtype_of(const Tensor& query) {
  switch (query.scalar_type()) {
    case ScalarType::Double:
      return attention::DType::float64;
    case ScalarType::Float:
      return attention::DType::float32;
    case ScalarType::BFloat16:
      return attention::DType::bfloat16;
    case ScalarType::Half:
      return attention::DType::float16;
    default:
      fail("query must be float32, bfloat16, float16 or float64, got ",
           name_of(query.scalar_type()));
  }
}

std::string device_of(const Tensor& tensor) {
  int32_t type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  std::string name = type == aoti_torch_device_type_cpu()    ? "cpu"
                     : type == aoti_torch_device_type_cuda() ? "cuda"
                                                             : "another device";
  if (name == "cuda") name += ":" + std::to_string(tensor.get_device_index());
  return name;
}

bool same_device(const Tensor& a, const Tensor& b) {
  int32_t type_a, type_b;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(a.get(), &type_a));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(b.get(), &type_b));
  return type_a == type_b && a.get_device_index() == b.get_device_index();
}

void check_device(const char* name, const Tensor& tensor, const Tensor& query) {
  if (same_device(tensor, query)) return;
  fail(name, " must be on query's device, ", device_of(query), ", got ", device_of(tensor));
}

void check_dtype(const char* name, const Tensor& tensor, ScalarType expected) {
  const ScalarType type = tensor.scalar_type();
  if (type == expected) return;
  fail(name, " must be ", name_of(expected), ", got ", name_of(type));
}

void check_shape(const char* name, const Tensor& tensor, const Sizes& expected,
                 const char* symbols) {
  bool same = tensor.dim() == static_cast<int64_t>(expected.size());
  for (size_t i = 0; same && i < expected.size(); ++i)
    same = tensor.size(static_cast<int64_t>(i)) == expected[i];
  if (same) return;
  std::ostringstream text;
  for (size_t i = 0; i < expected.size(); ++i) text << (i ? ", " : "") << expected[i];
  fail(name, " must be ", symbols, " = [", text.str(), "], got ", Shape{tensor});
}

void check_log_scale(const Problem& p) {
  const Tensor& t = p.log_scale;
  const bool per_sample = t.dim() == 2 && t.size(0) == p.batch && t.size(1) == p.heads;
  require((t.dim() == 1 && t.size(0) == p.heads) || per_sample,
          "log_scale must be [H] or [B, H] with B = ", p.batch, ", H = ", p.heads, ", got ",
          Shape{t});
  check_dtype("log_scale", t,
              p.dtype == attention::DType::float64 ? ScalarType::Double : ScalarType::Float);
  check_device("log_scale", t, p.query);
}

void check_optional(const Problem& p) {
  if (p.key_mask) {
    check_shape("key_mask", *p.key_mask, {p.batch, p.keys}, "[B, Tk]");
    require(p.key_mask->scalar_type() == ScalarType::Bool ||
                p.key_mask->scalar_type() == ScalarType::Byte,
            "key_mask must be bool or uint8, got ", name_of(p.key_mask->scalar_type()));
    check_device("key_mask", *p.key_mask, p.query);
  }
  if (p.span) {
    check_shape("span", *p.span, {p.batch, 2}, "[B, 2]");
    check_dtype("span", *p.span, ScalarType::Long);
    check_device("span", *p.span, p.query);
  }
  if (p.query_start) {
    check_shape("query_start", *p.query_start, {p.batch}, "[B]");
    check_dtype("query_start", *p.query_start, ScalarType::Long);
    check_device("query_start", *p.query_start, p.query);
  }
}

}  // namespace

std::ostream& operator<<(std::ostream& stream, const Shape& shape) {
  stream << "[";
  for (int64_t i = 0; i < shape.tensor.dim(); ++i)
    stream << (i ? ", " : "") << shape.tensor.size(i);
  return stream << "]";
}

Problem check_problem(AttentionArguments arguments) {
  Problem p{std::move(arguments)};
  const auto& [query, key, value, log_scale, key_mask, span, query_start, window, scale] =
      static_cast<const AttentionArguments&>(p);
  require(query.dim() == 4, "query must be [B, H, Tq, D], got ", Shape{query});
  require(key.dim() == 4, "key must be [B, Hkv, Tk, D], got ", Shape{key});
  require(value.dim() == 4, "value must be [B, Hkv, Tk, Dv], got ", Shape{value});
  p.dtype = dtype_of(query);
  p.batch = query.size(0);
  p.heads = query.size(1);
  p.key_heads = key.size(1);
  p.queries = query.size(2);
  p.keys = key.size(2);
  p.head_size = query.size(3);
  p.value_head_size = value.size(3);
  check_shape("key", key, {p.batch, p.key_heads, p.keys, p.head_size}, "[B, Hkv, Tk, D]");
  check_shape("value", value, {p.batch, p.key_heads, p.keys, p.value_head_size},
              "[B, Hkv, Tk, Dv]");
  require(p.key_heads > 0 && p.heads % p.key_heads == 0,
          "query's heads must be a multiple of key's heads, got ", p.heads, " and ", p.key_heads);
  for (const auto& [name, tensor] : {std::pair("key", &key), std::pair("value", &value)}) {
    check_dtype(name, *tensor, query.scalar_type());
    check_device(name, *tensor, query);
  }
  require(p.query_start.has_value() || p.queries <= p.keys,
          "query must not be longer than key without query_start, got Tq = ", p.queries,
          " and Tk = ", p.keys);
  require(window >= 0,
          "window must be 0 (none) or the number of keys that a query attends to, got ", window);
  require(std::isfinite(scale), "scale must be finite, got ", scale);
  check_log_scale(p);
  check_optional(p);
  return p;
}

void check_key_mask_to_encode(const Tensor& key_mask, int64_t keys) {
  require(key_mask.dim() == 2, "key_mask must be [B, keys], got ", Shape{key_mask});
  check_dtype("key_mask", key_mask, ScalarType::Bool);
  constexpr int64_t max_size = std::numeric_limits<int32_t>::max();
  require(keys >= 0 && keys <= max_size && key_mask.size(0) <= max_size,
          "batch and keys must be 0 to ", max_size, ", got ", key_mask.size(0), " and ", keys);
}

void check_backward(const Problem& p, const BackwardArguments& backward) {
  const auto& [grad_output, output, logsumexp, output_minus_initial_value] = backward;
  const auto check_rows = [&](const char* name, const Tensor& tensor) {
    check_shape(name, tensor, {p.batch, p.heads, p.queries, p.value_head_size}, "[B, H, Tq, Dv]");
    check_dtype(name, tensor, p.query.scalar_type());
    check_device(name, tensor, p.query);
  };
  check_rows("grad_output", grad_output);
  check_rows("output", output);
  check_shape("logsumexp", logsumexp, {p.batch, p.heads, p.queries}, "[B, H, Tq]");
  check_dtype("logsumexp", logsumexp, p.log_scale.scalar_type());
  check_device("logsumexp", logsumexp, p.query);
  if (output_minus_initial_value && output_minus_initial_value->numel() > 0)
    check_rows("output_minus_initial_value", *output_minus_initial_value);
}

}  // namespace zerotuning::ops
