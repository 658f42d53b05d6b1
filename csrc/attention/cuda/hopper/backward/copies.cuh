// Copies of Hopper's backward kernel: its shared memory, and the three threads that load and store
// tiles.
//
// load_stationary claims items and loads their rows, load_streamed loads the tiles that are
// streamed past them, store_gradients stores results. An item's gradients are written over its
// stationary tiles.
#pragma once

#include "attention/cuda/hopper/backward/schedule.cuh"

namespace zerotuning::attention::hopper::backward {

constexpr int items = 2;   // whose stationary tiles are in shared memory
constexpr int stages = 3;  // of the ring of streamed tiles

// Tiles of query and grad_output, or of key and value. Products of `first` tiles are logits,
// products of `second` tiles are gradients of weights. Head sizes are rounded up to whole blocks of
// 64 columns; the copy engine fills the rest with zeros.
template <int size>
struct TilePair {
  alignas(1024) uint16_t first[tile_rows * size];
  alignas(1024) uint16_t second[tile_rows * size];
};

template <int size>
struct Shared {
  TilePair<size> stationary[items][consumers];
  TilePair<size> streamed[stages];
  alignas(128) RowStatistics statistics[stages];  // of streamed queries
  WorkItem item[items];
  float initial_grad_logits[consumers][tile_rows];  // dS of the first scaled key
  float log_scale_sums[consumers][warpgroup / 32];
  uint64_t item_set[items], stationary_full[items], gradients_written[items],
      stationary_empty[items];
  uint64_t streamed_full[stages], streamed_empty[stages];

  // Called by one thread before all others use the barriers.
  __device__ __forceinline__ void init_barriers() {
    constexpr int consumer_warps = consumers * warpgroup / 32;
    for (int i = 0; i < items; ++i) {
      init_barrier(&item_set[i], 1);
      init_barrier(&stationary_full[i], 1);
      init_barrier(&stationary_empty[i], 2);  // by load_streamed and store_gradients
      init_barrier(&gradients_written[i], consumer_warps);
    }
    for (int i = 0; i < stages; ++i) {
      init_barrier(&streamed_full[i], 1);
      // Every thread arrives. Arrivals of one lane of each warp would be no faster, and
      // compute-sanitizer's racecheck could not follow them.
      init_barrier(&streamed_empty[i], consumers * warpgroup);
    }
    fence_barrier_init();
  }
};

template <int size>
__device__ __forceinline__ void load_pair(TilePair<size>& to, const CUtensorMap* first,
                                          const CUtensorMap* second, uint64_t* barrier, int row,
                                          int head, int batch) {
#pragma unroll
  for (int column = 0; column < size; column += block_columns)
    load_box(to.first + column * tile_rows, first, barrier, column, row, head, batch);
#pragma unroll
  for (int column = 0; column < size; column += block_columns)
    load_box(to.second + column * tile_rows, second, barrier, column, row, head, batch);
}

template <int size>
__device__ __forceinline__ void load_item(const Arguments& args, const WorkItem& item,
                                          TilePair<size> (&tiles)[consumers], uint64_t* barrier) {
  const bool of_keys = item.kind == ItemKind::keys;
  const CUtensorMap* first = of_keys ? &args.key : &args.query;
  const CUtensorMap* second = of_keys ? &args.value : &args.grad_output;
  const bool has_second_tile = item.row + tile_rows < row_count(args, item);
  expect_bytes(barrier, sizeof(TilePair<size>) * (has_second_tile ? 2 : 1));
  load_pair(tiles[0], first, second, barrier, item.row, item.head, item.batch);
  if (has_second_tile)
    load_pair(tiles[1], first, second, barrier, item.row + tile_rows, item.head, item.batch);
}

// One thread: claims items, describes them in shared memory, and loads their stationary tiles.
template <int size>
__device__ __forceinline__ void load_stationary(const Arguments& args, Shared<size>& s) {
  PipelineState<items> state;
#pragma unroll 1
  for (int index = blockIdx.x;; ++state.count) {
    const int slot = state.stage();
    WorkItem& item = s.item[slot];
    wait(&s.stationary_empty[slot], state.parity() ^ 1);
    set_item(args, index, item);
    arrive(&s.item_set[slot]);
    if (item.kind == ItemKind::none) break;
    index = gridDim.x + atomicAdd(args.claimed_items, 1u);
    if (item.streamed.begin < item.streamed.end) {
      load_item(args, item, s.stationary[slot], &s.stationary_full[slot]);
    } else {
      arrive(&s.stationary_full[slot]);
    }
  }
  arrive(&s.stationary_full[state.stage()]);
}

template <bool of_keys, int size>
__device__ __forceinline__ void load_streamed_of(const Arguments& args, const WorkItem& item,
                                                 Shared<size>& s, PipelineState<stages>& streamed) {
  const CUtensorMap* first = of_keys ? &args.query : &args.key;
  const CUtensorMap* second = of_keys ? &args.grad_output : &args.value;
#pragma unroll 1
  for (int i = 0; i < (of_keys ? args.group : 1); ++i) {
    const int head = of_keys ? item.head * args.group + i : item.head / args.group;
#pragma unroll 1
    for (int tile = item.streamed.begin; tile < item.streamed.end; ++tile, ++streamed.count) {
      const int stage = streamed.stage(), row = tile * tile_rows;
      uint64_t* full = &s.streamed_full[stage];
      wait(&s.streamed_empty[stage], streamed.parity() ^ 1);
      expect_bytes(full, sizeof(TilePair<size>) + (of_keys ? sizeof(RowStatistics) : 0));
      load_pair(s.streamed[stage], first, second, full, row, head, item.batch);
      if (of_keys) {
        load_bytes(&s.statistics[stage], statistics_of(args, item.batch, head, row),
                   sizeof(RowStatistics), full);
      }
    }
  }
}

// One thread: loads the tiles that are streamed past the block's items.
template <int size>
__device__ __forceinline__ void load_streamed(const Arguments& args, Shared<size>& s) {
  PipelineState<stages> streamed;
#pragma unroll 1
  for (PipelineState<items> state;; ++state.count) {
    const int slot = state.stage();
    wait(&s.item_set[slot], state.parity());
    const WorkItem& item = s.item[slot];
    if (item.kind == ItemKind::none) return;
    if (item.kind == ItemKind::keys) {
      load_streamed_of<true>(args, item, s, streamed);
    } else {
      load_streamed_of<false>(args, item, s, streamed);
    }
    arrive(&s.stationary_empty[slot]);  // This thread has read the item.
  }
}

template <int size>
__device__ __forceinline__ void store_tile(const CUtensorMap* map, const uint16_t* from, int row,
                                           int head, int batch) {
#pragma unroll
  for (int column = 0; column < size; column += block_columns)
    store_box(map, from + column * tile_rows, column, row, head, batch);
}

// One thread: stores the gradients that the consumers leave in place of the stationary tiles.
template <int size>
__device__ __forceinline__ void store_gradients(const Arguments& args, Shared<size>& s) {
#pragma unroll 1
  for (PipelineState<items> state;; ++state.count) {
    const int slot = state.stage();
    const WorkItem& item = s.item[slot];
    wait(&s.stationary_full[slot], state.parity());
    if (item.kind == ItemKind::none) break;
    wait(&s.gradients_written[slot], state.parity());
#pragma unroll 1
    for (int consumer = 0; consumer < consumers; ++consumer) {
      const int row = item.row + consumer * tile_rows;
      const TilePair<size>& from = s.stationary[slot][consumer];
      if (row >= row_count(args, item)) break;
      if (item.kind == ItemKind::keys) {
        store_tile<size>(&args.grad_key, from.first, row, item.head, item.batch);
        store_tile<size>(&args.grad_value, from.second, row, item.head, item.batch);
      } else {
        store_tile<size>(&args.grad_query, from.first, row, item.head, item.batch);
      }
    }
    commit_stores();
    wait_until_stores_have_read();
    arrive(&s.stationary_empty[slot]);
  }
  wait_stores();
}

}  // namespace zerotuning::attention::hopper::backward
