// Copies of Hopper's forward kernel: its shared memory, the producer warp, and the stores of
// results.
#pragma once

#include "attention/cuda/hopper/forward/schedule.cuh"

namespace zerotuning::attention::hopper::forward {

constexpr int output_barrier = 4;  // + consumer: named barrier of one consumer's threads

template <typename C>
struct Shared {
  static constexpr int head_size = C::head_size, value_size = C::value_size;
  static constexpr int tile_keys = C::tile_keys, tile_rows = C::tile_rows;
  alignas(1024) uint16_t query[C::query_stages][tile_rows * head_size];
  alignas(1024) uint16_t key[stages][tile_keys * head_size];
  alignas(1024) uint16_t value[stages][tile_keys * value_size];
  alignas(1024) uint16_t output_tile[C::has_output_tile ? tile_rows * value_size : 512];
  uint64_t query_full[C::query_stages], query_empty[C::query_stages];
  uint64_t key_full[stages], key_empty[stages], value_full[stages], value_empty[stages];

  __device__ uint16_t* output() { return C::has_output_tile ? output_tile : query[0]; }

  // Called by one thread before all others use the barriers.
  __device__ __forceinline__ void init_barriers() {
    constexpr int consumer_warps = C::consumers * warpgroup / 32;
    for (int i = 0; i < C::query_stages; ++i) {
      init_barrier(&query_full[i], 1);
      init_barrier(&query_empty[i], consumer_warps);
    }
    for (int i = 0; i < stages; ++i) {
      init_barrier(&key_full[i], 1);
      init_barrier(&key_empty[i], consumer_warps);
      init_barrier(&value_full[i], 1);
      init_barrier(&value_empty[i], consumer_warps);
    }
    fence_barrier_init();
  }
};

template <int columns, int rows>
__device__ __forceinline__ void load_tile(uint16_t* to, const CUtensorMap* map, uint64_t* barrier,
                                          int row, int head, int batch) {
  expect_bytes(barrier, columns * rows * 2);
#pragma unroll
  for (int block = 0; block < columns / block_columns; ++block) {
    load_box(to + block * rows * block_columns, map, barrier, block * block_columns, row, head,
             batch);
  }
}

// The producer: one thread starts the copies of all tiles of the block's work, keys from last to
// first.
template <typename C>
__device__ __forceinline__ void load_tiles(const Arguments& args, Shared<C>& s) {
  constexpr int head_size = C::head_size, value_size = C::value_size, tile_keys = C::tile_keys,
                tile_rows = C::tile_rows;
  PipelineState<C::query_stages> queries;
  PipelineState<stages> keys, values;
  for (int round = 0; round * gridDim.x < args.tiles; ++round) {
    const int tile = tile_of_round(round);
    if (tile >= args.tiles) continue;
    const WorkTile work = work_tile<C>(args, tile);
    const bool has_keys = work.has_keys();
    if (!has_keys && C::has_output_tile) continue;
    const int key_head = work.head / args.group;
    const int q = queries.stage();
    wait(&s.query_empty[q], queries.parity() ^ 1);
    ++queries.count;
    if (!has_keys) {  // The consumers need the query's tile for their output even without keys.
      arrive(&s.query_full[q]);
      continue;
    }
    load_tile<head_size, tile_rows>(s.query[q], &args.query, &s.query_full[q], work.row, work.head,
                                    work.batch);
    for (int t = work.key_tile_end - 1; t >= work.key_tile_begin; --t) {
      wait(&s.key_empty[keys.stage()], keys.parity() ^ 1);
      load_tile<head_size, tile_keys>(s.key[keys.stage()], &args.key, &s.key_full[keys.stage()],
                                      t * tile_keys, key_head, work.batch);
      ++keys.count;
      wait(&s.value_empty[values.stage()], values.parity() ^ 1);
      load_tile<value_size, tile_keys>(s.value[values.stage()], &args.value,
                                       &s.value_full[values.stage()], t * tile_keys, key_head,
                                       work.batch);
      ++values.count;
    }
  }
}

// Stores a consumer's 64 rows of a result through shared memory. Each of a thread's two rows is
// multiplied by its factor.
template <typename T, typename C>
__device__ __forceinline__ void store_rows(const CUtensorMap* map, const WorkTile& work,
                                           int consumer, const float (&result)[C::value_size / 2],
                                           const float (&factor)[2], uint16_t* output_tile) {
  constexpr int value_size = C::value_size, tile_rows = C::tile_rows;
  const bool is_first_thread = threadIdx.x % warpgroup == 0;
  // The previous store must have read its rows of shared memory.
  if (is_first_thread) wait_until_stores_have_read();
  wait_named(output_barrier + consumer, warpgroup);
  write_tile<T, value_size, tile_rows>(output_tile, consumer * warpgroup_rows, result, factor);
  wait_named(output_barrier + consumer, warpgroup);
  if (!is_first_thread) return;
#pragma unroll
  for (int block = 0; block < value_size / block_columns; ++block) {
    store_box(map, output_tile + (block * tile_rows + consumer * warpgroup_rows) * block_columns,
              block * block_columns, work.row + consumer * warpgroup_rows, work.head, work.batch);
  }
  commit_stores();
}

}  // namespace zerotuning::attention::hopper::forward
