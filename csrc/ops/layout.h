// Tensors laid out with heads inside rows: [batch, heads, rows, columns] whose memory is [batch,
// rows, heads, columns], which a model reshapes to [batch, rows, heads × columns] freely.
#pragma once

#include "ops/problem.h"

namespace zerotuning::ops {

// The kernels want unit stride in the last dimension.
inline Tensor unit_stride(const Tensor& t) {
  return t.stride(3) == 1 || t.size(3) == 1 ? t : aten::contiguous(t);
}

inline Tensor new_rows(const Tensor& like, const Sizes& sizes, ScalarType type) {
  const int64_t columns = sizes.size() == 4 ? sizes[3] : 1, row = sizes[1] * columns;
  Sizes strides{sizes[2] * row, columns, row, 1};
  strides.resize(sizes.size());
  return aten::empty_strided(like, sizes, strides, type);
}

inline bool has_row_layout(const Tensor& t) {
  const int64_t columns = t.dim() == 4 ? t.size(3) : 1;
  return (t.dim() == 3 || t.stride(3) == 1) && t.stride(1) == columns &&
         t.stride(2) == columns * t.size(1) && t.stride(0) == columns * t.size(1) * t.size(2);
}

// The first `columns` columns (4-d), copied only if they are not laid out so.
inline Tensor in_row_layout(const Tensor& tensor, int64_t columns) {
  const Tensor view =
      tensor.dim() == 4 && tensor.size(3) > columns ? aten::narrow(tensor, 3, 0, columns) : tensor;
  if (has_row_layout(view)) return view;
  Sizes sizes(view.sizes().begin(), view.sizes().end());
  const Tensor copy = new_rows(view, sizes, view.scalar_type());
  aten::copy_(copy, view);
  return copy;
}

inline Tensor new_output(const Problem& p) {
  return new_rows(p.query, {p.batch, p.heads, p.queries, p.value_head_size}, p.query.scalar_type());
}

// [batch, heads, rows, columns] as [batch, rows, heads, columns], or back.
inline Tensor transposed(const Tensor& t) {
  return aten::as_strided(t, {t.size(0), t.size(2), t.size(1), t.size(3)},
                          {t.stride(0), t.stride(2), t.stride(1), t.stride(3)});
}

inline bool empty(const Problem& p) { return p.batch == 0 || p.heads == 0 || p.queries == 0; }

}  // namespace zerotuning::ops
