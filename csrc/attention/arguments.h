// Parameter structs of the attention kernels: raw pointers, sizes and strides, no framework.
#pragma once

#include <cstdint>
#include <type_traits>

#include "attention/number_types.h"

namespace zerotuning::attention {

// A [batch, heads, rows, columns] array: Strided4<const void> is read, Strided4<void> is written.
// Strides count elements; the stride of the last dimension is 1.
template <typename T>
struct Strided4 {
  T* data;
  int64_t batch_stride, head_stride, row_stride;

  // The first element of a row: const Number* in an array that is read.
  template <typename Number>
  ZEROTUNING_INLINE auto* row(int64_t batch, int64_t head, int64_t row) const {
    using Element = std::conditional_t<std::is_const_v<T>, const Number, Number>;
    return static_cast<Element*>(data) + batch * batch_stride + head * head_stride +
           row * row_stride;
  }

  template <typename U = T, typename = std::enable_if_t<!std::is_const_v<U>>>
  operator Strided4<const U>() const {
    return {data, batch_stride, head_stride, row_stride};
  }
};

// Merges two attentions over disjoint keys by their log-sum-exp, in place
// (docs/how-it-works.md, "CUDA prefill by exclusion and merge"):
//   m = max(lse_a, lse_b);  o = (e^{lse_a-m} o_a + e^{lse_b-m} o_b) / (e^{lse_a-m} + e^{lse_b-m})
//   lse = m + log(e^{lse_a-m} + e^{lse_b-m})
// A part without keys has lse = -inf; its output is ignored.
struct MergeArguments {
  DType dtype;  // of both outputs; lse is float64 for float64, else float32
  int64_t batch, heads, rows, columns;
  Strided4<void> output;     // [batch, heads, rows, columns], updated in place
  Strided4<void> logsumexp;  // [batch, heads, rows, 1], updated in place
  Strided4<const void> part_output, part_logsumexp;
};

// Adds one array to another in place: the gradients of a piece to the gradients of all keys.
struct AddArguments {
  DType dtype;
  int64_t batch, heads, rows, columns;
  Strided4<void> sum;  // [batch, heads, rows, columns], updated in place
  Strided4<const void> part;
};

// The gradient of the loss with respect to log_scale (docs/how-it-works.md, "The idea"): for each
// query that attends to a scaled key j
//   a_j = exp(scale q·k_j + log_scale - lse);   dlog_scale += a_j (do·v_j - do·o)
struct LogScaleGradientArguments {
  DType dtype;
  int64_t batch, heads, heads_per_key_head, query_rows, head_size, value_head_size;
  int64_t window;  // 0 = every earlier key
  double scale;
  Strided4<const void> query, key, value, output, grad_output;
  Strided4<const void> logsumexp;  // [batch, heads, rows, 1]; float64 for float64, else float32
  const void* log_scale;  // [batch, heads], log_scale_batch_stride 0 for one [heads] vector; dtype
                          // as logsumexp
  int64_t log_scale_batch_stride;
  const bool* key_mask;  // [batch, keys] or null
  int64_t key_mask_batch_stride;
  const int64_t* span;         // [batch, 2]: scaled keys [first, end), contiguous
  const int64_t* query_start;  // [batch]: position of query row 0 among the keys
  double* partial;  // [batch, heads, chunks], chunks = log_scale_gradient_chunks(query_rows)
};

constexpr int64_t log_scale_gradient_chunk_rows = 256;
constexpr int64_t log_scale_gradient_chunks(int64_t query_rows) {
  return (query_rows + log_scale_gradient_chunk_rows - 1) / log_scale_gradient_chunk_rows;
}

}  // namespace zerotuning::attention
