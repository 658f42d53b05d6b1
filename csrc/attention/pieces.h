// How causal attention, windowed or not, is cut into pieces that a stock kernel computes without a
// mask.
//
// A stock kernel knows two shapes: `full` (every query sees every key) and `causal` aligned at the
// top left (query r sees keys 0..r). With queries at positions p, p+1, … of the keys and a sliding
// window of W keys, a block of c <= W queries at positions [a, a+c) sees
//   - the block's own keys [a, a+c): causal;
//   - keys [a+c-W, a), which every query of the block sees: full;
//   - keys [a-W+1, a+c-W), of which query r sees those from a+r-W+1 on: causal once queries and
//   keys are reversed.
// The pieces of one query are merged by their log-sum-exp (merge.h). No T×T mask, no window×window
// mask.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace zerotuning::attention {

struct Piece {
  int64_t query_begin, query_end;  // rows of the query tensor
  int64_t key_begin, key_end;      // rows of the key and value tensors
  bool causal;                     // aligned at the top left; otherwise every query sees every key
  bool reversed;                   // queries and keys are taken in reverse order (causal only)
  bool first;  // the first piece of these queries: it covers all rows of its block
};

inline void append_block(std::vector<Piece>& pieces, int64_t row, int64_t count, int64_t position,
                         int64_t window) {
  const int64_t oldest = std::max<int64_t>(0, position - window + 1);  // seen by the first query
  const int64_t row_end = row + count;
  if (count == 1) {
    pieces.push_back({row, row_end, oldest, position + 1, false, false, true});
    return;
  }
  const int64_t shared =
      std::max(oldest, position + count - window);  // seen by every query from here on
  pieces.push_back({row, row_end, position, position + count, true, false, true});
  if (shared < position) pieces.push_back({row, row_end, shared, position, false, false, false});
  if (oldest < shared) {
    // The last query of the block sees none of these keys.
    pieces.push_back({row, row_end - 1, oldest, shared, true, true, false});
  }
}

// queries: number of query rows; query_start: position of the first query among the keys (>= 0);
// window: keys a query sees, itself included; 0 = all.
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
