// Tensors [batch, heads, rows, columns] whose memory order is [batch, rows, heads, columns]
// ("BTHD"): a model reshapes them to [batch, rows, heads × columns] without a copy.
#pragma once

#include "ops/problem.h"

namespace zerotuning::ops {

// The tensor, or a copy, with unit stride in the last dimension, which the kernels need.
inline Tensor with_contiguous_rows(const Tensor& t) {
  return t.stride(3) == 1 || t.size(3) == 1 ? t : aten::clone_contiguous(t);
}

// An uninitialised tensor of three or four dimensions.
inline Tensor empty_bthd(const Tensor& like, const Sizes& sizes, ScalarType type) {
  const int64_t columns = sizes.size() == 4 ? sizes[3] : 1, row = sizes[1] * columns;
  Sizes strides{sizes[2] * row, columns, row, 1};
  strides.resize(sizes.size());
  return aten::empty_strided(like, sizes, strides, type);
}

inline bool is_bthd(const Tensor& t) {
  const int64_t columns = t.dim() == 4 ? t.size(3) : 1;
  return (t.dim() == 3 || t.stride(3) == 1) && t.stride(1) == columns &&
         t.stride(2) == columns * t.size(1) && t.stride(0) == columns * t.size(1) * t.size(2);
}

// The first `columns` columns of a 4-d tensor, or a 3-d tensor; a copy unless the memory order is
// BTHD already.
inline Tensor to_bthd(const Tensor& tensor, int64_t columns) {
  const Tensor view =
      tensor.dim() == 4 && tensor.size(3) > columns ? aten::narrow(tensor, 3, 0, columns) : tensor;
  if (is_bthd(view)) return view;
  Sizes sizes(view.sizes().begin(), view.sizes().end());
  const Tensor copy = empty_bthd(view, sizes, view.scalar_type());
  aten::copy_(copy, view);
  return copy;
}

inline Tensor new_output(const Problem& p) {
  return empty_bthd(p.query, {p.batch, p.heads, p.queries, p.value_head_size},
                    p.query.scalar_type());
}

// A view [batch, rows, heads, columns] of [batch, heads, rows, columns], or back.
inline Tensor transposed(const Tensor& t) {
  return aten::as_strided(t, {t.size(0), t.size(2), t.size(1), t.size(3)},
                          {t.stride(0), t.stride(2), t.stride(1), t.stride(3)});
}

inline bool has_empty_output(const Problem& p) {
  return p.batch == 0 || p.heads == 0 || p.queries == 0;
}

}  // namespace zerotuning::ops
