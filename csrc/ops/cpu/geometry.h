// The keys that each sample's queries attend to and the keys that are scaled, read on the host, and
// the additive bias that expresses both.
#pragma once

#include <vector>

#include "ops/problem.h"

namespace zerotuning::ops {

struct Geometry {
  std::vector<int64_t> query_start;  // [batch]: position of query row 0 among the keys
  // [batch, 2]: scaled keys [first, end); the initial token unless the caller gave a span.
  std::vector<int64_t> span;
  const bool* key_mask = nullptr;  // [batch, keys], contiguous, or null
  Tensor key_mask_owner;           // keeps key_mask alive

  bool same_query_start() const;
};

// Throws std::invalid_argument for positions outside the keys and for a log_scale that is not
// finite.
Geometry read_geometry(const Problem& problem);

// Additive bias [1 or samples, H, 1, keys] of samples [begin, end) and keys [0, keys): log_scale at
// the scaled keys, -inf where key_mask is False, else 0. float64 for float64, else float32.
Tensor make_bias(const Problem& problem, const Geometry& geometry, int64_t begin, int64_t end,
                 int64_t keys);

}  // namespace zerotuning::ops
