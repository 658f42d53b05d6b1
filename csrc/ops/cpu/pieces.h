// The groups of samples and the pieces (attention/pieces.h) that torch's flash kernel computes, as
// views of tensors and as arrays, for forward, backward and decode on the CPU.
#pragma once

#include <vector>

#include "attention/arguments.h"
#include "attention/pieces.h"
#include "ops/cpu/geometry.h"
#include "ops/problem.h"

namespace zerotuning::ops::cpu {

using attention::Piece;
using attention::Strided4;

// Samples [begin, end) with the same query_start. The samples of a group are computed together.
struct SampleGroup {
  int64_t begin, end, query_start;
};
std::vector<SampleGroup> group_samples(const Problem& problem, const Geometry& geometry);

// Whether one piece computes the whole call.
bool is_whole_call(const SampleGroup& group, const std::vector<Piece>& pieces,
                   const Problem& problem);

// Torch's kernel needs unit stride in the last dimension, and one head size for query, key and
// value: the larger of the call's two head sizes.
int64_t padded_columns(const Problem& problem);
// The tensor with unit stride in the last dimension and zeros appended to its rows.
Tensor with_columns(const Tensor& tensor, int64_t columns);

// A view of the group's samples and rows [begin, end), last row first if reversed.
Tensor rows_of(const Tensor& tensor, const SampleGroup& group, int64_t begin, int64_t end,
               bool reversed);
Tensor queries_of(const Tensor& tensor, const SampleGroup& group, const Piece& piece);
Tensor keys_of(const Tensor& tensor, const SampleGroup& group, const Piece& piece);

// A view of make_bias's result for a piece's keys, [samples, heads, queries, keys]; equal for all
// queries (stride 0).
Tensor bias_of(const Tensor& bias, const SampleGroup& group, const Piece& piece, int64_t heads);

// A [batch, heads, rows(, columns)] tensor as an array to read, last row first if reversed.
Strided4<const void> const_array(const Tensor& tensor, bool reversed = false);
// The tensor from sample `batch` and row `row` on, as an array to write.
Strided4<void> mutable_array(const Tensor& tensor, int64_t batch = 0, int64_t row = 0);

}  // namespace zerotuning::ops::cpu
