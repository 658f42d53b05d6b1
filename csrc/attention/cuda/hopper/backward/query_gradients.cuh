// Mathematics of Hopper's backward kernel for 64 stationary queries: dQ, and the query rows' part
// of the gradients of the first scaled key and of log_scale.
//
// For each streamed tile of keys:
//   P = exp(scale Q K^T + log_scale - lse),  dS = P (dO V^T - Δ),  dQ += dS K  (times scale at the
//   end)
// The product dS K excludes the first scaled key k_0: its dS is corrected for the rounding of the
// output (rounding_correction.cuh) with the sum of dS over all other keys, which is complete after
// the last tile. Then dQ += dS_0 k_0, and sums of dS_0 q and of the scaled keys' dS are written as
// partial gradients of k_0 and of log_scale. So rounding the output does not affect log_scale's
// gradient, and affects the gradients of query and key only where another key has nearly all of the
// weight.
#pragma once

#include "attention/cuda/hopper/backward/key_gradients.cuh"
#include "attention/cuda/rounding_correction.cuh"

namespace zerotuning::attention::hopper::backward {

template <typename T, int size>
struct QueryGradients {
  static constexpr ItemKind kind = ItemKind::queries;
  static constexpr int value_groups = 0;  // there is no product with P

  float grad_query[size / 2] = {};
  // Of a thread's two rows: sums over the first scaled key and the other scaled keys, and dS of all
  // keys that are not scaled.
  RowSums<float> first_scaled[2], rest_scaled[2];
  float others_grad_logit[2] = {};
  float logsumexp[2], delta[2];
  float log_scale;  // divided by scale: in the units of Q K^T

  __device__ __forceinline__ QueryGradients(const Arguments& args, const WorkItem& item,
                                            int consumer) {
    const int row = item.row + consumer * tile_rows;
    const RowStatistics* statistics = statistics_of(args, item.batch, item.head, row);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      logsumexp[half] = statistics->logsumexp[row_at(2 * half)];
      delta[half] = statistics->delta[row_at(2 * half)];
    }
    log_scale = log_scale_of<float>(args, item.batch, item.head) / args.scale;
  }

  __device__ __forceinline__ void begin_head(const Arguments&, const WorkItem&, int) {}
  __device__ __forceinline__ void fence_sums() { fence_registers(grad_query); }

  __device__ __forceinline__ static bool is_scaled(const SampleGeometry& g, int key) {
    return key >= g.span_begin && key < g.span_end;
  }
  __device__ __forceinline__ static bool tile_has_scaled(const SampleGeometry& g, int first) {
    return g.span_begin < first + tile_rows && g.span_end > first;
  }

  __device__ __forceinline__ static void apply_padding_mask(const Arguments& args,
                                                            const WorkItem& item, int first,
                                                            float (&logits)[tile_numbers]) {
    const int last = first + tile_rows;
    const bool* key_mask = item.sample.key_mask;
    if (first >= item.sample.first_key && last <= item.real_end) return;
    if (last <= args.keys && all_real<tile_rows>(key_mask, first, args.keys)) return;
#pragma unroll
    for (int i = 0; i < tile_numbers; ++i) {
      const int key = first + column_at(i);
      if (key >= args.keys || (key_mask && !key_mask[key])) logits[i] = -INFINITY;
    }
  }

  // Q K^T becomes P.
  __device__ __forceinline__ void recompute_weights(const Arguments& args, const WorkItem& item,
                                                    int consumer, const RowStatistics&, int tile,
                                                    float (&logits)[tile_numbers]) const {
    const SampleGeometry& g = item.sample;
    const int first = tile * tile_rows, position = g.start + item.row + consumer * tile_rows;
    if (tile_has_scaled(g, first)) {
#pragma unroll
      for (int i = 0; i < tile_numbers; ++i)
        if (is_scaled(g, first + column_at(i))) logits[i] += log_scale;
    }
    apply_causal_mask<false>(logits, first, position, args.geometry.window);
    apply_padding_mask(args, item, first, logits);
#pragma unroll
    for (int i = 0; i < tile_numbers; ++i)
      logits[i] = exp2_fast(fmaf(logits[i], args.scale_log2, -logsumexp[i / 2 % 2]));
  }

  __device__ __forceinline__ void start_value_product(const float (&)[tile_numbers],
                                                      const TilePair<size>&) {}

  // dO V^T becomes dS, with 0 for the first scaled key.
  __device__ __forceinline__ void softmax_backward(const WorkItem& item, const RowStatistics&,
                                                   int tile, const float (&weights)[tile_numbers],
                                                   float (&gradients)[tile_numbers]) {
#pragma unroll
    for (int i = 0; i < tile_numbers; ++i)
      gradients[i] = weights[i] * (gradients[i] - delta[i / 2 % 2]);
    const int first = tile * tile_rows;
    if (tile_has_scaled(item.sample, first)) {
#pragma unroll
      for (int i = 0; i < tile_numbers; ++i) {
        const int key = first + column_at(i);
        if (!is_scaled(item.sample, key)) continue;
        if (key == item.sample.span_begin) {
          first_scaled[i / 2 % 2].add(weights[i], gradients[i]);
          gradients[i] = 0;
        } else {
          rest_scaled[i / 2 % 2].add(weights[i], gradients[i]);
          others_grad_logit[i / 2 % 2] -= gradients[i];  // cancels the addition below
        }
      }
    }
#pragma unroll
    for (int i = 0; i < tile_numbers; ++i) others_grad_logit[i / 2 % 2] += gradients[i];
  }

  // Starts dQ += dS K.
  __device__ __forceinline__ void start_logit_product(const float (&grad_logits)[tile_numbers],
                                                      const TilePair<size>& streamed) {
    uint32_t left[tile_rows / 16][4];
    to_left_operand<T>(grad_logits, left);
    start_multiply_add<T, size, tile_rows>(grad_query, left, streamed.first);
  }

  __device__ __forceinline__ void write(const Arguments& args, TilePair<size>& to) const {
    write_tile<T, size, tile_rows>(to.first, 0, grad_query, {args.scale, args.scale});
  }

  // After the last tile: corrects dS_0 of the first scaled key, writes dS_0 to initial_grad_logits,
  // and adds dS_0 k_0 to dQ. Returns the thread's summand of the gradient of log_scale.
  __device__ __forceinline__ float correct_rounding(const Arguments& args, const WorkItem& item,
                                                    float (&initial_grad_logits)[tile_rows]) {
    const auto over_columns = [](const RowSums<float>& sums) {
      return RowSums<float>{quad_sum(sums.weight), quad_sum(sums.grad_logit)};
    };
    float initial_grad_logit[2], log_scale_summand = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const RowSums<float> rest = over_columns(rest_scaled[half]);
      RowSums<float> scaled = over_columns(first_scaled[half]);
      const float others = quad_sum(others_grad_logit[half]);
      initial_grad_logit[half] = scaled.correct_rounding(rest.grad_logit + others);
      scaled.add(rest.weight, rest.grad_logit);
      log_scale_summand += scaled.correct_rounding(others);
    }
    const SampleGeometry& g = item.sample;
    if (g.span_begin < g.span_end) {
      const T* key = row_of<T>(args.key_rows, item.batch, item.head / args.group, g.span_begin);
#pragma unroll
      for (int i = 0; i < size / 2; i += 4) {
        const int column = column_at(i);
        float k[2] = {};
        if (column < args.partial.key_columns) {
          k[0] = widened(key[column]);
          k[1] = widened(key[column + 1]);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j)
          grad_query[i + j] = fmaf(initial_grad_logit[j / 2], k[j % 2], grad_query[i + j]);
      }
    }
    if (threadIdx.x % 4 > 0) return 0;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      initial_grad_logits[row_at(2 * half)] = initial_grad_logit[half];
    return log_scale_summand;
  }
};

// Σ over 64 rows of initial_grad_logits[row] * tile[row][column].
template <typename T>
__device__ __forceinline__ float weighted_column_sum(const float (&initial_grad_logits)[tile_rows],
                                                     const uint16_t* tile, int column) {
  const T* block =
      reinterpret_cast<const T*>(tile) + column / block_columns * tile_rows * block_columns;
  const int chunk = column % block_columns / 8;
  float sum = 0;
#pragma unroll 8
  for (int row = 0; row < tile_rows; ++row) {
    const int at = row * block_columns + (chunk ^ row % 8) * 8 + column % 8;  // swizzled
    sum = fmaf(initial_grad_logits[row], widened(block[at]), sum);
  }
  return sum;
}

// Writes the partial gradients of the first scaled key and of log_scale that 64 queries contribute.
template <typename T, int size>
__device__ __forceinline__ void write_partial_gradients(const Arguments& args, Shared<size>& s,
                                                        int slot, int consumer,
                                                        QueryGradients<T, size>& gradients,
                                                        int consumer_barrier) {
  const WorkItem& item = s.item[slot];
  const int thread = threadIdx.x % warpgroup;
  float(&warp_sums)[warpgroup / 32] = s.log_scale_sums[consumer];
  const float warp_sum =
      lane_sum<32>(gradients.correct_rounding(args, item, s.initial_grad_logits[consumer]));
  if (thread % 32 == 0) warp_sums[thread / 32] = warp_sum;
  wait_named(consumer_barrier, warpgroup);
  const int64_t sequence = static_cast<int64_t>(item.batch) * args.heads + item.head;
  float* partial = args.partial.at(sequence, item.row / tile_rows + consumer);
  const TileRange& visible = item.visible[consumer];
  if (thread < args.partial.key_columns) {
    // Where no tile is visible to these rows, their stationary tile may not have been loaded.
    partial[thread] = visible.begin < visible.end
                          ? weighted_column_sum<T>(s.initial_grad_logits[consumer],
                                                   s.stationary[slot][consumer].first, thread)
                          : 0;
  }
  if (thread == 0) {
    partial[args.partial.key_columns] =
        (warp_sums[0] + warp_sums[1]) + (warp_sums[2] + warp_sums[3]);
  }
}

}  // namespace zerotuning::attention::hopper::backward
