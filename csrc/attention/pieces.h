// How causal attention, with a window or without one, is cut into pieces that torch's flash kernel
// computes without a mask.
//
// That kernel supports two shapes: full (every query attends to every key) and causal, aligned at
// the top left (query r attends to keys 0..r). With queries at positions p, p + 1, ... of the keys
// and a sliding window of W keys, a block of c <= W queries at positions [a, a + c) attends to
//   - the block's own keys [a, a + c): causal;
//   - keys [a + c - W, a), to which every query of the block attends: full;
//   - keys [a - W + 1, a + c - W), to which query r attends from a + r - W + 1 on: causal after
//     queries and keys are reversed.
// The pieces of one query are merged by their log-sum-exp (MergeArguments). So there is no T × T
// and no window × window mask.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace zerotuning::attention {

struct Piece {
  int64_t query_begin, query_end;  // rows of the query tensor
  int64_t key_begin, key_end;      // rows of the key and value tensors
  bool causal;    // aligned at the top left; otherwise every query attends to every key
  bool reversed;  // the last query and the last key come first (causal only)
  bool first;     // the first piece of a block of queries: this piece covers all rows of the block
};

inline void append_block(std::vector<Piece>& pieces, int64_t row, int64_t count, int64_t position,
                         int64_t window) {
  // The oldest key that the first query attends to.
  const int64_t oldest = std::max<int64_t>(0, position - window + 1);
  const int64_t row_end = row + count;
  if (count == 1) {
    pieces.push_back({row, row_end, oldest, position + 1, false, false, true});
    return;
  }
  // The first key from which on every query attends to all keys before the block.
  const int64_t shared = std::max(oldest, position + count - window);
  pieces.push_back({row, row_end, position, position + count, true, false, true});
  if (shared < position) pieces.push_back({row, row_end, shared, position, false, false, false});
  if (oldest < shared) {
    // The last query of the block attends to none of these keys.
    pieces.push_back({row, row_end - 1, oldest, shared, true, true, false});
  }
}

// queries: number of query rows; query_start: position of the first query among the keys (>= 0);
// window: number of keys that a query attends to, its own included; 0 = all.
inline std::vector<Piece> decompose(int64_t queries, int64_t query_start, int64_t window) {
  std::vector<Piece> pieces;
  const bool windowed = window > 0 && window < query_start + queries;
  const int64_t reach = windowed ? window : query_start + queries;
  const int64_t block = windowed ? std::min(window, queries) : queries;
  for (int64_t row = 0; row < queries; row += block) {
    append_block(pieces, row, std::min(block, queries - row), query_start + row, reach);
  }
  return pieces;
}

}  // namespace zerotuning::attention
