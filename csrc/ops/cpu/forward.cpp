// zerotuning::attention on the CPU. Our own kernels run where the processor has AVX-512
// (attention/flash_cpu.h). Elsewhere torch's flash kernel computes the pieces of
// attention/pieces.h, which are merged by their log-sum-exp.
#include <limits>

#include "attention/cpu_kernels.h"
#include "attention/flash_cpu.h"
#include "ops/attention_cpu.h"
#include "ops/cpu/flash_arguments.h"
#include "ops/cpu/pieces.h"
#include "ops/layout.h"

namespace zerotuning::ops {
namespace {

using namespace cpu;

template <typename Real>
void set_rows(const Tensor& logsumexp, int64_t sample, int64_t rows, Real value) {
  for (int64_t h = 0; h < logsumexp.size(1); ++h) {
    Real* row =
        logsumexp.mutable_data_ptr<Real>() + sample * logsumexp.stride(0) + h * logsumexp.stride(1);
    for (int64_t i = 0; i < rows; ++i) row[i * logsumexp.stride(2)] = value;
  }
}

// Writes the logsumexp of rows that attend to no key: -inf. Torch's kernel writes 0.
void mark_rows_without_keys(const Problem& p, const Geometry& geometry, const SampleGroup& group,
                            const Piece& piece, const Tensor& logsumexp) {
  if (!geometry.key_mask) return;
  const int64_t keys = piece.key_end - piece.key_begin, rows = piece.query_end - piece.query_begin;
  for (int64_t b = group.begin; b < group.end; ++b) {
    const bool* mask = geometry.key_mask + b * p.keys;
    int64_t padding = 0;  // number of keys before the first real key, in the piece's order
    while (padding < keys &&
           !mask[piece.reversed ? piece.key_end - 1 - padding : piece.key_begin + padding])
      ++padding;
    const int64_t without_keys = padding == keys ? rows
                                 : piece.causal  ? std::min(padding, rows)
                                                 : 0;
    if (logsumexp.scalar_type() == ScalarType::Double) {
      set_rows(logsumexp, b - group.begin, without_keys, -std::numeric_limits<double>::infinity());
    } else {
      set_rows(logsumexp, b - group.begin, without_keys, -std::numeric_limits<float>::infinity());
    }
  }
}

std::tuple<Tensor, Tensor> forward_piece(const Problem& p, const Geometry& geometry,
                                         const SampleGroup& group, const Piece& piece,
                                         const Tensor& query, const Tensor& key,
                                         const Tensor& value, const Tensor& bias) {
  auto [output, logsumexp] = aten::flash_attention_cpu(
      queries_of(query, group, piece), keys_of(key, group, piece), keys_of(value, group, piece),
      piece.causal, bias_of(bias, group, piece, p.heads), p.scale);
  mark_rows_without_keys(p, geometry, group, piece, logsumexp);
  return {output, logsumexp};
}

// Merges a piece's output into the whole output's rows of the piece's queries.
void merge_piece(const Problem& p, const SampleGroup& group, const Piece& piece,
                 const Tensor& output, const Tensor& logsumexp, const Tensor& part,
                 const Tensor& part_logsumexp) {
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

// Copies the output of the first piece of a block of queries, which covers all rows of the block.
void store_piece(const Problem& p, const SampleGroup& group, const Piece& piece,
                 const Tensor& output, const Tensor& logsumexp, const Tensor& part,
                 const Tensor& part_logsumexp) {
  const Tensor columns =
      part.size(3) > p.value_head_size ? aten::narrow(part, 3, 0, p.value_head_size) : part;
  aten::copy_(rows_of(output, group, piece.query_begin, piece.query_end, false), columns);
  aten::copy_(rows_of(logsumexp, group, piece.query_begin, piece.query_end, false), part_logsumexp);
}

Tensor new_logsumexp(const Problem& p) {
  return empty_bthd(p.query, {p.batch, p.heads, p.queries}, p.log_scale.scalar_type());
}

// With fewer queries, packing keys and values costs more time than tiles save.
int64_t min_tile_queries(const Problem& p) {
  return p.dtype == attention::DType::float32 ? 48 : 12;
}

bool supports_tiles(const Problem& p) {
  return attention::flash_kernel(p.dtype) && p.scale > 0 &&
         std::max(p.head_size, p.value_head_size) <= attention::flash_max_head_size;
}

std::tuple<Tensor, Tensor> attention_by_tiles(const Problem& p, const Geometry& geometry) {
  const attention::FlashKernel& kernel = *attention::flash_kernel(p.dtype);
  const Tensor output = new_output(p), logsumexp = new_logsumexp(p);
  const Tensor query = with_contiguous_rows(p.query), key = with_contiguous_rows(p.key),
               value = with_contiguous_rows(p.value);
  attention::FlashArguments a = flash_arguments(p, geometry, query, key, value, output);
  a.logsumexp = mutable_array(logsumexp);
  const Tensor packed = aten::empty(p.query, Sizes{kernel.packed_bytes(a)}, ScalarType::Byte);
  a.packed = packed.mutable_data_ptr();
  // A thread gets as many items as outweigh the time to wake the thread.
  constexpr int64_t pack_grain = 16, grain = 8;
  torch::stable::parallel_for(0, kernel.pack_items(a), pack_grain,
                              [&](int64_t begin, int64_t end) { kernel.pack(a, begin, end); });
  torch::stable::parallel_for(0, kernel.items(a), grain,
                              [&](int64_t begin, int64_t end) { kernel.attend(a, begin, end); });
  return {output, logsumexp};
}

}  // namespace

std::tuple<Tensor, Tensor> attention_cpu(const Problem& p, CpuRoute route) {
  if (has_empty_output(p)) return {new_output(p), new_logsumexp(p)};
  const Geometry geometry = read_geometry(p);
  require(route != CpuRoute::tiles || supports_tiles(p),
          "the tiles route does not support this call");
  if (route == CpuRoute::automatic && supports_tiles(p) && p.queries >= min_tile_queries(p))
    route = CpuRoute::tiles;
  if (route == CpuRoute::tiles) return attention_by_tiles(p, geometry);
  const int64_t columns = padded_columns(p);
  const Tensor query = with_columns(p.query, columns), key = with_columns(p.key, columns),
               value = with_columns(p.value, columns);
  std::optional<Tensor> output, logsumexp;
  for (const SampleGroup& group : group_samples(p, geometry)) {
    const Tensor bias =
        make_bias(p, geometry, group.begin, group.end, group.query_start + p.queries);
    const auto pieces = attention::decompose(p.queries, group.query_start, p.window);
    for (const Piece& piece : pieces) {
      auto [part, part_logsumexp] =
          forward_piece(p, geometry, group, piece, query, key, value, bias);
      if (is_whole_call(group, pieces, p)) {
        return {to_bthd(part, p.value_head_size), to_bthd(part_logsumexp, 1)};
      }
      if (!output) output = new_output(p), logsumexp = new_logsumexp(p);
      (piece.first ? store_piece : merge_piece)(p, group, piece, *output, *logsumexp, part,
                                                part_logsumexp);
    }
  }
  return {*output, *logsumexp};
}

}  // namespace zerotuning::ops
