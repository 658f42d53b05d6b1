// zerotuning::decode_attention on the CPU. One query is computed by our own kernel, or by torch's
// flash kernel with the heads of a key head as rows of one query. Several queries are computed as
// in zerotuning::attention.
#include <algorithm>

#include "attention/flash_cpu.h"
#include "ops/attention_cpu.h"
#include "ops/cpu/flash_arguments.h"
#include "ops/cpu/pieces.h"
#include "ops/layout.h"

namespace zerotuning::ops {
namespace {

using namespace cpu;

// Our decode kernel reads each key once for the heads of a key head. If every head has a key head
// of its own, torch's kernel is faster above max_unshared_numbers, except in float16.
bool prefers_decode_kernel(const Problem& p) {
  constexpr int64_t max_unshared_numbers = int64_t{512} * 128;  // of a head's keys
  const int64_t columns = padded_columns(p);
  const bool shared = p.heads > p.key_heads || p.dtype == attention::DType::float16;
  return attention::decode_kernel(p.dtype) && columns <= attention::flash_max_head_size &&
         (shared || p.keys * columns <= max_unshared_numbers);
}

Tensor decode_by_kernel(const Problem& p, const Geometry& geometry) {
  const Tensor output = new_output(p);
  const Tensor query = with_contiguous_rows(p.query), key = with_contiguous_rows(p.key),
               value = with_contiguous_rows(p.value);
  const auto arguments = flash_arguments(p, geometry, query, key, value, output);
  // A thread gets as many rows as outweigh the time to wake the thread.
  constexpr int64_t thread_numbers = 32768;
  const int64_t row_numbers = p.keys * (p.head_size + p.value_head_size);
  const int64_t grain = std::max<int64_t>(1, thread_numbers / std::max<int64_t>(1, row_numbers));
  const attention::DecodeKernel kernel = attention::decode_kernel(p.dtype);
  torch::stable::parallel_for(0, p.batch * p.heads, grain,
                              [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
  return output;
}

}  // namespace

Tensor decode_attention_cpu(const Problem& p) {
  if (p.queries != 1 || has_empty_output(p)) return std::get<0>(attention_cpu(p));
  const Geometry geometry = read_geometry(p);
  if (prefers_decode_kernel(p)) return decode_by_kernel(p, geometry);
  const int64_t columns = std::max(p.head_size, p.value_head_size),
                group_size = p.heads / p.key_heads;
  const Tensor key = with_columns(p.key, columns), value = with_columns(p.value, columns);
  const Tensor query = with_columns(p.query, columns);
  const Tensor output = new_output(p);
  for (const SampleGroup& group : group_samples(p, geometry)) {
    const int64_t samples = group.end - group.begin;
    const Tensor bias = make_bias(p, geometry, group.begin, group.end, group.query_start + 1);
    const Piece piece = attention::decompose(1, group.query_start, p.window).front();
    // The heads that share a key head become the rows of one query.
    const Tensor rows = rows_of(query, group, 0, 1, false);
    const Tensor packed =
        aten::as_strided(rows, {samples, p.key_heads, group_size, columns},
                         {rows.stride(0), group_size * rows.stride(1), rows.stride(1), 1});
    const Tensor keys_bias = aten::narrow(bias, 3, piece.key_begin, piece.key_end);
    const int64_t width = bias.size(3);
    const Tensor packed_bias = aten::as_strided(
        keys_bias, {samples, p.key_heads, group_size, piece.key_end - piece.key_begin},
        {bias.size(0) == 1 ? 0 : p.heads * width, group_size * width, width, 1});
    auto [part, logsumexp] = aten::flash_attention_cpu(
        packed, rows_of(key, group, piece.key_begin, piece.key_end, false),
        rows_of(value, group, piece.key_begin, piece.key_end, false), false, packed_bias, p.scale);
    const Tensor target = rows_of(output, group, 0, 1, false);
    aten::copy_(
        aten::as_strided(target, {samples, p.key_heads, group_size, p.value_head_size},
                         {target.stride(0), group_size * target.stride(1), target.stride(1), 1}),
        aten::narrow(part, 3, 0, p.value_head_size));
  }
  return output;
}

}  // namespace zerotuning::ops
