// Mathematics of Hopper's forward kernel: log_scale, the mask, the online softmax, the results.
//
// For a tile of keys, with the running row_max m, row_sum l and output O of a row:
//   S = Q K^T + log_scale / scale for scaled keys, -inf for keys that are not visible
//   m' = max(m, max S);  r = exp(scale (m - m'));  P = exp(scale (S - m'))
//   l = r l + Σ P;  O = r O + P V
// At the end output = O / l and logsumexp = scale m + log l.
#pragma once

#include "attention/cuda/hopper/forward/copies.cuh"

namespace zerotuning::attention::hopper::forward {

constexpr int turn_barrier = 1;  // + consumer: named barrier, the consumer may start its products

// The mask and scale of a consumer's 64 query rows.
struct RowVisibility : Visibility {
  int real_begin, real_end;  // keys between these are real: the mask need not be read
  int position;              // of the consumer's first row among the keys
  float log_scale;           // divided by scale: in the units of Q K^T
};

__device__ __forceinline__ RowVisibility visibility_of(const Arguments& args, const WorkTile& work,
                                                       int consumer) {
  const CudaGeometry& g = args.geometry;
  const SampleGeometry sample = sample_geometry(g, work.batch, args.queries, args.keys);
  const float log_scale = log_scale_of<float>(args, work.batch, work.head);
  return {{sample, g.window, args.keys},
          sample.first_key,
          g.end_key ? g.end_key[work.batch] : 0,
          work.position + consumer * warpgroup_rows,
          log_scale / args.scale};
}

// Where γ enters the softmax: adds log_scale to the logits of scaled keys.
template <int tile_keys>
__device__ __forceinline__ void add_log_scale(float (&logits)[tile_keys / 2],
                                              const RowVisibility& v, int first) {
  if (v.span_begin >= first + tile_keys || v.span_end <= first) return;
#pragma unroll
  for (int i = 0; i < tile_keys / 2; ++i) {
    if (v.is_scaled(first + column_at(i))) logits[i] += v.log_scale;
  }
}

// Replaces logits of keys that a row may not attend to by -inf; `first` is the tile's first key.
// Tiles without such keys are not changed.
template <int tile_keys>
__device__ __forceinline__ void apply_mask(float (&logits)[tile_keys / 2], const RowVisibility& v,
                                           int first) {
  const int last = first + tile_keys;
  const int last_row = v.position + warpgroup_rows - 1;
  if (last - 1 > v.position || (v.window && first <= last_row - v.window)) {
#pragma unroll
    for (int i = 0; i < tile_keys / 2; ++i) {
      const int key = first + column_at(i), position = v.position + row_at(i);
      if (key > position || (v.window && key <= position - v.window)) logits[i] = -INFINITY;
    }
  }
  const bool is_real = first >= v.real_begin && last <= v.real_end;
  if (v.key_mask && !is_real && !all_real<tile_keys>(v.key_mask, first, v.keys)) {
#pragma unroll
    for (int i = 0; i < tile_keys / 2; ++i) {
      const int key = first + column_at(i);
      if (key >= v.keys || !v.key_mask[key]) logits[i] = -INFINITY;
    }
  }
}

// The online softmax of a thread's two rows.
struct OnlineSoftmax {
  float row_max[2] = {-INFINITY, -INFINITY};
  float row_sum[2] = {0, 0};  // of the thread's own columns
  float rescale[2];           // factor of earlier sums after the latest step

  // Turns logits into weights relative to the new row_max.
  template <int count>
  __device__ __forceinline__ void softmax_step(float (&logits)[count], float scale_log2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float new_max = logits[2 * half];
#pragma unroll
      for (int i = 0; i < count; i += 4)
        new_max = fmaxf(new_max, fmaxf(logits[i + 2 * half], logits[i + 2 * half + 1]));
      new_max = fmaxf(row_max[half], quad_max(new_max));
      const float offset = new_max == -INFINITY ? 0 : new_max * scale_log2;
      rescale[half] = exp2_fast(row_max[half] * scale_log2 - offset);
      row_max[half] = new_max;
      float sum = 0;
#pragma unroll
      for (int i = 0; i < count; i += 4) {
#pragma unroll
        for (int j = i + 2 * half; j < i + 2 * half + 2; ++j) {
          logits[j] = exp2_fast(fmaf(logits[j], scale_log2, -offset));
          sum += logits[j];
        }
      }
      row_sum[half] = row_sum[half] * rescale[half] + sum;
    }
  }
};

// Divides by row_sum, and writes the consumer's rows of output, output_minus_initial_value and
// logsumexp. Rows that attend to no key get output 0 and logsumexp -inf.
template <typename T, typename C>
__device__ __forceinline__ void write_results(const Arguments& args, const WorkTile& work,
                                              int consumer, float (&output)[C::value_size / 2],
                                              const OnlineSoftmax& softmax, uint16_t* output_tile) {
  const int thread = threadIdx.x % warpgroup, lane = thread % 32, warp = thread / 32;
  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float row_sum = quad_sum(softmax.row_sum[half]);
    factor[half] = row_sum == 0 ? 0 : 1 / row_sum;
    const int row = work.row + consumer * warpgroup_rows + warp * 16 + lane / 4 + 8 * half;
    if (args.logsumexp.data && lane % 4 == 0 && row < args.queries) {
      *written_row_of<float>(args.logsumexp, work.batch, work.head, row) =
          row_sum == 0 ? -INFINITY : softmax.row_max[half] * args.scale + logf(row_sum);
    }
  }
  // The first scaled key's value, two columns a register: it is loaded while the output is written.
  uint32_t initial_value[C::value_size / 8];
  if (args.value_rows.data) {
    const SampleGeometry g = sample_geometry(args.geometry, work.batch, args.queries, args.keys);
    const T* value = row_of<T>(args.value_rows, work.batch, work.head / args.group, g.span_begin);
#pragma unroll
    for (int i = 0; i < C::value_size / 8; ++i) {
      const int column = column_at(4 * i);
      const bool exists = g.span_begin < g.span_end && column < args.value_columns;
      initial_value[i] = exists ? *reinterpret_cast<const uint32_t*>(value + column) : 0;
    }
  }
  store_rows<T, C>(&args.output, work, consumer, output, factor, output_tile);
  if (!args.value_rows.data) return;
#pragma unroll
  for (int i = 0; i < C::value_size / 2; ++i) {
    const T* pair = reinterpret_cast<const T*>(&initial_value[i / 4]);
    output[i] = fmaf(output[i], factor[i / 2 % 2], -widened(pair[i % 2]));
  }
  store_rows<T, C>(&args.output_minus_initial_value, work, consumer, output, {1, 1}, output_tile);
}

// A consumer warpgroup: attention of its 64 rows of each of the block's work tiles, key tiles from
// last to first. The products for the next tile's logits run together with the products that add
// the previous tile's values.
template <typename T, typename C>
__device__ __forceinline__ void compute_tiles(const Arguments& args, Shared<C>& s) {
  // Long: one software pipeline whose stages share registers. Cut into functions, the pipeline
  // compiled to more instructions.
  const int consumer = threadIdx.x / warpgroup - 1;
  const float scale_log2 = args.scale * log2_e;
  PipelineState<C::query_stages> queries;
  PipelineState<stages> keys, values;
  if (C::consumers == 2 && consumer == 0) arrive_named(turn_barrier, 2 * warpgroup);
  for (int round = 0; round * gridDim.x < args.tiles; ++round) {
    const int tile = tile_of_round(round);
    if (tile >= args.tiles) continue;
    const WorkTile work = work_tile<C>(args, tile);
    float output[C::value_size / 2];
#pragma unroll
    for (float& x : output) x = 0;
    OnlineSoftmax softmax;
    const bool has_keys = work.has_keys();
    const int q = queries.stage();
    const uint16_t* query = s.query[q] + consumer * warpgroup_rows * block_columns;
    if (has_keys || !C::has_output_tile) {
      wait(&s.query_full[q], queries.parity());
      ++queries.count;
    }
    if (has_keys) {
      const RowVisibility visibility = visibility_of(args, work, consumer);
      constexpr int head_size = C::head_size, value_size = C::value_size, tile_keys = C::tile_keys,
                    tile_rows = C::tile_rows;
      constexpr bool alternates = C::consumers == 2;
      constexpr int turn_threads = 2 * warpgroup;
      float logits[tile_keys / 2];
      uint32_t weights[tile_keys / 16][4];
      int t = work.key_tile_end - 1;
      wait(&s.key_full[keys.stage()], keys.parity());
      start_product_with_transpose<T, head_size, tile_rows, tile_keys>(logits, query,
                                                                       s.key[keys.stage()]);
      wait_products<0>();
      fence_registers(logits);
      arrive_warp(&s.key_empty[keys.stage()]);
      ++keys.count;
      add_log_scale<tile_keys>(logits, visibility, t * tile_keys);
      apply_mask<tile_keys>(logits, visibility, t * tile_keys);
      softmax.softmax_step(logits, scale_log2);
      to_left_operand<T>(logits, weights);
      for (--t; t >= work.key_tile_begin; --t) {
        wait(&s.key_full[keys.stage()], keys.parity());
        if (alternates) wait_named(turn_barrier + consumer, turn_threads);
        start_product_with_transpose<T, head_size, tile_rows, tile_keys>(logits, query,
                                                                         s.key[keys.stage()]);
        wait(&s.value_full[values.stage()], values.parity());
        start_multiply_add<T, value_size, tile_keys>(output, weights, s.value[values.stage()]);
        if (alternates) arrive_named(turn_barrier + 1 - consumer, turn_threads);
        wait_products<1>();
        fence_registers(logits);
        arrive_warp(&s.key_empty[keys.stage()]);
        ++keys.count;
        add_log_scale<tile_keys>(logits, visibility, t * tile_keys);
        apply_mask<tile_keys>(logits, visibility, t * tile_keys);
        softmax.softmax_step(logits, scale_log2);
        wait_products<0>();
        fence_registers(output);
        arrive_warp(&s.value_empty[values.stage()]);
        ++values.count;
        to_left_operand<T>(logits, weights);
#pragma unroll
        for (int i = 0; i < value_size / 2; ++i) output[i] *= softmax.rescale[i / 2 % 2];
      }
      if (C::has_output_tile) arrive_warp(&s.query_empty[q]);
      wait(&s.value_full[values.stage()], values.parity());
      start_multiply_add<T, value_size, tile_keys>(output, weights, s.value[values.stage()]);
      wait_products<0>();
      fence_registers(output);
      arrive_warp(&s.value_empty[values.stage()]);
      ++values.count;
    }
    write_results<T, C>(args, work, consumer, output, softmax, s.output());
    if (!C::has_output_tile) {
      if (threadIdx.x % warpgroup == 0) wait_until_stores_have_read();
      wait_named(output_barrier + consumer, warpgroup);
      arrive_warp(&s.query_empty[q]);
    }
  }
  if (threadIdx.x % warpgroup == 0) wait_until_stores_have_read();
}

}  // namespace zerotuning::attention::hopper::forward
