// Mathematics of Hopper's backward kernel for 64 stationary keys: dK and dV.
//
// For each streamed tile of queries, with rows of keys and columns of queries:
//   P^T = exp(scale K Q^T + log_scale - lse),  dV += P^T dO
//   dS^T = P^T (V dO^T - Δ),                   dK += dS^T Q   (times scale at the end)
#pragma once

#include "attention/cuda/hopper/backward/copies.cuh"

namespace zerotuning::attention::hopper::backward {

constexpr int tile_numbers = tile_rows / 2;  // of a 64 x 64 result, in one thread

// Replaces logits that the causal mask or the window excludes by -inf: of 64 keys from `key` on and
// 64 queries at positions from `position` on.
template <bool rows_are_keys>
__device__ __forceinline__ void apply_causal_mask(float (&logits)[tile_numbers], int key,
                                                  int position, int window) {
  constexpr int last = tile_rows - 1;
  if (key + last <= position && (!window || key > position + last - window)) return;
#pragma unroll
  for (int i = 0; i < tile_numbers; ++i) {
    const int row = row_at(i), column = column_at(i);
    const int k = key + (rows_are_keys ? row : column);
    const int p = position + (rows_are_keys ? column : row);
    if (k > p || (window && k <= p - window)) logits[i] = -INFINITY;
  }
}

template <typename T, int size>
struct KeyGradients {
  static constexpr ItemKind kind = ItemKind::keys;
  static constexpr int value_groups = 1;  // of products that start_value_product starts

  float grad_key[size / 2] = {}, grad_value[size / 2] = {};
  // Added to the logits of a thread's two keys, in base 2: log_scale for scaled keys, -inf for
  // padding.
  float logit_offset[2];
  bool is_scaled[2];

  __device__ __forceinline__ KeyGradients(const Arguments& args, const WorkItem& item,
                                          int consumer) {
    const SampleGeometry& g = item.sample;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = item.row + consumer * tile_rows + row_at(2 * half);
      const bool is_real = key < args.keys && (!g.key_mask || g.key_mask[key]);
      logit_offset[half] = is_real ? 0 : -INFINITY;
      is_scaled[half] = is_real && key >= g.span_begin && key < g.span_end;
    }
  }

  // Before the tiles of the group's query head number i.
  __device__ __forceinline__ void begin_head(const Arguments& args, const WorkItem& item, int i) {
    if (!is_scaled[0] && !is_scaled[1]) return;
    const int head = item.head * args.group + i;
    const float log_scale = log2_e * log_scale_of<float>(args, item.batch, head);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (is_scaled[half]) logit_offset[half] = log_scale;
  }

  __device__ __forceinline__ void fence_sums() {
    fence_registers(grad_key);
    fence_registers(grad_value);
  }

  // K Q^T becomes P^T.
  __device__ __forceinline__ void recompute_weights(const Arguments& args, const WorkItem& item,
                                                    int consumer, const RowStatistics& statistics,
                                                    int tile, float (&logits)[tile_numbers]) const {
    apply_causal_mask<true>(logits, item.row + consumer * tile_rows,
                            item.sample.start + tile * tile_rows, args.geometry.window);
#pragma unroll
    for (int i = 0; i < tile_numbers; i += 4) {
      const float2 sum = *reinterpret_cast<const float2*>(&statistics.logsumexp[column_at(i)]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* two = logits + i + 2 * half;
        two[0] = exp2_fast(fmaf(two[0], args.scale_log2, logit_offset[half] - sum.x));
        two[1] = exp2_fast(fmaf(two[1], args.scale_log2, logit_offset[half] - sum.y));
      }
    }
  }

  // Starts dV += P^T dO.
  __device__ __forceinline__ void start_value_product(const float (&weights)[tile_numbers],
                                                      const TilePair<size>& streamed) {
    uint32_t left[tile_rows / 16][4];
    to_left_operand<T>(weights, left);
    start_multiply_add<T, size, tile_rows>(grad_value, left, streamed.second);
  }

  // V dO^T becomes dS^T.
  __device__ __forceinline__ void softmax_backward(const WorkItem&, const RowStatistics& statistics,
                                                   int, const float (&weights)[tile_numbers],
                                                   float (&gradients)[tile_numbers]) const {
#pragma unroll
    for (int i = 0; i < tile_numbers; i += 4) {
      const float2 delta = *reinterpret_cast<const float2*>(&statistics.delta[column_at(i)]);
#pragma unroll
      for (int j = i; j < i + 4; j += 2) {
        gradients[j] = weights[j] * (gradients[j] - delta.x);
        gradients[j + 1] = weights[j + 1] * (gradients[j + 1] - delta.y);
      }
    }
  }

  // Starts dK += dS^T Q.
  __device__ __forceinline__ void start_logit_product(const float (&grad_logits)[tile_numbers],
                                                      const TilePair<size>& streamed) {
    uint32_t left[tile_rows / 16][4];
    to_left_operand<T>(grad_logits, left);
    start_multiply_add<T, size, tile_rows>(grad_key, left, streamed.first);
  }

  __device__ __forceinline__ void write(const Arguments& args, TilePair<size>& to) const {
    write_tile<T, size, tile_rows>(to.first, 0, grad_key, {args.scale, args.scale});
    write_tile<T, size, tile_rows>(to.second, 0, grad_value, {1, 1});
  }
};

}  // namespace zerotuning::attention::hopper::backward
