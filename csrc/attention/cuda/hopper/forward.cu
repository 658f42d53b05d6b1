// Forward attention on Hopper: persistent blocks, in which one warp feeds tiles of K and V through
// the bulk copy engine to warpgroups of 64 query rows each. Two of them in one block take turns:
// while one multiplies, the other does its softmax. Short sequences are a matter of copying: there
// two smaller blocks a multiprocessor, a warpgroup each, cover each other's waits. The scaled keys
// cost one addition in the tile that holds them, so this does what an untuned kernel does.
#include <algorithm>
#include <cmath>

#include "attention/cuda/hopper/tiles.cuh"
#include "attention/cuda_forward.h"

namespace zerotuning::attention {
namespace hopper {
namespace {

using namespace device;

constexpr int consumer_rows = 64;
constexpr int stages = 2;          // of K and V
constexpr int turn_barrier = 1;    // + consumer: it may multiply
constexpr int output_barrier = 4;  // + consumer: its own threads

struct Arguments {
  CUtensorMap query, key, value, output, output_minus_initial_value;
  CudaGeometry geometry;
  const float* log_scale;
  int64_t log_scale_batch_stride, log_scale_head_stride;
  float* logsumexp;  // or null
  int64_t logsumexp_batch_stride, logsumexp_head_stride, logsumexp_row_stride;
  Strided4<const void>
      value_rows;  // value's, where they lie; null: no output_minus_initial_value is wanted
  int heads, group, queries, keys;
  int value_columns, row_tiles, tiles, section;
  float scale;
};

// How a kernel cuts the work. Head sizes are rounded up to whole blocks of columns; the copy engine
// fills them with zeros.
template <int head_size_, int value_size_, int tile_keys_, int consumers_ = 2>
struct Cut {
  static constexpr int head_size = head_size_, value_size = value_size_, tile_keys = tile_keys_;
  static constexpr int consumers = consumers_;  // warpgroups that compute
  static constexpr int tile_rows = consumers * consumer_rows;
  static constexpr int threads = (1 + consumers) * warpgroup;
  static constexpr int blocks = consumers == 1 ? 2 : 1;  // a multiprocessor
  static constexpr int consumer_registers = consumers == 1 ? 232 : 240;
  // The widest heads leave no room for it: the output then takes the query's place.
  static constexpr bool own_output = head_size < 256;
  static constexpr int query_stages = own_output && blocks == 1 ? 2 : 1;
};

template <typename C>
struct Shared {
  static constexpr bool own_output = C::own_output;
  static constexpr int query_stages = C::query_stages;
  static constexpr int head_size = C::head_size, value_size = C::value_size,
                       tile_keys = C::tile_keys, tile_rows = C::tile_rows;
  alignas(1024) uint16_t query[query_stages][tile_rows * head_size];
  alignas(1024) uint16_t key[stages][tile_keys * head_size];
  alignas(1024) uint16_t value[stages][tile_keys * value_size];
  alignas(1024) uint16_t own[own_output ? tile_rows * value_size : 512];
  uint64_t query_full[query_stages], query_empty[query_stages];
  uint64_t key_full[stages], key_empty[stages], value_full[stages], value_empty[stages];

  __device__ uint16_t* output() { return own_output ? own : query[0]; }
};

// One tile of queries and the tiles of keys [key_tile_begin, key_tile_end) that they see.
struct Work {
  int batch, head, row;  // first query row
  int position;          // of that row among the keys
  int key_tile_begin, key_tile_end;
};

// Longest tiles first, section by section: a section is as many heads as keep K and V in the cache.
template <typename C>
__device__ __forceinline__ Work work_of(const Arguments& a, int tile) {
  const int sequences = a.tiles / a.row_tiles, section = tile / (a.section * a.row_tiles);
  const int in_section = tile - section * a.section * a.row_tiles;
  const int width = min(a.section, sequences - section * a.section);
  const int sequence = section * a.section + in_section % width;
  constexpr int tile_rows = C::tile_rows, tile_keys = C::tile_keys;
  Work w;
  w.batch = sequence / a.heads;
  w.head = sequence % a.heads;
  w.row = (a.row_tiles - 1 - in_section / width) * tile_rows;
  const SampleGeometry g = sample_geometry(a.geometry, w.batch, a.queries, a.keys);
  w.position = g.start + w.row;
  const int end = min(g.start + min(w.row + tile_rows, a.queries), g.past_key);
  const int window = a.geometry.window;
  const int begin = window ? max(g.first_key, w.position - window + 1) : g.first_key;
  w.key_tile_begin = begin / tile_keys;
  w.key_tile_end = begin < end ? (end + tile_keys - 1) / tile_keys : w.key_tile_begin;
  return w;
}

// The block's tiles: every other round in reverse, so that long and short ones even out.
__device__ __forceinline__ int tile_of_round(int round) {
  const int blocks = gridDim.x, block = blockIdx.x;
  return round * blocks + (round & 1 ? blocks - 1 - block : block);
}

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

template <typename C>
__device__ __forceinline__ void produce(const Arguments& a, Shared<C>& s) {
  constexpr int head_size = C::head_size, value_size = C::value_size, tile_keys = C::tile_keys,
                tile_rows = C::tile_rows;
  Ring<C::query_stages> queries;
  Ring<stages> keys, values;
  for (int round = 0; round * gridDim.x < a.tiles; ++round) {
    const int tile = tile_of_round(round);
    if (tile >= a.tiles) continue;
    const Work w = work_of<C>(a, tile);
    const bool blind = w.key_tile_begin == w.key_tile_end;
    if (blind && s.own_output) continue;
    const int key_head = w.head / a.group;
    const int q = queries.stage();
    wait(&s.query_empty[q], queries.parity() ^ 1);
    ++queries.count;
    if (blind) {  // its output takes the query's place all the same
      arrive(&s.query_full[q]);
      continue;
    }
    load_tile<head_size, tile_rows>(s.query[q], &a.query, &s.query_full[q], w.row, w.head, w.batch);
    for (int t = w.key_tile_end - 1; t >= w.key_tile_begin; --t) {
      wait(&s.key_empty[keys.stage()], keys.parity() ^ 1);
      load_tile<head_size, tile_keys>(s.key[keys.stage()], &a.key, &s.key_full[keys.stage()],
                                      t * tile_keys, key_head, w.batch);
      ++keys.count;
      wait(&s.value_empty[values.stage()], values.parity() ^ 1);
      load_tile<value_size, tile_keys>(s.value[values.stage()], &a.value,
                                       &s.value_full[values.stage()], t * tile_keys, key_head,
                                       w.batch);
      ++values.count;
    }
  }
}

// What a consumer's logits are changed by before the softmax: scaled keys, and keys out of sight.
struct RowSight : Sight {
  int real_begin, real_end;  // keys of the mask that are known to be real
  int position;              // of the warpgroup's first row
  float bias;                // log_scale in units of unscaled logits
};

__device__ __forceinline__ RowSight sight_of(const Arguments& a, const Work& w, int consumer) {
  const CudaGeometry& g = a.geometry;
  const SampleGeometry sample = sample_geometry(g, w.batch, a.queries, a.keys);
  const float log_scale =
      a.log_scale[w.batch * a.log_scale_batch_stride + w.head * a.log_scale_head_stride];
  return {{sample, g.window, a.keys},
          sample.first_key,
          g.end_key ? g.end_key[w.batch] : 0,
          w.position + consumer * consumer_rows,
          log_scale / a.scale};
}

template <int tile_keys>
__device__ __forceinline__ void look(float (&logits)[tile_keys / 2], const RowSight& s, int first) {
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x % warpgroup / 32 * 16 + lane / 4;
  const int last = first + tile_keys;
  if (s.span_begin < last && s.span_end > first) {
#pragma unroll
    for (int i = 0; i < tile_keys / 2; ++i) {
      const int key = first + i / 4 * 8 + lane % 4 * 2 + (i & 1);
      if (s.scaled(key)) logits[i] += s.bias;
    }
  }
  const int last_row = s.position + consumer_rows - 1;
  if (last - 1 > s.position || (s.window && first <= last_row - s.window)) {
    const int row = s.position + warp_row;
#pragma unroll
    for (int i = 0; i < tile_keys / 2; ++i) {
      const int key = first + i / 4 * 8 + lane % 4 * 2 + (i & 1), position = row + (i & 2) * 4;
      if (key > position || (s.window && key <= position - s.window)) logits[i] = -INFINITY;
    }
  }
  const bool known = first >= s.real_begin && last <= s.real_end;
  if (s.key_mask && !known && !all_real<tile_keys>(s.key_mask, first, s.keys)) {
#pragma unroll
    for (int i = 0; i < tile_keys / 2; ++i) {
      const int key = first + i / 4 * 8 + lane % 4 * 2 + (i & 1);
      if (key >= s.keys || !s.key_mask[key]) logits[i] = -INFINITY;
    }
  }
}

// The running softmax of a thread's two rows.
struct Softmax {
  float largest[2] = {-INFINITY, -INFINITY};
  float total[2] = {0, 0};  // of the thread's own columns
  float rescale[2];         // by what the step before changes earlier sums

  // Turns logits into weights relative to the largest so far.
  template <int count>
  __device__ __forceinline__ void step(float (&logits)[count], float scale_log2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = logits[2 * half];
#pragma unroll
      for (int i = 0; i < count; i += 4)
        top = fmaxf(top, fmaxf(logits[i + 2 * half], logits[i + 2 * half + 1]));
      top = fmaxf(largest[half], quad_max(top));
      const float zero = top == -INFINITY ? 0 : top * scale_log2;
      rescale[half] = exp2_fast(largest[half] * scale_log2 - zero);
      largest[half] = top;
      float sum = 0;
#pragma unroll
      for (int i = 0; i < count; i += 4) {
#pragma unroll
        for (int j = i + 2 * half; j < i + 2 * half + 2; ++j) {
          logits[j] = exp2_fast(fmaf(logits[j], scale_log2, -zero));
          sum += logits[j];
        }
      }
      total[half] = total[half] * rescale[half] + sum;
    }
  }
};

// Writes the tile's rows of numbers times their row half's factor, by way of shared memory.
template <typename T, typename C>
__device__ __forceinline__ void write_rows(const CUtensorMap* map, const Work& w, int consumer,
                                           const float (&numbers)[C::value_size / 2],
                                           const float (&factor)[2], uint16_t* shared_output) {
  constexpr int value_size = C::value_size, tile_rows = C::tile_rows;
  const bool leads = threadIdx.x % warpgroup == 0;
  // The store before must have read its rows of shared memory.
  if (leads) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  wait_named(output_barrier + consumer, warpgroup);
  write_tile<T, value_size, tile_rows>(shared_output, consumer * consumer_rows, numbers, factor);
  wait_named(output_barrier + consumer, warpgroup);
  if (!leads) return;
#pragma unroll
  for (int block = 0; block < value_size / block_columns; ++block) {
    store_box(map, shared_output + (block * tile_rows + consumer * consumer_rows) * block_columns,
              block * block_columns, w.row + consumer * consumer_rows, w.head, w.batch);
  }
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Divides by the softmax's totals, and writes the tile's rows of output, output_minus_initial_value
// and logsumexp.
template <typename T, typename C>
__device__ __forceinline__ void finish(const Arguments& a, const Work& w, int consumer,
                                       float (&output)[C::value_size / 2], const Softmax& softmax,
                                       uint16_t* shared_output) {
  const int thread = threadIdx.x % warpgroup, lane = thread % 32, warp = thread / 32;
  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = quad_sum(softmax.total[half]);
    factor[half] = total == 0 ? 0 : 1 / total;
    const int row = w.row + consumer * consumer_rows + warp * 16 + lane / 4 + 8 * half;
    if (a.logsumexp && lane % 4 == 0 && row < a.queries) {
      a.logsumexp[w.batch * a.logsumexp_batch_stride + w.head * a.logsumexp_head_stride +
                  row * a.logsumexp_row_stride] =
          total == 0 ? -INFINITY : softmax.largest[half] * a.scale + logf(total);
    }
  }
  // The first scaled key's value, two columns a register, is on its way while the output is
  // written.
  uint32_t first[C::value_size / 8];
  if (a.value_rows.data) {
    const SampleGeometry g = sample_geometry(a.geometry, w.batch, a.queries, a.keys);
    const T* value = row_of<T>(a.value_rows, w.batch, w.head / a.group, g.span_begin);
#pragma unroll
    for (int i = 0; i < C::value_size / 8; ++i) {
      const int column = column_at(4 * i);
      const bool real = g.span_begin < g.span_end && column < a.value_columns;
      first[i] = real ? *reinterpret_cast<const uint32_t*>(value + column) : 0;
    }
  }
  write_rows<T, C>(&a.output, w, consumer, output, factor, shared_output);
  if (!a.value_rows.data) return;
#pragma unroll
  for (int i = 0; i < C::value_size / 2; ++i) {
    const T* pair = reinterpret_cast<const T*>(&first[i / 4]);
    output[i] = fmaf(output[i], factor[i / 2 % 2], -widened(pair[i % 2]));
  }
  write_rows<T, C>(&a.output_minus_initial_value, w, consumer, output, {1, 1}, shared_output);
}

template <typename T, typename C>
__device__ __forceinline__ void consume(const Arguments& a, Shared<C>& s) {
  constexpr int head_size = C::head_size, value_size = C::value_size, tile_keys = C::tile_keys,
                tile_rows = C::tile_rows;
  constexpr bool turns = C::consumers == 2;
  constexpr int turn_threads = 2 * warpgroup;
  const int consumer = threadIdx.x / warpgroup - 1;
  const float scale_log2 = a.scale * 1.44269504f;
  Ring<C::query_stages> queries;
  Ring<stages> keys, values;
  if (turns && consumer == 0) arrive_named(turn_barrier, turn_threads);
  for (int round = 0; round * gridDim.x < a.tiles; ++round) {
    const int tile = tile_of_round(round);
    if (tile >= a.tiles) continue;
    const Work w = work_of<C>(a, tile);
    float output[value_size / 2];
#pragma unroll
    for (float& x : output) x = 0;
    Softmax softmax;
    const bool blind = w.key_tile_begin == w.key_tile_end;
    const int q = queries.stage();
    const uint16_t* query = s.query[q] + consumer * consumer_rows * block_columns;
    if (!blind || !s.own_output) {
      wait(&s.query_full[q], queries.parity());
      ++queries.count;
    }
    if (!blind) {
      const RowSight sight = sight_of(a, w, consumer);
      float logits[tile_keys / 2];
      uint32_t weights[tile_keys / 16][4];
      int t = w.key_tile_end - 1;
      wait(&s.key_full[keys.stage()], keys.parity());
      start_row_products<T, head_size, tile_rows, tile_keys>(logits, query, s.key[keys.stage()]);
      wait_products<0>();
      pin(logits);
      arrive_warp(&s.key_empty[keys.stage()]);
      ++keys.count;
      look<tile_keys>(logits, sight, t * tile_keys);
      softmax.step(logits, scale_log2);
      to_left_matrices<T>(logits, weights);
      for (--t; t >= w.key_tile_begin; --t) {
        wait(&s.key_full[keys.stage()], keys.parity());
        if (turns) wait_named(turn_barrier + consumer, turn_threads);
        start_row_products<T, head_size, tile_rows, tile_keys>(logits, query, s.key[keys.stage()]);
        wait(&s.value_full[values.stage()], values.parity());
        start_weighted_sums<T, value_size, tile_keys>(output, weights, s.value[values.stage()]);
        if (turns) arrive_named(turn_barrier + 1 - consumer, turn_threads);
        wait_products<1>();
        pin(logits);
        arrive_warp(&s.key_empty[keys.stage()]);
        ++keys.count;
        look<tile_keys>(logits, sight, t * tile_keys);
        softmax.step(logits, scale_log2);
        wait_products<0>();
        pin(output);
        arrive_warp(&s.value_empty[values.stage()]);
        ++values.count;
        to_left_matrices<T>(logits, weights);
#pragma unroll
        for (int i = 0; i < value_size / 2; ++i) output[i] *= softmax.rescale[i / 2 % 2];
      }
      if (s.own_output) arrive_warp(&s.query_empty[q]);
      wait(&s.value_full[values.stage()], values.parity());
      start_weighted_sums<T, value_size, tile_keys>(output, weights, s.value[values.stage()]);
      wait_products<0>();
      pin(output);
      arrive_warp(&s.value_empty[values.stage()]);
      ++values.count;
    }
    finish<T, C>(a, w, consumer, output, softmax, s.output());
    if (!s.own_output) {
      if (threadIdx.x % warpgroup == 0) {
        asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
      }
      wait_named(output_barrier + consumer, warpgroup);
      arrive_warp(&s.query_empty[q]);
    }
  }
  if (threadIdx.x % warpgroup == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

template <typename T, typename C>
__global__ void __launch_bounds__(C::threads, C::blocks)
    attend(const __grid_constant__ Arguments a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char memory[];
  auto& s = *reinterpret_cast<Shared<C>*>((reinterpret_cast<uintptr_t>(memory) + 1023) &
                                          ~static_cast<uintptr_t>(1023));
  if (threadIdx.x == 0) {
    prefetch_map(&a.query);
    prefetch_map(&a.key);
    prefetch_map(&a.value);
    prefetch_map(&a.output);
    constexpr int consumer_warps = C::consumers * warpgroup / 32;
    for (int i = 0; i < s.query_stages; ++i) {
      init(&s.query_full[i], 1);
      init(&s.query_empty[i], consumer_warps);
    }
    for (int i = 0; i < stages; ++i) {
      init(&s.key_full[i], 1);
      init(&s.key_empty[i], consumer_warps);
      init(&s.value_full[i], 1);
      init(&s.value_empty[i], consumer_warps);
    }
    publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x < warpgroup) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == 0) produce(a, s);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(C::consumer_registers));
    consume<T>(a, s);
  }
#endif
}

// As many heads of all samples as leave K and V in half of the level-2 cache: whole groups.
int section_of(const CudaAttention& c) {
  constexpr int64_t cache_bytes = 24 << 20;
  const int64_t bytes = int64_t{c.keys} * (c.head_size + c.value_head_size) * 2;
  const int group = c.heads / c.key_heads;
  const int64_t groups = std::max<int64_t>(1, cache_bytes / bytes);
  return static_cast<int>(std::min<int64_t>(groups * group, int64_t{c.batch} * c.heads));
}

template <typename T, typename C>
cudaError_t launch(const CudaAttention& c, int multiprocessors, cudaStream_t stream) {
  constexpr int tile_rows = C::tile_rows, tile_keys = C::tile_keys;
  Arguments a{};
  for (const cudaError_t error :
       {make_map(&a.query, c.dtype, c.query, c.batch, c.heads, c.queries, c.head_size, tile_rows),
        make_map(&a.key, c.dtype, c.key, c.batch, c.key_heads, c.keys, c.head_size, tile_keys),
        make_map(&a.value, c.dtype, c.value, c.batch, c.key_heads, c.keys, c.value_head_size,
                 tile_keys),
        make_map(&a.output, c.dtype, c.output, c.batch, c.heads, c.queries, c.value_head_size,
                 consumer_rows)}) {
    if (error != cudaSuccess) return error;
  }
  if (c.output_minus_initial_value.data) {
    const cudaError_t error =
        make_map(&a.output_minus_initial_value, c.dtype, c.output_minus_initial_value, c.batch,
                 c.heads, c.queries, c.value_head_size, consumer_rows);
    if (error != cudaSuccess) return error;
    a.value_rows = c.value;
    a.value_columns = c.value_head_size;
  }
  a.geometry = c.geometry;
  a.log_scale = static_cast<const float*>(c.log_scale);
  a.log_scale_batch_stride = c.log_scale_batch_stride;
  a.log_scale_head_stride = c.log_scale_head_stride;
  a.logsumexp = static_cast<float*>(c.logsumexp.data);
  a.logsumexp_batch_stride = c.logsumexp.batch_stride;
  a.logsumexp_head_stride = c.logsumexp.head_stride;
  a.logsumexp_row_stride = c.logsumexp.row_stride;
  a.heads = c.heads;
  a.group = c.heads / c.key_heads;
  a.queries = c.queries;
  a.keys = c.keys;
  a.row_tiles = (c.queries + tile_rows - 1) / tile_rows;
  a.tiles = a.row_tiles * c.batch * c.heads;
  a.section = section_of(c);
  a.scale = static_cast<float>(c.scale);
  const auto kernel = attend<T, C>;
  constexpr int bytes = sizeof(Shared<C>) + 1024;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<std::min(a.tiles, multiprocessors * C::blocks), C::threads, bytes, stream>>>(a);
  return cudaGetLastError();
}

// Up to so many keys; as fast at 1 x 1024, slower from 4 x 1024 on.
constexpr int most_keys_of_small_blocks = 512;

template <typename T>
cudaError_t launch_for_size(const CudaAttention& c, int multiprocessors, cudaStream_t stream) {
  const bool small = c.keys <= most_keys_of_small_blocks;
  if (c.head_size <= 64 && c.value_head_size <= 64) {
    return small ? launch<T, Cut<64, 64, 64, 1>>(c, multiprocessors, stream)
                 : launch<T, Cut<64, 64, 128>>(c, multiprocessors, stream);
  }
  if (c.head_size <= 128 && c.value_head_size <= 128) {
    return small ? launch<T, Cut<128, 128, 64, 1>>(c, multiprocessors, stream)
                 : launch<T, Cut<128, 128, 128>>(c, multiprocessors, stream);
  }
  if (c.head_size <= 192 && c.value_head_size <= 128)
    return launch<T, Cut<192, 128, 64>>(c, multiprocessors, stream);
  return launch<T, Cut<256, 256, 64>>(c, multiprocessors, stream);
}

}  // namespace
}  // namespace hopper

cudaError_t attention_hopper(const CudaAttention& c, int32_t multiprocessors, cudaStream_t stream) {
  return c.dtype == DType::float16
             ? hopper::launch_for_size<__half>(c, multiprocessors, stream)
             : hopper::launch_for_size<__nv_bfloat16>(c, multiprocessors, stream);
}

}  // namespace zerotuning::attention
