// The division of a decode call among blocks: a function of the call's sizes alone, so that
// decode_scratch and decode agree.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/cuda/decode/arguments.cuh"
#include "attention/decode_route.h"

namespace zerotuning::attention::decoding {

constexpr int max_warps = 4;  // of a block
constexpr int max_splits = 128;
constexpr int counters_per_set = 2048;

struct Plan {
  int size;        // head sizes rounded up to a size that is compiled
  int row_tiles;   // of 16 rows, in a block
  int row_groups;  // blocks that share a key head's rows
  int splits;      // blocks that share a key head's keys
};

constexpr int row_tiles_of(int size, int rows) { return size <= 128 && rows > tile_rows ? 2 : 1; }

// The number of keys that a sample's queries may attend to.
inline int keys_in_window(const CudaAttention& call) {
  return static_cast<int>(visible_keys(call.queries, call.keys, call.geometry.window));
}

// The fewest splits with which blocks fill 95 % of whole rounds of `slots` (or the splits that fill
// the most), with a tile for each warp.
inline int splits_of(const CudaAttention& call, int64_t sequences, int64_t slots) {
  const int most = std::clamp(keys_in_window(call) / (tile_keys * max_warps), 1, max_splits);
  int best = 1;
  double best_use = 0;
  for (int splits = 1; splits <= most && best_use < 0.95; ++splits) {
    const int64_t blocks = sequences * splits, rounds = (blocks + slots - 1) / slots;
    const double use = static_cast<double>(blocks) / static_cast<double>(rounds * slots);
    if (use > best_use) {
      best_use = use;
      best = splits;
    }
  }
  return best;
}

inline Plan plan_of(const CudaAttention& call, int multiprocessors) {
  const int largest = std::max(call.head_size, call.value_head_size);
  const int rows = call.heads / call.key_heads * call.queries;
  Plan plan;
  plan.size = largest <= 64    ? 64
              : largest <= 96  ? 96
              : largest <= 128 ? 128
              : largest <= 192 ? 192
                               : 256;
  plan.row_tiles = row_tiles_of(plan.size, rows);
  const int block_rows = plan.row_tiles * tile_rows;
  plan.row_groups = (rows + block_rows - 1) / block_rows;
  // One block a multiprocessor: these long streams are read faster than the shorter streams of two
  // blocks a multiprocessor (on an H100 16 x 1024 keys in 27 us against 30, 16 x 8192 in 184
  // against 193).
  plan.splits = splits_of(call, int64_t{call.batch} * call.key_heads * plan.row_groups,
                          int64_t{std::max(multiprocessors, 1)});
  return plan;
}

// Whether the last block merges the splits of its rows, four columns a thread, instead of a second
// kernel: true if the merge needs so few steps that they are faster than a second launch.
inline bool last_block_merges(const CudaAttention& call, const Plan& plan) {
  constexpr int max_steps = 64, threads = max_warps * 32;
  const int rows = std::min(plan.row_tiles * tile_rows, call.heads / call.key_heads * call.queries);
  const int columns = call.value_head_size / 4;
  const int turns = (rows * columns + threads - 1) / threads;
  return plan.splits > 1 && std::max(plan.splits, merge_threads / columns) * turns <= max_steps &&
         int64_t{call.batch} * call.key_heads * plan.row_groups <= counters_per_set;
}

// The number of rows of results in scratch memory.
inline int64_t split_rows(const CudaAttention& call, const Plan& plan) {
  return plan.splits > 1 ? int64_t{call.batch} * call.heads * call.queries * plan.splits : 0;
}

}  // namespace zerotuning::attention::decoding
