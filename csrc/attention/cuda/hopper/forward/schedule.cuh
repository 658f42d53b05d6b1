// Schedule of Hopper's forward kernel: its configurations, its arguments, the order of its tiles.
#pragma once

#include <cuda.h>

#include "attention/cuda/hopper/tiles.cuh"
#include "attention/cuda/visibility.cuh"

namespace zerotuning::attention::hopper::forward {

using namespace device;

constexpr int warpgroup_rows = 64;  // query rows of a consumer warpgroup
constexpr int stages = 2;           // of the rings of K and V tiles

struct Arguments {
  CUtensorMap query, key, value, output, output_minus_initial_value;
  CudaGeometry geometry;
  const float* log_scale;
  int64_t log_scale_batch_stride, log_scale_head_stride;
  Strided4<void> logsumexp;         // data may be null
  Strided4<const void> value_rows;  // value in global memory; null: no output_minus_initial_value
  int heads, group, queries, keys;
  int value_columns;
  int row_tiles;      // of one head
  int tiles;          // of all heads of all samples
  int section_heads;  // heads that are computed together: their K and V stay in the cache
  float scale;
};

// How a kernel divides its work. Head sizes are rounded up to whole blocks of 64 columns; the copy
// engine fills the rest with zeros.
template <int head_size_, int value_size_, int tile_keys_, int consumers_ = 2>
struct Configuration {
  static constexpr int head_size = head_size_, value_size = value_size_, tile_keys = tile_keys_;
  static constexpr int consumers = consumers_;  // warpgroups that compute
  static constexpr int tile_rows = consumers * warpgroup_rows;
  static constexpr int threads = (1 + consumers) * warpgroup;
  static constexpr int blocks = consumers == 1 ? 2 : 1;  // per multiprocessor
  static constexpr int producer_registers = 24;
  static constexpr int consumer_registers = consumers == 1 ? 232 : 240;
  // At head size 256 shared memory has no room for an output tile: the output is written to the
  // query's tile.
  static constexpr bool has_output_tile = head_size < 256;
  static constexpr int query_stages = has_output_tile && blocks == 1 ? 2 : 1;
};

// A tile of queries of one head, and the tiles of keys [key_tile_begin, key_tile_end) that these
// queries may attend to.
struct WorkTile {
  int batch, head, row;  // first query row
  int position;          // of that row among the keys
  int key_tile_begin, key_tile_end;

  __device__ __forceinline__ bool has_keys() const { return key_tile_begin != key_tile_end; }
};

// Tiles are ordered by section, and within a section the longest come first: under a causal mask,
// the last rows of all its heads.
template <typename C>
__device__ __forceinline__ WorkTile work_tile(const Arguments& args, int index) {
  const int sequences = args.tiles / args.row_tiles;
  const int section = index / (args.section_heads * args.row_tiles);
  const int in_section = index - section * args.section_heads * args.row_tiles;
  const int width = min(args.section_heads, sequences - section * args.section_heads);
  const int sequence = section * args.section_heads + in_section % width;
  constexpr int tile_rows = C::tile_rows, tile_keys = C::tile_keys;
  WorkTile work;
  work.batch = sequence / args.heads;
  work.head = sequence % args.heads;
  work.row = (args.row_tiles - 1 - in_section / width) * tile_rows;
  const SampleGeometry g = sample_geometry(args.geometry, work.batch, args.queries, args.keys);
  work.position = g.start + work.row;
  const int end = min(g.start + min(work.row + tile_rows, args.queries), g.past_key);
  const int window = args.geometry.window;
  const int begin = window ? max(g.first_key, work.position - window + 1) : g.first_key;
  work.key_tile_begin = begin / tile_keys;
  work.key_tile_end = begin < end ? (end + tile_keys - 1) / tile_keys : work.key_tile_begin;
  return work;
}

// The index of the block's tile in a round of all blocks. Every other round runs in reverse order,
// so that each block gets long and short tiles.
__device__ __forceinline__ int tile_of_round(int round) {
  const int blocks = gridDim.x, block = blockIdx.x;
  return round * blocks + (round & 1 ? blocks - 1 - block : block);
}

}  // namespace zerotuning::attention::hopper::forward
