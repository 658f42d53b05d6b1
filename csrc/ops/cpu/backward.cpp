// zerotuning::attention_backward on the CPU. Torch's flash kernel computes the gradients of the
// pieces of attention/pieces.h, given the output and log-sum-exp of all keys. Our own kernel
// computes the gradient of log_scale.
#include <limits>

#include "attention/cpu_kernels.h"
#include "ops/attention_cpu.h"
#include "ops/cpu/pieces.h"
#include "ops/layout.h"

namespace zerotuning::ops {
namespace {

using namespace cpu;

// Torch's backward kernel computes exp(logit - logsumexp). For rows that attend to no key, all
// logits are -inf: a logsumexp of +inf makes the result 0, and -inf would make the result NaN.
template <typename Real>
void replace_minus_infinity(const Tensor& logsumexp) {
  Real* data = logsumexp.mutable_data_ptr<Real>();
  const Real infinity = std::numeric_limits<Real>::infinity();
  for (int64_t i = 0; i < logsumexp.numel(); ++i) {
    if (data[i] == -infinity) data[i] = infinity;
  }
}

Tensor logsumexp_for_torch(const Problem& p, const Tensor& logsumexp) {
  const Tensor rows = to_bthd(logsumexp, 1);
  if (!p.key_mask) return rows;
  const Tensor copy = aten::clone(rows);
  if (p.dtype == attention::DType::float64) {
    replace_minus_infinity<double>(copy);
  } else {
    replace_minus_infinity<float>(copy);
  }
  return copy;
}

Tensor log_scale_gradient(const Problem& p, const Geometry& geometry, const Tensor& grad_output,
                          const Tensor& output, const Tensor& logsumexp) {
  const Tensor query = with_columns(p.query, p.head_size), key = with_columns(p.key, p.head_size),
               value = with_columns(p.value, p.value_head_size),
               log_scale = aten::contiguous(p.log_scale);
  const int64_t chunks = attention::log_scale_gradient_chunks(p.queries);
  std::vector<double> partial(static_cast<size_t>(p.batch * p.heads * chunks));
  const attention::LogScaleGradientArguments arguments{
      .dtype = p.dtype,
      .batch = p.batch,
      .heads = p.heads,
      .heads_per_key_head = p.heads / p.key_heads,
      .query_rows = p.queries,
      .head_size = p.head_size,
      .value_head_size = p.value_head_size,
      .window = p.window,
      .scale = p.scale,
      .query = const_array(query),
      .key = const_array(key),
      .value = const_array(value),
      .output = const_array(output),
      .grad_output = const_array(grad_output),
      .logsumexp = const_array(logsumexp),
      .log_scale = log_scale.const_data_ptr(),
      .log_scale_batch_stride = p.log_scale_per_sample() ? p.heads : 0,
      .key_mask = geometry.key_mask,
      .key_mask_batch_stride = p.keys,
      .span = geometry.span.data(),
      .query_start = geometry.query_start.data(),
      .partial = partial.data(),
  };
  const auto& kernel = attention::cpu_kernels().log_scale_gradient;
  torch::stable::parallel_for(0, static_cast<int64_t>(partial.size()), 1,
                              [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });

  Tensor gradient = aten::zeros_like(log_scale);
  for (int64_t item = 0; item < static_cast<int64_t>(partial.size()); ++item) {
    const int64_t head = item / chunks % p.heads, batch = item / chunks / p.heads;
    const int64_t target = p.log_scale_per_sample() ? batch * p.heads + head : head;
    if (p.dtype == attention::DType::float64) {
      gradient.mutable_data_ptr<double>()[target] += partial[item];
    } else {
      gradient.mutable_data_ptr<float>()[target] += static_cast<float>(partial[item]);
    }
  }
  return gradient;
}

struct Gradients {
  Tensor query, key, value;
};

Gradients backward_piece(const Problem& p, const SampleGroup& group, const Piece& piece,
                         const Tensor& query, const Tensor& key, const Tensor& value,
                         const Tensor& bias, const Tensor& grad_output, const Tensor& output,
                         const Tensor& logsumexp) {
  auto [grad_query, grad_key, grad_value] = aten::flash_attention_cpu_backward(
      queries_of(grad_output, group, piece), queries_of(query, group, piece),
      keys_of(key, group, piece), keys_of(value, group, piece), queries_of(output, group, piece),
      queries_of(logsumexp, group, piece), piece.causal, bias_of(bias, group, piece, p.heads),
      p.scale);
  return {grad_query, grad_key, grad_value};
}

// Adds a piece's gradient, last row first if reversed, to rows [begin, ...) of the whole gradient.
void add_rows(const Problem& p, const SampleGroup& group, const Tensor& sum, int64_t begin,
              const Tensor& part, bool reversed) {
  const attention::AddArguments arguments{
      .dtype = p.dtype,
      .batch = part.size(0),
      .heads = part.size(1),
      .rows = part.size(2),
      .columns = part.size(3),
      .sum = mutable_array(sum, group.begin, begin),
      .part = const_array(part, reversed),
  };
  const auto& kernel = attention::cpu_kernels().add;
  torch::stable::parallel_for(0, part.size(0) * part.size(1) * part.size(2), 64,
                              [&](int64_t first, int64_t last) { kernel(arguments, first, last); });
}

void add_piece(const Problem& p, const SampleGroup& group, const Piece& piece, const Gradients& sum,
               const Gradients& part) {
  add_rows(p, group, sum.query, piece.query_begin, part.query, piece.reversed);
  add_rows(p, group, sum.key, piece.key_begin, part.key, piece.reversed);
  add_rows(p, group, sum.value, piece.key_begin, part.value, piece.reversed);
}

// For short sequences, and for few queries of small heads, torch's 16-bit backward kernel spends
// more time on packing its tiles than on products. There float32 is faster, conversions included,
// and more exact. Measured on a processor with AMX; without AMX the 16-bit kernel is slower still.
constexpr int64_t max_float32_key_numbers = int64_t{128} * 128, max_float32_queries = 128;
constexpr int64_t max_few_queries_head_size = 64;

bool prefers_float32_backward(const Problem& p) {
  const bool is_16_bit =
      p.dtype == attention::DType::bfloat16 || p.dtype == attention::DType::float16;
  const int64_t columns = padded_columns(p);
  const bool short_sequence = p.keys * columns <= max_float32_key_numbers;
  const bool few_queries = p.queries <= max_float32_queries && columns <= max_few_queries_head_size;
  return is_16_bit && (short_sequence || few_queries);
}

// A copy in another dtype that keeps the layout of rows and heads.
Tensor converted(const Tensor& tensor, ScalarType type) {
  const Tensor copy =
      empty_bthd(tensor, {tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)}, type);
  aten::copy_(copy, tensor);
  return copy;
}

FourTensors float32_backward(const Problem& p, const BackwardArguments& backward) {
  Problem float32_problem = p;
  float32_problem.query = converted(p.query, ScalarType::Float);
  float32_problem.key = converted(p.key, ScalarType::Float);
  float32_problem.value = converted(p.value, ScalarType::Float);
  float32_problem.dtype = attention::DType::float32;
  auto [query, key, value, log_scale] =
      attention_backward_cpu(float32_problem, {converted(backward.grad_output, ScalarType::Float),
                                               converted(backward.output, ScalarType::Float),
                                               backward.logsumexp, std::nullopt});
  const ScalarType type = p.query.scalar_type();
  return {converted(query, type), converted(key, type), converted(value, type), log_scale};
}

}  // namespace

FourTensors attention_backward_cpu(const Problem& p, const BackwardArguments& backward) {
  if (prefers_float32_backward(p)) return float32_backward(p, backward);
  const auto& [grad_output, output, logsumexp, output_minus_initial_value] = backward;
  const int64_t columns = padded_columns(p);
  const Tensor query = with_columns(p.query, columns), key = with_columns(p.key, columns),
               value = with_columns(p.value, columns);
  if (has_empty_output(p)) {
    return {aten::zeros_like(p.query), aten::zeros_like(p.key), aten::zeros_like(p.value),
            aten::zeros_like(p.log_scale)};
  }
  const Geometry geometry = read_geometry(p);
  const Tensor sums = logsumexp_for_torch(p, logsumexp);
  const Tensor grad_rows = with_columns(grad_output, p.value_head_size),
               output_rows = with_columns(output, p.value_head_size);
  const Tensor grad_log_scale = log_scale_gradient(p, geometry, grad_rows, output_rows, sums);
  const Tensor grad_padded = with_columns(grad_rows, columns),
               output_padded = with_columns(output_rows, columns);

  std::optional<Gradients> sum;
  for (const SampleGroup& group : group_samples(p, geometry)) {
    const int64_t keys = group.query_start + p.queries;
    const Tensor bias = make_bias(p, geometry, group.begin, group.end, keys);
    const auto pieces = attention::decompose(p.queries, group.query_start, p.window);
    for (const Piece& piece : pieces) {
      const Gradients part = backward_piece(p, group, piece, query, key, value, bias, grad_padded,
                                            output_padded, sums);
      if (is_whole_call(group, pieces, p) && piece.key_end - piece.key_begin == p.keys) {
        sum = part;
        break;
      }
      if (!sum)
        sum = Gradients{aten::zeros_like(query), aten::zeros_like(key), aten::zeros_like(value)};
      add_piece(p, group, piece, *sum, part);
    }
  }
  return {to_bthd(sum->query, p.head_size), to_bthd(sum->key, p.head_size),
          to_bthd(sum->value, p.value_head_size), grad_log_scale};
}

}  // namespace zerotuning::ops
