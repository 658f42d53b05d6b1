// Forward and backward on the CPU: our own forward kernels where there are any, else the pieces of
// attention/pieces.h through torch's flash kernel, merged by log-sum-exp.
#include "ops/attention_cpu.h"

#include <cmath>
#include <limits>

#include "attention/cpu_kernels.h"
#include "attention/flash_cpu.h"
#include "attention/pieces.h"
#include "ops/geometry_cpu.h"
#include "ops/layout.h"

namespace zerotuning::ops {
namespace {

using attention::Piece;

// Samples that share one query_start, computed together.
struct Group {
  int64_t begin, end, query_start;
};

std::vector<Group> group_samples(const Problem& p, const Geometry& geometry) {
  if (geometry.same_query_start()) return {{0, p.batch, geometry.query_start[0]}};
  std::vector<Group> groups;
  for (int64_t b = 0; b < p.batch; ++b) groups.push_back({b, b + 1, geometry.query_start[b]});
  return groups;
}

// The flash kernel wants unit stride in the last dimension and one head size for query, key and
// value.
Tensor to_kernel(const Tensor& tensor, int64_t columns) {
  return aten::pad_columns(unit_stride(tensor), columns);
}

// The views of one tensor that one piece works on: samples of the group, rows [begin, end) of
// dimension 2.
Tensor piece_rows(const Tensor& tensor, const Group& group, int64_t begin, int64_t end,
                  bool reversed) {
  Tensor view = tensor;
  if (group.end - group.begin < view.size(0)) view = aten::narrow(view, 0, group.begin, group.end);
  if (end - begin < view.size(2)) view = aten::narrow(view, 2, begin, end);
  return reversed ? aten::flip(view, {2}) : view;
}

// The bias of the piece's keys, the same for every query (stride 0). As few calls of torch's
// operators as can be: they are what a short sequence spends its time on.
Tensor piece_bias(const Tensor& bias, const Group& group, const Piece& piece, int64_t heads) {
  const Tensor keys = piece.reversed
                          ? aten::flip(aten::narrow(bias, 3, piece.key_begin, piece.key_end), {3})
                          : bias;
  const int64_t width = keys.size(3);
  return aten::as_strided(keys,
                          {group.end - group.begin, heads, piece.query_end - piece.query_begin,
                           piece.key_end - piece.key_begin},
                          {bias.size(0) == 1 ? 0 : heads * width, width, 0, 1},
                          piece.reversed ? 0 : piece.key_begin);
}

template <typename Real>
void set_rows(const Tensor& logsumexp, int64_t sample, int64_t rows, Real value) {
  for (int64_t h = 0; h < logsumexp.size(1); ++h) {
    Real* row =
        logsumexp.mutable_data_ptr<Real>() + sample * logsumexp.stride(0) + h * logsumexp.stride(1);
    for (int64_t i = 0; i < rows; ++i) row[i * logsumexp.stride(2)] = value;
  }
}

// torch's kernel gives logsumexp 0 to a row that sees no key; the log-sum-exp of nothing is -inf.
void mark_blind_rows(const Problem& p, const Geometry& geometry, const Group& group,
                     const Piece& piece, const Tensor& logsumexp) {
  if (!geometry.key_mask) return;
  const int64_t keys = piece.key_end - piece.key_begin, rows = piece.query_end - piece.query_begin;
  for (int64_t b = group.begin; b < group.end; ++b) {
    const bool* mask = geometry.key_mask + b * p.keys;
    int64_t hidden = 0;  // leading keys, in the piece's order, that are padding
    while (hidden < keys &&
           !mask[piece.reversed ? piece.key_end - 1 - hidden : piece.key_begin + hidden])
      ++hidden;
    const int64_t blind = hidden == keys ? rows : piece.causal ? std::min(hidden, rows) : 0;
    if (logsumexp.scalar_type() == ScalarType::Double) {
      set_rows(logsumexp, b - group.begin, blind, -std::numeric_limits<double>::infinity());
    } else {
      set_rows(logsumexp, b - group.begin, blind, -std::numeric_limits<float>::infinity());
    }
  }
}

std::tuple<Tensor, Tensor> forward_piece(const Problem& p, const Geometry& geometry,
                                         const Group& group, const Piece& piece,
                                         const Tensor& query, const Tensor& key,
                                         const Tensor& value, const Tensor& bias) {
  auto [output, logsumexp] = aten::flash_attention_cpu(
      piece_rows(query, group, piece.query_begin, piece.query_end, piece.reversed),
      piece_rows(key, group, piece.key_begin, piece.key_end, piece.reversed),
      piece_rows(value, group, piece.key_begin, piece.key_end, piece.reversed), piece.causal,
      piece_bias(bias, group, piece, p.heads), p.scale);
  mark_blind_rows(p, geometry, group, piece, logsumexp);
  return {output, logsumexp};
}

using attention::Strided4;

// A [batch, heads, rows(, columns)] tensor as the kernels read it.
Strided4<const void> const_array(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

Strided4<const void> const_array(const Tensor& t, bool reversed) {
  Strided4<const void> array = const_array(t);
  if (!reversed) return array;
  const int64_t last = t.size(2) - 1, size = static_cast<int64_t>(t.element_size());
  array.data = static_cast<const char*>(array.data) + last * array.row_stride * size;
  array.row_stride = -array.row_stride;
  return array;
}

// The tensor from sample `batch` and row `row` on, as the kernels write it.
Strided4<void> mutable_array(const Tensor& t, int64_t batch = 0, int64_t row = 0) {
  const int64_t offset = batch * t.stride(0) + row * t.stride(2);
  return {
      static_cast<char*>(t.mutable_data_ptr()) + offset * static_cast<int64_t>(t.element_size()),
      t.stride(0), t.stride(1), t.stride(2)};
}

// Merges one piece's part into the rows of the whole output that it belongs to.
void merge_piece(const Problem& p, const Group& group, const Piece& piece, const Tensor& output,
                 const Tensor& logsumexp, const Tensor& part, const Tensor& part_logsumexp) {
  const attention::MergeArguments arguments{
      .dtype = p.dtype,
      .batch = group.end - group.begin,
      .heads = p.heads,
      .rows = piece.query_end - piece.query_begin,
      .columns = p.value_head_size,
      .output = mutable_array(output, group.begin, piece.query_begin),
      .logsumexp = mutable_array(logsumexp, group.begin, piece.query_begin),
      .part_output = const_array(part, piece.reversed),
      .part_logsumexp = const_array(part_logsumexp, piece.reversed),
  };
  const auto& kernel = attention::cpu_kernels().merge;
  torch::stable::parallel_for(0, arguments.batch * arguments.heads * arguments.rows, 64,
                              [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

// Writes the first piece of a block of queries, which covers all its rows.
void store_piece(const Problem& p, const Group& group, const Piece& piece, const Tensor& output,
                 const Tensor& logsumexp, const Tensor& part, const Tensor& part_logsumexp) {
  const Tensor columns =
      part.size(3) > p.value_head_size ? aten::narrow(part, 3, 0, p.value_head_size) : part;
  aten::copy_(piece_rows(output, group, piece.query_begin, piece.query_end, false), columns);
  aten::copy_(piece_rows(logsumexp, group, piece.query_begin, piece.query_end, false),
              part_logsumexp);
}

bool whole(const Group& group, const std::vector<Piece>& pieces, const Problem& p) {
  return pieces.size() == 1 && group.begin == 0 && group.end == p.batch;
}

Tensor new_logsumexp(const Problem& p) {
  return new_rows(p.query, {p.batch, p.heads, p.queries}, p.log_scale.scalar_type());
}

// torch's backward kernel takes exp(logit - logsumexp); for rows that see no key, +inf makes that 0
// where -inf would make it NaN.
template <typename Real>
void replace_minus_infinity(const Tensor& logsumexp) {
  Real* data = logsumexp.mutable_data_ptr<Real>();
  const Real infinity = std::numeric_limits<Real>::infinity();
  for (int64_t i = 0; i < logsumexp.numel(); ++i) {
    if (data[i] == -infinity) data[i] = infinity;
  }
}

Tensor backward_logsumexp(const Problem& p, const Tensor& logsumexp) {
  const Tensor rows = in_row_layout(logsumexp, 1);
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
  const Tensor query = to_kernel(p.query, p.head_size), key = to_kernel(p.key, p.head_size),
               value = to_kernel(p.value, p.value_head_size), log_scale = aten::dense(p.log_scale);
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

Gradients backward_piece(const Problem& p, const Group& group, const Piece& piece,
                         const Tensor& query, const Tensor& key, const Tensor& value,
                         const Tensor& bias, const Tensor& grad_output, const Tensor& output,
                         const Tensor& logsumexp) {
  const auto queries = [&](const Tensor& t) {
    return piece_rows(t, group, piece.query_begin, piece.query_end, piece.reversed);
  };
  const auto keys = [&](const Tensor& t) {
    return piece_rows(t, group, piece.key_begin, piece.key_end, piece.reversed);
  };
  auto [grad_query, grad_key, grad_value] = aten::flash_attention_cpu_backward(
      queries(grad_output), queries(query), keys(key), keys(value), queries(output),
      queries(logsumexp), piece.causal, piece_bias(bias, group, piece, p.heads), p.scale);
  return {grad_query, grad_key, grad_value};
}

// Adds a piece's gradient, rows reversed or not, to rows [begin, ...) of the whole gradient.
void add_rows(const Problem& p, const Group& group, const Tensor& total, int64_t begin,
              const Tensor& part, bool reversed) {
  const attention::AddArguments arguments{
      .dtype = p.dtype,
      .batch = part.size(0),
      .heads = part.size(1),
      .rows = part.size(2),
      .columns = part.size(3),
      .sum = mutable_array(total, group.begin, begin),
      .part = const_array(part, reversed),
  };
  const auto& kernel = attention::cpu_kernels().add;
  torch::stable::parallel_for(0, part.size(0) * part.size(1) * part.size(2), 64,
                              [&](int64_t first, int64_t last) { kernel(arguments, first, last); });
}

void add_piece(const Problem& p, const Group& group, const Piece& piece, const Gradients& total,
               const Gradients& part) {
  add_rows(p, group, total.query, piece.query_begin, part.query, piece.reversed);
  add_rows(p, group, total.key, piece.key_begin, part.key, piece.reversed);
  add_rows(p, group, total.value, piece.key_begin, part.value, piece.reversed);
}

// torch's 16-bit backward kernel spends more on packing its tiles than short sequences, and few
// queries of small heads, have work: there float32 is faster, conversions included (and more
// exact). Measured on a processor with AMX; without it the 16-bit kernel is slower still.
constexpr int64_t largest_float32_keys = int64_t{128} * 128, most_float32_queries = 128;
constexpr int64_t largest_few_query_head = 64;

bool prefers_float32_backward(const Problem& p) {
  const bool half = p.dtype == attention::DType::bfloat16 || p.dtype == attention::DType::float16;
  const int64_t columns = std::max(p.head_size, p.value_head_size);
  const bool short_sequence = p.keys * columns <= largest_float32_keys;
  const bool few_queries = p.queries <= most_float32_queries && columns <= largest_few_query_head;
  return half && (short_sequence || few_queries);
}

// A copy in another dtype that keeps the layout of rows and heads.
Tensor converted(const Tensor& tensor, ScalarType type) {
  const Tensor copy =
      new_rows(tensor, {tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)}, type);
  aten::copy_(copy, tensor);
  return copy;
}

FourTensors float32_backward(const Problem& p, const BackwardArguments& backward) {
  Problem wide = p;
  wide.query = converted(p.query, ScalarType::Float);
  wide.key = converted(p.key, ScalarType::Float);
  wide.value = converted(p.value, ScalarType::Float);
  wide.dtype = attention::DType::float32;
  auto [query, key, value, log_scale] = attention_backward_cpu(
      wide, {converted(backward.grad_output, ScalarType::Float),
             converted(backward.output, ScalarType::Float), backward.logsumexp, std::nullopt});
  const ScalarType type = p.query.scalar_type();
  return {converted(query, type), converted(key, type), converted(value, type), log_scale};
}

// Fewer queries do not repay the packing of keys and values.
int64_t fewest_tile_queries(const Problem& p) {
  return p.dtype == attention::DType::float32 ? 48 : 12;
}

bool tiles_take(const Problem& p) {
  return attention::flash_kernel(p.dtype) && p.scale > 0 &&
         std::max(p.head_size, p.value_head_size) <= attention::flash_largest_head;
}

attention::FlashArguments flash_arguments(const Problem& p, const Geometry& geometry,
                                          const Tensor& query, const Tensor& key,
                                          const Tensor& value, const Tensor& output) {
  return {
      .batch = p.batch,
      .heads = p.heads,
      .key_heads = p.key_heads,
      .queries = p.queries,
      .keys = p.keys,
      .head_size = p.head_size,
      .value_head_size = p.value_head_size,
      .window = p.window,
      .scale = p.scale,
      .query = const_array(query),
      .key = const_array(key),
      .value = const_array(value),
      .output = mutable_array(output),
      .logsumexp = {},  // set by the callers that need it, and `packed` too
      .log_scale = p.log_scale.const_data_ptr<float>(),
      .log_scale_batch_stride = p.log_scale_per_sample() ? p.log_scale.stride(0) : 0,
      .log_scale_head_stride = p.log_scale.stride(p.log_scale.dim() - 1),
      .key_mask = geometry.key_mask,
      .span = geometry.span.data(),
      .query_start = geometry.query_start.data(),
      .packed = nullptr,
  };
}

std::tuple<Tensor, Tensor> attention_by_tiles(const Problem& p, const Geometry& geometry) {
  const attention::FlashKernel& kernel = *attention::flash_kernel(p.dtype);
  const Tensor output = new_output(p), logsumexp = new_logsumexp(p);
  const Tensor query = unit_stride(p.query), key = unit_stride(p.key), value = unit_stride(p.value);
  attention::FlashArguments a = flash_arguments(p, geometry, query, key, value, output);
  a.logsumexp = mutable_array(logsumexp);
  const Tensor packed = aten::empty(p.query, Sizes{kernel.packed_bytes(a)}, ScalarType::Byte);
  a.packed = packed.mutable_data_ptr();
  // As many items a thread as outweigh its being woken.
  constexpr int64_t pack_grain = 16, grain = 8;
  torch::stable::parallel_for(0, kernel.pack_items(a), pack_grain,
                              [&](int64_t begin, int64_t end) { kernel.pack(a, begin, end); });
  torch::stable::parallel_for(0, kernel.items(a), grain,
                              [&](int64_t begin, int64_t end) { kernel.attend(a, begin, end); });
  return {output, logsumexp};
}

}  // namespace

std::tuple<Tensor, Tensor> attention_cpu(const Problem& p, CpuRoute route) {
  if (empty(p)) return {new_output(p), new_logsumexp(p)};
  const Geometry geometry = read_geometry(p);
  require(route != CpuRoute::tiles || tiles_take(p), "the tiles route does not take this call");
  if (route == CpuRoute::automatic && tiles_take(p) && p.queries >= fewest_tile_queries(p))
    route = CpuRoute::tiles;
  if (route == CpuRoute::tiles) return attention_by_tiles(p, geometry);
  const int64_t columns = std::max(p.head_size, p.value_head_size);
  const Tensor query = to_kernel(p.query, columns), key = to_kernel(p.key, columns),
               value = to_kernel(p.value, columns);
  std::optional<Tensor> output, logsumexp;
  for (const Group& group : group_samples(p, geometry)) {
    const Tensor bias =
        make_bias(p, geometry, group.begin, group.end, group.query_start + p.queries);
    const auto pieces = attention::decompose(p.queries, group.query_start, p.window);
    for (const Piece& piece : pieces) {
      auto [part, part_logsumexp] =
          forward_piece(p, geometry, group, piece, query, key, value, bias);
      if (whole(group, pieces, p)) {
        return {in_row_layout(part, p.value_head_size), in_row_layout(part_logsumexp, 1)};
      }
      if (!output) output = new_output(p), logsumexp = new_logsumexp(p);
      (piece.first ? store_piece : merge_piece)(p, group, piece, *output, *logsumexp, part,
                                                part_logsumexp);
    }
  }
  return {*output, *logsumexp};
}

FourTensors attention_backward_cpu(const Problem& p, const BackwardArguments& backward) {
  if (prefers_float32_backward(p)) return float32_backward(p, backward);
  const auto& [grad_output, output, logsumexp, output_minus_initial_value] = backward;
  const int64_t columns = std::max(p.head_size, p.value_head_size);
  const Tensor query = to_kernel(p.query, columns), key = to_kernel(p.key, columns),
               value = to_kernel(p.value, columns);
  if (empty(p)) {
    return {aten::zeros_like(p.query), aten::zeros_like(p.key), aten::zeros_like(p.value),
            aten::zeros_like(p.log_scale)};
  }
  const Geometry geometry = read_geometry(p);
  const Tensor sums = backward_logsumexp(p, logsumexp);
  const Tensor grad_rows = to_kernel(grad_output, p.value_head_size),
               output_rows = to_kernel(output, p.value_head_size);
  const Tensor grad_log_scale = log_scale_gradient(p, geometry, grad_rows, output_rows, sums);
  const Tensor grad_padded = to_kernel(grad_rows, columns),
               output_padded = to_kernel(output_rows, columns);

  std::optional<Gradients> total;
  for (const Group& group : group_samples(p, geometry)) {
    const int64_t keys = group.query_start + p.queries;
    const Tensor bias = make_bias(p, geometry, group.begin, group.end, keys);
    const auto pieces = attention::decompose(p.queries, group.query_start, p.window);
    for (const Piece& piece : pieces) {
      const Gradients part = backward_piece(p, group, piece, query, key, value, bias, grad_padded,
                                            output_padded, sums);
      if (whole(group, pieces, p) && piece.key_end - piece.key_begin == p.keys) {
        total = part;
        break;
      }
      if (!total)
        total = Gradients{aten::zeros_like(query), aten::zeros_like(key), aten::zeros_like(value)};
      add_piece(p, group, piece, *total, part);
    }
  }
  return {in_row_layout(total->query, p.head_size), in_row_layout(total->key, p.head_size),
          in_row_layout(total->value, p.value_head_size), grad_log_scale};
}

// Where every query head has a key head of its own, torch's kernel is the faster one from some
// length on, but in float16.
bool decode_kernel_takes(const Problem& p) {
  constexpr int64_t most_alone = int64_t{512} * 128;  // numbers of a head's keys
  const int64_t columns = std::max(p.head_size, p.value_head_size);
  const bool shared = p.heads > p.key_heads || p.dtype == attention::DType::float16;
  return attention::decode_kernel(p.dtype) && columns <= attention::flash_largest_head &&
         (shared || p.keys * columns <= most_alone);
}

Tensor decode_by_kernel(const Problem& p, const Geometry& geometry) {
  const Tensor output = new_output(p);
  const Tensor query = unit_stride(p.query), key = unit_stride(p.key), value = unit_stride(p.value);
  const auto arguments = flash_arguments(p, geometry, query, key, value, output);
  // As many rows a thread as outweigh its being woken.
  constexpr int64_t thread_numbers = 32768;
  const int64_t row_numbers = p.keys * (p.head_size + p.value_head_size);
  const int64_t grain = std::max<int64_t>(1, thread_numbers / std::max<int64_t>(1, row_numbers));
  const attention::DecodeKernel kernel = attention::decode_kernel(p.dtype);
  torch::stable::parallel_for(0, p.batch * p.heads, grain,
                              [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
  return output;
}

Tensor decode_attention_cpu(const Problem& p) {
  if (p.queries != 1 || empty(p)) return std::get<0>(attention_cpu(p));
  const Geometry geometry = read_geometry(p);
  if (decode_kernel_takes(p)) return decode_by_kernel(p, geometry);
  const int64_t columns = std::max(p.head_size, p.value_head_size),
                group_size = p.heads / p.key_heads;
  const Tensor key = to_kernel(p.key, columns), value = to_kernel(p.value, columns);
  const Tensor query = to_kernel(p.query, columns);
  const Tensor output = new_output(p);
  for (const Group& group : group_samples(p, geometry)) {
    const int64_t samples = group.end - group.begin;
    const Tensor bias = make_bias(p, geometry, group.begin, group.end, group.query_start + 1);
    const Piece piece = attention::decompose(1, group.query_start, p.window).front();
    // The heads that share a key head become the rows of one query.
    const Tensor rows = piece_rows(query, group, 0, 1, false);
    const Tensor packed =
        aten::as_strided(rows, {samples, p.key_heads, group_size, columns},
                         {rows.stride(0), group_size * rows.stride(1), rows.stride(1), 1});
    const Tensor keys_bias = aten::narrow(bias, 3, piece.key_begin, piece.key_end);
    const int64_t width = bias.size(3);
    const Tensor packed_bias = aten::as_strided(
        keys_bias, {samples, p.key_heads, group_size, piece.key_end - piece.key_begin},
        {bias.size(0) == 1 ? 0 : p.heads * width, group_size * width, width, 1});
    auto [part, logsumexp] = aten::flash_attention_cpu(
        packed, piece_rows(key, group, piece.key_begin, piece.key_end, false),
        piece_rows(value, group, piece.key_begin, piece.key_end, false), false, packed_bias,
        p.scale);
    const Tensor target = piece_rows(output, group, 0, 1, false);
    aten::copy_(
        aten::as_strided(target, {samples, p.key_heads, group_size, p.value_head_size},
                         {target.stride(0), group_size * target.stride(1), target.stride(1), 1}),
        aten::narrow(part, 3, 0, p.value_head_size));
  }
  return output;
}

}  // namespace zerotuning::ops
