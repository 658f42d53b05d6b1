// Schedule of Hopper's backward kernel: its arguments, its work items, and their order.
//
// A work item is 128 rows of keys or of queries, 64 for each of two consumer warpgroups. These rows
// are stationary: their tiles stay in shared memory. Tiles of 64 rows of the other kind are
// streamed past them. Persistent blocks claim items from a counter, the heaviest first.
#pragma once

#include <cuda.h>

#include "attention/cuda/hopper/tiles.cuh"
#include "attention/cuda/partial_gradients.cuh"
#include "attention/cuda/visibility.cuh"

namespace zerotuning::attention::hopper::backward {

using namespace device;

constexpr int consumers = 2;  // warpgroups that compute
constexpr int tile_rows = 64;
constexpr int item_rows = consumers * tile_rows;
constexpr int threads = (1 + consumers) * warpgroup;

// Statistics of 64 query rows.
struct RowStatistics {
  float logsumexp[tile_rows];  // base 2; +inf for rows that do not exist or attend to no key
  float delta[tile_rows];      // Δ = do·o
};

// The order of the items of one kind: `tiles` items for each of `sequences` (heads of all samples).
struct ItemOrder {
  int sequences, tiles;
  int section;  // sequences that are computed together: their streamed tiles stay in the cache
};

struct Arguments {
  CUtensorMap query, key, value, grad_output, grad_query, grad_key, grad_value;
  CudaGeometry geometry;
  const float* log_scale;
  int64_t log_scale_batch_stride, log_scale_head_stride;
  Strided4<const void> key_rows;    // key in global memory
  const RowStatistics* statistics;  // [batch, heads, tiles of 64 queries]
  PartialGradients partial;         // a part for 64 queries; no value columns
  uint32_t* claimed_items;          // in addition to the first item of each block
  ItemOrder key_order, query_order;
  int batch, heads, key_heads, group, queries, keys;
  float scale, scale_log2;
};

enum class ItemKind : int { keys, queries, none };

// A range of streamed tiles.
struct TileRange {
  int begin, end;
};

// A work item, read from shared memory at each use: the consumers' sums leave no registers for a
// copy.
struct WorkItem {
  SampleGeometry sample;
  int real_end;  // keys [sample.first_key, real_end) are real
  ItemKind kind;
  int batch, head, row;          // head: of keys or of queries; first stationary row
  TileRange streamed;            // tiles that any stationary row interacts with
  TileRange visible[consumers];  // tiles that a consumer's rows interact with
};

struct ItemPosition {
  int sequence;
  int rank;  // 0 for the heaviest item of its sequence
};

// Items are ordered by section, and by rank within a section.
__device__ __forceinline__ ItemPosition position_of(const ItemOrder& order, int index) {
  const int section = index / (order.section * order.tiles);
  const int in_section = index - section * order.section * order.tiles;
  const int width = min(order.section, order.sequences - section * order.section);
  return {section * order.section + in_section % width, in_section / width};
}

// The streamed tiles that stationary rows [row, row + count) interact with under causal mask,
// window and padding at the ends.
__device__ __forceinline__ TileRange visible_tiles(const Arguments& args, const WorkItem& item,
                                                   int row, int count) {
  const SampleGeometry& g = item.sample;
  const int window = args.geometry.window;
  int begin, end;
  if (item.kind == ItemKind::keys) {
    const int first = max(row, g.first_key), last = min(row + count, g.past_key) - 1;
    begin = max(first - g.start, 0);
    end = window ? min(last + window - g.start, args.queries) : args.queries;
    if (first > last) end = 0;
  } else {
    begin = window ? max(g.first_key, g.start + row - window + 1) : g.first_key;
    end = min(g.start + min(row + count, args.queries), g.past_key);
    if (row >= args.queries) end = 0;
  }
  if (begin >= end) return {0, 0};
  return {begin / tile_rows, (end + tile_rows - 1) / tile_rows};
}

// Writes item number `index`: all items of keys, then all items of queries, then none.
__device__ __forceinline__ void set_item(const Arguments& args, int index, WorkItem& item) {
  const int key_items = args.key_order.sequences * args.key_order.tiles;
  const int query_items = args.query_order.sequences * args.query_order.tiles;
  item.kind = ItemKind::none;
  if (index >= key_items + query_items) return;
  const bool of_keys = index < key_items;
  const ItemOrder& order = of_keys ? args.key_order : args.query_order;
  const ItemPosition position = position_of(order, of_keys ? index : index - key_items);
  const int heads = of_keys ? args.key_heads : args.heads;
  item.kind = of_keys ? ItemKind::keys : ItemKind::queries;
  item.batch = position.sequence / heads;
  item.head = position.sequence % heads;
  // Under a causal mask the first keys and the last queries are the heaviest.
  item.row = (of_keys ? position.rank : order.tiles - 1 - position.rank) * item_rows;
  item.sample = sample_geometry(args.geometry, item.batch, args.queries, args.keys);
  item.real_end = args.geometry.end_key ? args.geometry.end_key[item.batch] : args.keys;
  item.streamed = visible_tiles(args, item, item.row, item_rows);
  for (int i = 0; i < consumers; ++i)
    item.visible[i] = visible_tiles(args, item, item.row + i * tile_rows, tile_rows);
}

// The number of heads whose tiles are streamed past an item.
__device__ __forceinline__ int streamed_heads(const Arguments& args, const WorkItem& item) {
  return item.kind == ItemKind::keys ? args.group : 1;
}
// The number of rows of the item's kind. The last item may end beyond these rows.
__device__ __forceinline__ int row_count(const Arguments& args, const WorkItem& item) {
  return item.kind == ItemKind::keys ? args.keys : args.queries;
}

__device__ __forceinline__ const RowStatistics* statistics_of(const Arguments& args, int batch,
                                                              int head, int row) {
  const int64_t sequence = static_cast<int64_t>(batch) * args.heads + head;
  return args.statistics + sequence * args.query_order.tiles * consumers + row / tile_rows;
}

}  // namespace zerotuning::attention::hopper::backward
