// Mathematics of Hopper's backward kernel: the consumer warpgroups' loop over items and tiles.
//
// key_gradients.cuh has the formulas of an item of keys, query_gradients.cuh the formulas of an
// item of queries.
#pragma once

#include "attention/cuda/hopper/backward/query_gradients.cuh"

namespace zerotuning::attention::hopper::backward {

constexpr int consumer_barrier = 1;  // + consumer: named barrier of one consumer's threads

// One streamed tile. The two warpgroups run independently, so that the tensor cores work for one
// while the other computes weights. Products that overlap with the next tile would need more
// registers than a thread has.
template <typename T, int size, typename Gradients>
__device__ __forceinline__ void accumulate_tile(const Arguments& args, const WorkItem& item,
                                                int consumer, const TilePair<size>& stationary,
                                                const TilePair<size>& streamed,
                                                const RowStatistics& statistics, int tile,
                                                Gradients& sums) {
  float logits[tile_numbers];     // then P
  float gradients[tile_numbers];  // dP, then dS
  start_product_with_transpose<T, size, tile_rows, tile_rows>(logits, stationary.first,
                                                              streamed.first);
  start_product_with_transpose<T, size, tile_rows, tile_rows>(gradients, stationary.second,
                                                              streamed.second);
  wait_products<1>();
  fence_registers(logits);
  sums.recompute_weights(args, item, consumer, statistics, tile, logits);
  sums.start_value_product(logits, streamed);
  wait_products<Gradients::value_groups>();
  fence_registers(gradients);
  sums.softmax_backward(item, statistics, tile, logits, gradients);
  sums.start_logit_product(gradients, streamed);
  wait_products<0>();
  sums.fence_sums();
}

// All streamed tiles of an item. The gradients are left in place of the stationary tiles, for
// store_gradients.
template <typename T, int size, typename Gradients>
__device__ __forceinline__ void compute_item(const Arguments& args, Shared<size>& s, int slot,
                                             PipelineState<stages>& streamed) {
  const WorkItem& item = s.item[slot];
  // From the shuffle the compiler can infer that the number is the same in a warp: descriptors of
  // matrices are then computed once for all lanes.
  const int consumer = __shfl_sync(~0u, threadIdx.x / warpgroup, 0) - 1;
  Gradients sums(args, item, consumer);
#pragma unroll 1
  for (int i = 0; i < streamed_heads(args, item); ++i) {
    sums.begin_head(args, item, i);
#pragma unroll 1
    for (int tile = item.streamed.begin; tile < item.streamed.end; ++tile, ++streamed.count) {
      const int stage = streamed.stage();
      wait(&s.streamed_full[stage], streamed.parity());
      if (tile >= item.visible[consumer].begin && tile < item.visible[consumer].end) {
        accumulate_tile<T>(args, item, consumer, s.stationary[slot][consumer], s.streamed[stage],
                           s.statistics[stage], tile, sums);
      }
      arrive(&s.streamed_empty[stage]);
    }
  }
  if constexpr (Gradients::kind == ItemKind::queries)
    write_partial_gradients(args, s, slot, consumer, sums, consumer_barrier + consumer);
  wait_named(consumer_barrier + consumer, warpgroup);  // All have read the stationary tiles.
  sums.write(args, s.stationary[slot][consumer]);
  arrive_warp(&s.gradients_written[slot]);
}

// A consumer warpgroup: its 64 rows of each of the block's items.
template <typename T, int size>
__device__ __forceinline__ void compute_items(const Arguments& args, Shared<size>& s) {
  PipelineState<stages> streamed;
#pragma unroll 1
  for (PipelineState<items> state;; ++state.count) {
    const int slot = state.stage();
    wait(&s.stationary_full[slot], state.parity());
    const ItemKind kind = s.item[slot].kind;
    if (kind == ItemKind::none) break;
    if (kind == ItemKind::keys) {
      compute_item<T, size, KeyGradients<T, size>>(args, s, slot, streamed);
    } else {
      compute_item<T, size, QueryGradients<T, size>>(args, s, slot, streamed);
    }
  }
}

}  // namespace zerotuning::attention::hopper::backward
