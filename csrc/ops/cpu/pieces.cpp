// Builds the groups of samples, and the views and arrays of pieces (pieces.h).
#include "ops/cpu/pieces.h"

#include <algorithm>

#include "ops/layout.h"

namespace zerotuning::ops::cpu {

std::vector<SampleGroup> group_samples(const Problem& p, const Geometry& geometry) {
  if (geometry.same_query_start()) return {{0, p.batch, geometry.query_start[0]}};
  std::vector<SampleGroup> groups;
  for (int64_t b = 0; b < p.batch; ++b) groups.push_back({b, b + 1, geometry.query_start[b]});
  return groups;
}

bool is_whole_call(const SampleGroup& group, const std::vector<Piece>& pieces, const Problem& p) {
  return pieces.size() == 1 && group.begin == 0 && group.end == p.batch;
}

int64_t padded_columns(const Problem& p) { return std::max(p.head_size, p.value_head_size); }

Tensor with_columns(const Tensor& tensor, int64_t columns) {
  return aten::pad_columns(with_contiguous_rows(tensor), columns);
}

Tensor rows_of(const Tensor& tensor, const SampleGroup& group, int64_t begin, int64_t end,
               bool reversed) {
  Tensor view = tensor;
  if (group.end - group.begin < view.size(0)) view = aten::narrow(view, 0, group.begin, group.end);
  if (end - begin < view.size(2)) view = aten::narrow(view, 2, begin, end);
  return reversed ? aten::flip(view, {2}) : view;
}

Tensor queries_of(const Tensor& tensor, const SampleGroup& group, const Piece& piece) {
  return rows_of(tensor, group, piece.query_begin, piece.query_end, piece.reversed);
}

Tensor keys_of(const Tensor& tensor, const SampleGroup& group, const Piece& piece) {
  return rows_of(tensor, group, piece.key_begin, piece.key_end, piece.reversed);
}

// Calls as few of torch's operators as possible: these calls limit the speed of short sequences.
Tensor bias_of(const Tensor& bias, const SampleGroup& group, const Piece& piece, int64_t heads) {
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

Strided4<const void> const_array(const Tensor& t, bool reversed) {
  Strided4<const void> array{t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
  if (!reversed) return array;
  const int64_t last = t.size(2) - 1, bytes = static_cast<int64_t>(t.element_size());
  array.data = static_cast<const char*>(array.data) + last * array.row_stride * bytes;
  array.row_stride = -array.row_stride;
  return array;
}

Strided4<void> mutable_array(const Tensor& t, int64_t batch, int64_t row) {
  const int64_t offset = batch * t.stride(0) + row * t.stride(2);
  return {
      static_cast<char*>(t.mutable_data_ptr()) + offset * static_cast<int64_t>(t.element_size()),
      t.stride(0), t.stride(1), t.stride(2)};
}

}  // namespace zerotuning::ops::cpu
