// Backward attention on Hopper in three launches: one for what each query row needs, one for all
// gradients but two, γ's and the first scaled key's, whose sums over rows the last one adds. The
// second has two kinds of items of 128 rows, a warpgroup for 64 of them:
//   128 keys of a key head, past which the queries of its heads go:
//     P^T = exp(scale K Q^T + bias - lse), dS^T = P^T (V dO^T - Δ);  dV += P^T dO, dK += dS^T Q
//   128 queries of a head, past which the keys go:
//     dS = P (dO V^T - Δ);  dQ += dS K
// So P and dS never leave the registers, nothing is added by atomics, and a group's heads are
// summed in registers; the price is that P and dS are made twice.
//
// dS of the scaled keys is made of the other keys' as well (RowShare in cuda_device.cuh), which the
// items of queries have all of: they add dS_0 k_0 of the first scaled key to dQ, and leave sums of
// dS_0 q as parts of k_0's gradient and of dS as parts of γ's. So rounding the output costs γ's
// nothing, and those of query and key only where another key has nearly all of the weight.
//
// Blocks stay and take the next item when they are through, heaviest first. In a block two warps
// feed tiles through the bulk copy engine, one writes results back through it, and two warpgroups
// compute. An item's own tiles give their place to its gradients.
#include <algorithm>
#include <cmath>

#include "attention/cuda/hopper/tiles.cuh"
#include "attention/cuda/row_parts.cuh"
#include "attention/cuda/rows.cuh"
#include "attention/cuda_backward.h"

namespace zerotuning::attention {
namespace hopper {
namespace {

using namespace device;

constexpr int consumers = 2;  // warpgroups that compute
constexpr int tile_rows = 64;
constexpr int item_rows = consumers * tile_rows;
constexpr int tile_numbers = tile_rows / 2;  // a thread's share of 64 x 64 pairs
constexpr int threads = (1 + consumers) * warpgroup;
constexpr int items = 2;         // whose own tiles are in shared memory
constexpr int stages = 3;        // of the tiles that go past
constexpr int sums_barrier = 1;  // + consumer: its own threads
constexpr int row_threads = 256;
constexpr float log2_e = 1.44269504f;

// Of 64 query rows: logsumexp in base 2, infinite where no key is seen or no row is, and do·o.
struct RowTerms {
  float logsumexp[tile_rows], delta[tile_rows];
};

// Items of one kind: of each of `sequences` heads of all samples, `tiles`.
struct Order {
  int sequences, tiles;
  int section;  // sequences whose tiles that go past stay in the cache together
};

struct Arguments {
  CUtensorMap query, key, value, grad_output, grad_query, grad_key, grad_value;
  CudaGeometry geometry;
  const float* log_scale;
  int64_t log_scale_batch_stride, log_scale_head_stride;
  Strided4<const void> key_rows;  // key's, where they lie
  const RowTerms* terms;          // [batch, heads, tiles of 64 queries]
  RowParts parts;                 // one for 64 queries; no value columns
  uint32_t* taken;                // items beyond the blocks' first ones
  Order key_order, query_order;
  int batch, heads, key_heads, group, queries, keys;
  float scale, scale_log2;
};

enum class Kind : int { keys, queries, none };

// The tiles that go past some rows and of which they see anything.
struct Range {
  int begin, end;
};

// Read where it lies, in shared memory: the sums leave no registers for it.
struct Item {
  SampleGeometry sample;
  int real_end;  // keys from sample.first_key to it are real
  Kind kind;
  int batch, head, row;  // head: of keys or of queries; first row
  Range tiles, seen[consumers];
};

// Of query and grad_output, or of key and value: what logits and what changes of weights are made
// of. Head sizes are rounded up to whole blocks of columns; the copy engine fills them with zeros.
template <int size>
struct Pair {
  alignas(1024) uint16_t first[tile_rows * size];
  alignas(1024) uint16_t second[tile_rows * size];
};

template <int size>
struct Shared {
  Pair<size> own[items][consumers];
  Pair<size> passing[stages];
  alignas(128) RowTerms terms[stages];  // of queries that go past
  Item item[items];
  float first_changes[consumers][tile_rows];  // dS of the first scaled key
  float log_scale_sums[consumers][warpgroup / 32];
  uint64_t item_set[items], own_full[items], own_written[items], own_empty[items];
  uint64_t passing_full[stages], passing_empty[stages];
};

// The items in order: heaviest first within a section.
struct Place {
  int sequence, rank;
};

__device__ __forceinline__ Place place_of(const Order& o, int index) {
  const int section = index / (o.section * o.tiles);
  const int in_section = index - section * o.section * o.tiles;
  const int width = min(o.section, o.sequences - section * o.section);
  return {section * o.section + in_section % width, in_section / width};
}

__device__ __forceinline__ Range passing_tiles(const Arguments& a, const Item& item, int row,
                                               int count) {
  const SampleGeometry& g = item.sample;
  const int window = a.geometry.window;
  int begin, end;
  if (item.kind == Kind::keys) {
    const int first = max(row, g.first_key), last = min(row + count, g.past_key) - 1;
    begin = max(first - g.start, 0);
    end = window ? min(last + window - g.start, a.queries) : a.queries;
    if (first > last) end = 0;
  } else {
    begin = window ? max(g.first_key, g.start + row - window + 1) : g.first_key;
    end = min(g.start + min(row + count, a.queries), g.past_key);
    if (row >= a.queries) end = 0;
  }
  if (begin >= end) return {0, 0};
  return {begin / tile_rows, (end + tile_rows - 1) / tile_rows};
}

__device__ __forceinline__ void set_item(const Arguments& a, int index, Item& item) {
  const int key_items = a.key_order.sequences * a.key_order.tiles;
  const int query_items = a.query_order.sequences * a.query_order.tiles;
  item.kind = Kind::none;
  if (index >= key_items + query_items) return;
  const bool of_keys = index < key_items;
  const Order& order = of_keys ? a.key_order : a.query_order;
  const Place place = place_of(order, of_keys ? index : index - key_items);
  const int heads = of_keys ? a.key_heads : a.heads;
  item.kind = of_keys ? Kind::keys : Kind::queries;
  item.batch = place.sequence / heads;
  item.head = place.sequence % heads;
  // The first keys are seen by most queries, the last queries see most keys.
  item.row = (of_keys ? place.rank : order.tiles - 1 - place.rank) * item_rows;
  item.sample = sample_geometry(a.geometry, item.batch, a.queries, a.keys);
  item.real_end = a.geometry.end_key ? a.geometry.end_key[item.batch] : a.keys;
  item.tiles = passing_tiles(a, item, item.row, item_rows);
  for (int i = 0; i < consumers; ++i)
    item.seen[i] = passing_tiles(a, item, item.row + i * tile_rows, tile_rows);
}

// Heads whose tiles go past an item, and the item's rows.
__device__ __forceinline__ int passing_heads(const Arguments& a, const Item& item) {
  return item.kind == Kind::keys ? a.group : 1;
}
__device__ __forceinline__ int rows_of(const Arguments& a, const Item& item) {
  return item.kind == Kind::keys ? a.keys : a.queries;
}

__device__ __forceinline__ const RowTerms* terms_of(const Arguments& a, int batch, int head,
                                                    int row) {
  const int64_t sequence = static_cast<int64_t>(batch) * a.heads + head;
  return a.terms + sequence * a.query_order.tiles * consumers + row / tile_rows;
}

// The warps that feed.

template <int size>
__device__ __forceinline__ void load_pair(Pair<size>& to, const CUtensorMap* first,
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
__device__ __forceinline__ void load_own(const Arguments& a, const Item& item,
                                         Pair<size> (&own)[consumers], uint64_t* barrier) {
  const bool of_keys = item.kind == Kind::keys;
  const CUtensorMap* first = of_keys ? &a.key : &a.query;
  const CUtensorMap* second = of_keys ? &a.value : &a.grad_output;
  const bool two = item.row + tile_rows < rows_of(a, item);
  expect_bytes(barrier, sizeof(Pair<size>) * (two ? 2 : 1));
  load_pair(own[0], first, second, barrier, item.row, item.head, item.batch);
  if (two) load_pair(own[1], first, second, barrier, item.row + tile_rows, item.head, item.batch);
}

template <int size>
__device__ __forceinline__ void feed_own(const Arguments& a, Shared<size>& s) {
  Ring<items> own;
#pragma unroll 1
  for (int index = blockIdx.x;; ++own.count) {
    const int slot = own.stage();
    Item& item = s.item[slot];
    wait(&s.own_empty[slot], own.parity() ^ 1);
    set_item(a, index, item);
    arrive(&s.item_set[slot]);
    if (item.kind == Kind::none) break;
    index = gridDim.x + atomicAdd(a.taken, 1u);
    if (item.tiles.begin < item.tiles.end) {
      load_own(a, item, s.own[slot], &s.own_full[slot]);
    } else {
      arrive(&s.own_full[slot]);
    }
  }
  arrive(&s.own_full[own.stage()]);
}

template <bool of_keys, int size>
__device__ __forceinline__ void load_passing(const Arguments& a, const Item& item, Shared<size>& s,
                                             Ring<stages>& passing) {
  const CUtensorMap* first = of_keys ? &a.query : &a.key;
  const CUtensorMap* second = of_keys ? &a.grad_output : &a.value;
#pragma unroll 1
  for (int i = 0; i < (of_keys ? a.group : 1); ++i) {
    const int head = of_keys ? item.head * a.group + i : item.head / a.group;
#pragma unroll 1
    for (int tile = item.tiles.begin; tile < item.tiles.end; ++tile, ++passing.count) {
      const int stage = passing.stage(), row = tile * tile_rows;
      uint64_t* full = &s.passing_full[stage];
      wait(&s.passing_empty[stage], passing.parity() ^ 1);
      expect_bytes(full, sizeof(Pair<size>) + (of_keys ? sizeof(RowTerms) : 0));
      load_pair(s.passing[stage], first, second, full, row, head, item.batch);
      if (of_keys) {
        load_bytes(&s.terms[stage], terms_of(a, item.batch, head, row), sizeof(RowTerms), full);
      }
    }
  }
}

template <int size>
__device__ __forceinline__ void feed_passing(const Arguments& a, Shared<size>& s) {
  Ring<stages> passing;
#pragma unroll 1
  for (Ring<items> own;; ++own.count) {
    const int slot = own.stage();
    wait(&s.item_set[slot], own.parity());
    const Item& item = s.item[slot];
    if (item.kind == Kind::none) return;
    if (item.kind == Kind::keys) {
      load_passing<true>(a, item, s, passing);
    } else {
      load_passing<false>(a, item, s, passing);
    }
    arrive(&s.own_empty[slot]);  // it has read the item
  }
}

// The warp that writes back.

template <int size>
__device__ __forceinline__ void store_tile(const CUtensorMap* map, const uint16_t* from, int row,
                                           int head, int batch) {
#pragma unroll
  for (int column = 0; column < size; column += block_columns)
    store_box(map, from + column * tile_rows, column, row, head, batch);
}

template <int size>
__device__ __forceinline__ void write_back(const Arguments& a, Shared<size>& s) {
#pragma unroll 1
  for (Ring<items> own;; ++own.count) {
    const int slot = own.stage();
    const Item& item = s.item[slot];
    wait(&s.own_full[slot], own.parity());
    if (item.kind == Kind::none) break;
    wait(&s.own_written[slot], own.parity());
#pragma unroll 1
    for (int consumer = 0; consumer < consumers; ++consumer) {
      const int row = item.row + consumer * tile_rows;
      const Pair<size>& from = s.own[slot][consumer];
      if (row >= rows_of(a, item)) break;
      if (item.kind == Kind::keys) {
        store_tile<size>(&a.grad_key, from.first, row, item.head, item.batch);
        store_tile<size>(&a.grad_value, from.second, row, item.head, item.batch);
      } else {
        store_tile<size>(&a.grad_query, from.first, row, item.head, item.batch);
      }
    }
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    arrive(&s.own_empty[slot]);
  }
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// The warpgroups that compute.

// Hides pairs that causality and window exclude, of 64 keys from `key` on and 64 queries from
// `position` on.
template <bool rows_are_keys>
__device__ __forceinline__ void hide(float (&logits)[tile_numbers], int key, int position,
                                     int window) {
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

// 64 keys, past which queries go: rows are keys. Logits become weights, changes of weights become
// gradients of logits.
template <typename T, int size>
struct KeySums {
  static constexpr Kind kind = Kind::keys;
  static constexpr int value_groups = 1;  // of products that start_value_sum starts

  float key[size / 2] = {}, value[size / 2] = {};
  float offset[2];  // of the logits of a thread's two keys, in base 2: -inf where one is not real
  bool scaled[2];

  __device__ __forceinline__ KeySums(const Arguments& a, const Item& item, int consumer) {
    const SampleGeometry& g = item.sample;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int own = item.row + consumer * tile_rows + row_at(2 * half);
      const bool real = own < a.keys && (!g.key_mask || g.key_mask[own]);
      offset[half] = real ? 0 : -INFINITY;
      scaled[half] = real && own >= g.span_begin && own < g.span_end;
    }
  }

  __device__ __forceinline__ void enter_head(const Arguments& a, const Item& item, int i) {
    if (!scaled[0] && !scaled[1]) return;
    const int head = item.head * a.group + i;
    const float bias =
        log2_e *
        a.log_scale[item.batch * a.log_scale_batch_stride + head * a.log_scale_head_stride];
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (scaled[half]) offset[half] = bias;
  }

  __device__ __forceinline__ void pin_sums() {
    pin(key);
    pin(value);
  }

  __device__ __forceinline__ void weigh(const Arguments& a, const Item& item, int consumer,
                                        const RowTerms& terms, int tile,
                                        float (&logits)[tile_numbers]) const {
    hide<true>(logits, item.row + consumer * tile_rows, item.sample.start + tile * tile_rows,
               a.geometry.window);
#pragma unroll
    for (int i = 0; i < tile_numbers; i += 4) {
      const float2 sum = *reinterpret_cast<const float2*>(&terms.logsumexp[column_at(i)]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* two = logits + i + 2 * half;
        two[0] = exp2_fast(fmaf(two[0], a.scale_log2, offset[half] - sum.x));
        two[1] = exp2_fast(fmaf(two[1], a.scale_log2, offset[half] - sum.y));
      }
    }
  }

  __device__ __forceinline__ void start_value_sum(const float (&weights)[tile_numbers],
                                                  const Pair<size>& passing) {
    uint32_t left[tile_rows / 16][4];
    to_left_matrices<T>(weights, left);
    start_weighted_sums<T, size, tile_rows>(value, left, passing.second);
  }

  __device__ __forceinline__ void differentiate(const Item&, const RowTerms& terms, int,
                                                const float (&weights)[tile_numbers],
                                                float (&changes)[tile_numbers]) const {
#pragma unroll
    for (int i = 0; i < tile_numbers; i += 4) {
      const float2 delta = *reinterpret_cast<const float2*>(&terms.delta[column_at(i)]);
#pragma unroll
      for (int j = i; j < i + 4; j += 2) {
        changes[j] = weights[j] * (changes[j] - delta.x);
        changes[j + 1] = weights[j + 1] * (changes[j + 1] - delta.y);
      }
    }
  }

  __device__ __forceinline__ void start_logit_sum(const float (&gradients)[tile_numbers],
                                                  const Pair<size>& passing) {
    uint32_t left[tile_rows / 16][4];
    to_left_matrices<T>(gradients, left);
    start_weighted_sums<T, size, tile_rows>(key, left, passing.first);
  }

  __device__ __forceinline__ void write(const Arguments& a, Pair<size>& own) const {
    write_tile<T, size, tile_rows>(own.first, 0, key, {a.scale, a.scale});
    write_tile<T, size, tile_rows>(own.second, 0, value, {1, 1});
  }
};

// 64 queries, past which keys go.
template <typename T, int size>
struct QuerySums {
  static constexpr Kind kind = Kind::queries;
  static constexpr int value_groups = 0;

  float query[size / 2] = {};
  // Of a thread's two rows: the first scaled key, the other scaled ones, dS of all others.
  RowShare<float> first_scaled[2], rest_scaled[2];
  float others[2] = {};
  float logsumexp[2], delta[2];  // of a thread's two rows
  float bias;                    // log_scale in units of unscaled logits

  __device__ __forceinline__ QuerySums(const Arguments& a, const Item& item, int consumer) {
    const int row = item.row + consumer * tile_rows;
    const RowTerms* terms = terms_of(a, item.batch, item.head, row);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      logsumexp[half] = terms->logsumexp[row_at(2 * half)];
      delta[half] = terms->delta[row_at(2 * half)];
    }
    bias =
        a.log_scale[item.batch * a.log_scale_batch_stride + item.head * a.log_scale_head_stride] /
        a.scale;
  }

  __device__ __forceinline__ void enter_head(const Arguments&, const Item&, int) {}
  __device__ __forceinline__ void pin_sums() { pin(query); }

  __device__ __forceinline__ static bool is_scaled(const SampleGeometry& g, int key) {
    return key >= g.span_begin && key < g.span_end;
  }
  __device__ __forceinline__ static bool has_scaled(const SampleGeometry& g, int first) {
    return g.span_begin < first + tile_rows && g.span_end > first;
  }

  __device__ __forceinline__ static void hide_padding(const Arguments& a, const Item& item,
                                                      int first, float (&logits)[tile_numbers]) {
    const int last = first + tile_rows;
    const bool* key_mask = item.sample.key_mask;
    if (first >= item.sample.first_key && last <= item.real_end) return;
    if (last <= a.keys && all_real<tile_rows>(key_mask, first, a.keys)) return;
#pragma unroll
    for (int i = 0; i < tile_numbers; ++i) {
      const int key = first + column_at(i);
      if (key >= a.keys || (key_mask && !key_mask[key])) logits[i] = -INFINITY;
    }
  }

  __device__ __forceinline__ void weigh(const Arguments& a, const Item& item, int consumer,
                                        const RowTerms&, int tile,
                                        float (&logits)[tile_numbers]) const {
    const SampleGeometry& g = item.sample;
    const int first = tile * tile_rows, position = g.start + item.row + consumer * tile_rows;
    if (has_scaled(g, first)) {
#pragma unroll
      for (int i = 0; i < tile_numbers; ++i)
        if (is_scaled(g, first + column_at(i))) logits[i] += bias;
    }
    hide<false>(logits, first, position, a.geometry.window);
    hide_padding(a, item, first, logits);
#pragma unroll
    for (int i = 0; i < tile_numbers; ++i)
      logits[i] = exp2_fast(fmaf(logits[i], a.scale_log2, -logsumexp[i / 2 % 2]));
  }

  __device__ __forceinline__ void start_value_sum(const float (&)[tile_numbers],
                                                  const Pair<size>&) {}

  __device__ __forceinline__ void differentiate(const Item& item, const RowTerms&, int tile,
                                                const float (&weights)[tile_numbers],
                                                float (&changes)[tile_numbers]) {
#pragma unroll
    for (int i = 0; i < tile_numbers; ++i)
      changes[i] = weights[i] * (changes[i] - delta[i / 2 % 2]);
    const int first = tile * tile_rows;
    if (has_scaled(item.sample, first)) {
#pragma unroll
      for (int i = 0; i < tile_numbers; ++i) {
        const int key = first + column_at(i);
        if (!is_scaled(item.sample, key)) continue;
        if (key == item.sample.span_begin) {
          first_scaled[i / 2 % 2].add(weights[i], changes[i]);
          changes[i] = 0;
        } else {
          rest_scaled[i / 2 % 2].add(weights[i], changes[i]);
          others[i / 2 % 2] -= changes[i];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < tile_numbers; ++i) others[i / 2 % 2] += changes[i];
  }

  __device__ __forceinline__ void start_logit_sum(const float (&gradients)[tile_numbers],
                                                  const Pair<size>& passing) {
    uint32_t left[tile_rows / 16][4];
    to_left_matrices<T>(gradients, left);
    start_weighted_sums<T, size, tile_rows>(query, left, passing.first);
  }

  __device__ __forceinline__ void write(const Arguments& a, Pair<size>& own) const {
    write_tile<T, size, tile_rows>(own.first, 0, query, {a.scale, a.scale});
  }

  // Adds the first scaled key's part to the gradients and leaves its dS of the 64 rows. Returns the
  // thread's summand of the gradient of log_scale.
  __device__ __forceinline__ float settle(const Arguments& a, const Item& item,
                                          float (&changes)[tile_rows]) {
    const auto all_columns = [](const RowShare<float>& share) {
      return RowShare<float>{quad_sum(share.weight), quad_sum(share.change)};
    };
    float change[2], scaled_change = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const RowShare<float> rest = all_columns(rest_scaled[half]);
      RowShare<float> own = all_columns(first_scaled[half]);
      const float other = quad_sum(others[half]);
      change[half] = own.settled(rest.change + other);
      own.add(rest.weight, rest.change);
      scaled_change += own.settled(other);
    }
    const SampleGeometry& g = item.sample;
    if (g.span_begin < g.span_end) {
      const T* key = row_of<T>(a.key_rows, item.batch, item.head / a.group, g.span_begin);
#pragma unroll
      for (int i = 0; i < size / 2; i += 4) {
        const int column = column_at(i);
        float k[2] = {};
        if (column < a.parts.key_columns) {
          k[0] = widened(key[column]);
          k[1] = widened(key[column + 1]);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) query[i + j] = fmaf(change[j / 2], k[j % 2], query[i + j]);
      }
    }
    if (threadIdx.x % 4 > 0) return 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) changes[row_at(2 * half)] = change[half];
    return scaled_change;
  }
};

// One pair of tiles that goes past. The warpgroups are not in step, so that the tensor cores have
// one's products while the other weighs; products that run on into the next step would need more
// registers than there are.
template <typename T, int size, typename Sums>
__device__ __forceinline__ void step(const Arguments& a, const Item& item, int consumer,
                                     const Pair<size>& own, const Pair<size>& passing,
                                     const RowTerms& terms, int tile, Sums& sums) {
  float logits[tile_numbers], changes[tile_numbers];
  start_row_products<T, size, tile_rows, tile_rows>(logits, own.first, passing.first);
  start_row_products<T, size, tile_rows, tile_rows>(changes, own.second, passing.second);
  wait_products<1>();
  pin(logits);
  sums.weigh(a, item, consumer, terms, tile, logits);
  sums.start_value_sum(logits, passing);
  wait_products<Sums::value_groups>();
  pin(changes);
  sums.differentiate(item, terms, tile, logits, changes);
  sums.start_logit_sum(changes, passing);
  wait_products<0>();
  sums.pin_sums();
}

// Column `column` of changes^T tile, of 64 rows.
template <typename T>
__device__ __forceinline__ float column_sum(const float (&changes)[tile_rows], const uint16_t* tile,
                                            int column) {
  const T* block =
      reinterpret_cast<const T*>(tile) + column / block_columns * tile_rows * block_columns;
  const int chunk = column % block_columns / 8;
  float sum = 0;
#pragma unroll 8
  for (int row = 0; row < tile_rows; ++row) {
    const int at = row * block_columns + (chunk ^ row % 8) * 8 + column % 8;
    sum = fmaf(changes[row], widened(block[at]), sum);
  }
  return sum;
}

// What 64 queries add to the gradients of the first scaled key and of log_scale.
template <typename T, int size>
__device__ __forceinline__ void leave_part(const Arguments& a, Shared<size>& s, int slot,
                                           int consumer, QuerySums<T, size>& sums) {
  const Item& item = s.item[slot];
  const int thread = threadIdx.x % warpgroup;
  float(&shares)[warpgroup / 32] = s.log_scale_sums[consumer];
  const float share = lane_sum<32>(sums.settle(a, item, s.first_changes[consumer]));
  if (thread % 32 == 0) shares[thread / 32] = share;
  wait_named(sums_barrier + consumer, warpgroup);
  const int64_t sequence = static_cast<int64_t>(item.batch) * a.heads + item.head;
  float* part = a.parts.at(sequence, item.row / tile_rows + consumer);
  const Range& seen = item.seen[consumer];
  if (thread < a.parts.key_columns) {
    // Of rows that see nothing no tile may have come.
    part[thread] = seen.begin < seen.end ? column_sum<T>(s.first_changes[consumer],
                                                         s.own[slot][consumer].first, thread)
                                         : 0;
  }
  if (thread == 0) part[a.parts.key_columns] = (shares[0] + shares[1]) + (shares[2] + shares[3]);
}

// Leaves the sums in place of the item's own tiles, for the warp that writes back.
template <typename T, int size, typename Sums>
__device__ __forceinline__ void hand_over(const Arguments& a, Shared<size>& s, int slot,
                                          int consumer, Sums& sums) {
  if constexpr (Sums::kind == Kind::queries) leave_part(a, s, slot, consumer, sums);
  wait_named(sums_barrier + consumer, warpgroup);  // the own tiles have been read
  sums.write(a, s.own[slot][consumer]);
  arrive_warp(&s.own_written[slot]);
}

template <typename T, int size, typename Sums>
__device__ __forceinline__ void sum_up(const Arguments& a, Shared<size>& s, int slot,
                                       Ring<stages>& passing) {
  const Item& item = s.item[slot];
  // Told to be the same in a warp: matrices' descriptors are then made once for all its lanes.
  const int consumer = __shfl_sync(~0u, threadIdx.x / warpgroup, 0) - 1;
  Sums sums(a, item, consumer);
#pragma unroll 1
  for (int i = 0; i < passing_heads(a, item); ++i) {
    sums.enter_head(a, item, i);
#pragma unroll 1
    for (int tile = item.tiles.begin; tile < item.tiles.end; ++tile, ++passing.count) {
      const int stage = passing.stage();
      wait(&s.passing_full[stage], passing.parity());
      if (tile >= item.seen[consumer].begin && tile < item.seen[consumer].end) {
        step<T>(a, item, consumer, s.own[slot][consumer], s.passing[stage], s.terms[stage], tile,
                sums);
      }
      arrive(&s.passing_empty[stage]);
    }
  }
  hand_over<T>(a, s, slot, consumer, sums);
}

template <typename T, int size>
__device__ __forceinline__ void compute(const Arguments& a, Shared<size>& s) {
  Ring<stages> passing;
#pragma unroll 1
  for (Ring<items> own;; ++own.count) {
    const int slot = own.stage();
    wait(&s.own_full[slot], own.parity());
    const Kind kind = s.item[slot].kind;
    if (kind == Kind::none) break;
    if (kind == Kind::keys) {
      sum_up<T, size, KeySums<T, size>>(a, s, slot, passing);
    } else {
      sum_up<T, size, QuerySums<T, size>>(a, s, slot, passing);
    }
  }
}

template <typename T, int size>
__global__ void __launch_bounds__(threads, 1) differentiate(const __grid_constant__ Arguments a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  // Aligned by its declaration, not by arithmetic that would hide that it is shared memory.
  extern __shared__ __align__(1024) char memory[];
  auto& s = *reinterpret_cast<Shared<size>*>(memory);
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map :
         {&a.query, &a.key, &a.value, &a.grad_output, &a.grad_query, &a.grad_key, &a.grad_value}) {
      prefetch_map(map);
    }
    constexpr int consumer_warps = consumers * warpgroup / 32;
    for (int i = 0; i < items; ++i) {
      init(&s.item_set[i], 1);
      init(&s.own_full[i], 1);
      init(&s.own_empty[i], 2);  // by feed_passing and write_back
      init(&s.own_written[i], consumer_warps);
    }
    for (int i = 0; i < stages; ++i) {
      init(&s.passing_full[i], 1);
      // By each thread, not a lane of each warp: no slower, and racecheck sees who has read.
      init(&s.passing_empty[i], consumers * warpgroup);
    }
    publish_barriers();
  }
  start_dependent_kernel();
  wait_for_previous_kernel();
  __syncthreads();
  if (threadIdx.x < warpgroup) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == 0) feed_own(a, s);
    if (threadIdx.x == 32) feed_passing(a, s);
    if (threadIdx.x == 64) write_back(a, s);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    compute<T>(a, s);
  }
#endif
}

// A block for 64 query rows of a head, `lanes` neighbouring lanes for a row.
template <typename T, int lanes>
__global__ void __launch_bounds__(row_threads)
    make_terms(const CudaAttention c, const CudaAttentionGradients g, int row_tiles,
               RowTerms* terms, uint32_t* taken) {
  constexpr int row_step = row_threads / lanes, unrolled = tile_rows / row_step;
  const int head = blockIdx.x % c.heads, tile = blockIdx.x / c.heads % row_tiles;
  const int sample = blockIdx.x / c.heads / row_tiles, lane = threadIdx.x % lanes;
  start_dependent_kernel();
  if (blockIdx.x == 0 && threadIdx.x == 0) *taken = 0;
  RowTerms& own = terms[(static_cast<int64_t>(sample) * c.heads + head) * row_tiles + tile];
  uint4 output[unrolled], gradient[unrolled];
  float logsumexp[unrolled];
#pragma unroll
  for (int u = 0; u < unrolled; ++u) {
    const int row = tile * tile_rows + threadIdx.x / lanes + u * row_step;
    output[u] = gradient[u] = uint4{0, 0, 0, 0};
    logsumexp[u] = -INFINITY;
    if (row >= c.queries) continue;
    output[u] = read<T>(g.output, sample, head, row, lane, c.value_head_size);
    gradient[u] = read<T>(g.grad_output, sample, head, row, lane, c.value_head_size);
    logsumexp[u] = *device::row_of<float>(g.logsumexp, sample, head, row);
  }
#pragma unroll
  for (int u = 0; u < unrolled; ++u) {
    const int row = threadIdx.x / lanes + u * row_step;
    const float delta = lane_sum<lanes>(dot(unpack<T>(output[u]), unpack<T>(gradient[u])));
    if (lane > 0) continue;
    own.logsumexp[row] = logsumexp[u] == -INFINITY ? INFINITY : logsumexp[u] * log2_e;
    own.delta[row] = delta;
  }
}

int item_tiles(int rows) { return (rows + item_rows - 1) / item_rows; }

int64_t sequences_of(const CudaAttention& c) { return int64_t{c.batch} * c.heads; }

// Where things lie in the scratch memory: terms, parts, the counter of items taken.
struct Scratch {
  RowTerms* terms;
  RowParts parts;
  uint32_t* taken;
  int64_t bytes;

  Scratch(const CudaAttention& c, void* memory) {
    const int row_tiles = item_tiles(c.queries) * consumers;
    const int64_t terms_bytes =
        sequences_of(c) * row_tiles * static_cast<int64_t>(sizeof(RowTerms));
    char* start = static_cast<char*>(memory);
    terms = reinterpret_cast<RowTerms*>(start);
    parts = {reinterpret_cast<float*>(start + terms_bytes), row_tiles, c.head_size, 0};
    taken = reinterpret_cast<uint32_t*>(start + terms_bytes + parts.bytes(c));
    bytes = terms_bytes + parts.bytes(c) + static_cast<int64_t>(sizeof(uint32_t));
  }
};

// As many sequences as leave `rows` rows each of two arrays in half of the level-2 cache.
int section_of(const CudaAttention& c, int64_t rows, int64_t sequences, int multiple) {
  constexpr int64_t cache_bytes = 24 << 20;
  const int64_t bytes = rows * (c.head_size + c.value_head_size) * 2;
  const int64_t fitting = std::max<int64_t>(1, cache_bytes / bytes) * multiple;
  return static_cast<int>(std::min(fitting, sequences));
}

cudaError_t make_maps(const CudaAttention& c, const CudaAttentionGradients& g, Arguments& a) {
  struct Tensor {
    CUtensorMap* map;
    Strided4<const void> array;
    int heads, rows, columns;
  };
  const Tensor tensors[] = {{&a.query, c.query, c.heads, c.queries, c.head_size},
                            {&a.key, c.key, c.key_heads, c.keys, c.head_size},
                            {&a.value, c.value, c.key_heads, c.keys, c.value_head_size},
                            {&a.grad_output, g.grad_output, c.heads, c.queries, c.value_head_size},
                            {&a.grad_query, g.grad_query, c.heads, c.queries, c.head_size},
                            {&a.grad_key, g.grad_key, c.key_heads, c.keys, c.head_size},
                            {&a.grad_value, g.grad_value, c.key_heads, c.keys, c.value_head_size}};
  for (const Tensor& t : tensors) {
    const cudaError_t error =
        make_map(t.map, c.dtype, t.array, c.batch, t.heads, t.rows, t.columns, tile_rows);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

void fill(const CudaAttention& c, const CudaAttentionGradients& g, Arguments& a) {
  const Scratch scratch(c, g.scratch);
  a.geometry = c.geometry;
  a.log_scale = static_cast<const float*>(c.log_scale);
  a.log_scale_batch_stride = c.log_scale_batch_stride;
  a.log_scale_head_stride = c.log_scale_head_stride;
  a.key_rows = c.key;
  a.terms = scratch.terms;
  a.parts = scratch.parts;
  a.taken = scratch.taken;
  a.batch = c.batch;
  a.heads = c.heads;
  a.key_heads = c.key_heads;
  a.group = c.heads / c.key_heads;
  a.queries = c.queries;
  a.keys = c.keys;
  a.scale = static_cast<float>(c.scale);
  a.scale_log2 = a.scale * log2_e;
  const int64_t key_sequences = int64_t{c.batch} * c.key_heads;
  a.key_order = {static_cast<int>(key_sequences), item_tiles(c.keys),
                 section_of(c, int64_t{c.queries} * a.group, key_sequences, 1)};
  a.query_order = {static_cast<int>(sequences_of(c)), item_tiles(c.queries),
                   section_of(c, c.keys, sequences_of(c), a.group)};
}

template <typename T>
cudaError_t launch_terms(const CudaAttention& c, const CudaAttentionGradients& g,
                         cudaStream_t stream) {
  const int row_tiles = item_tiles(c.queries) * consumers;
  const unsigned blocks = static_cast<unsigned>(sequences_of(c) * row_tiles);
  const Scratch scratch(c, g.scratch);
  const auto kernel = c.value_head_size <= 8 * chunk ? make_terms<T, 8> : make_terms<T, 16>;
  kernel<<<blocks, row_threads, 0, stream>>>(c, g, row_tiles, scratch.terms, scratch.taken);
  return cudaGetLastError();
}

template <typename T, int size>
cudaError_t launch_gradients(const CudaAttention& c, const CudaAttentionGradients& g,
                             int multiprocessors, cudaStream_t stream) {
  Arguments a{};
  cudaError_t error = make_maps(c, g, a);
  if (error != cudaSuccess) return error;
  fill(c, g, a);
  const auto kernel = differentiate<T, size>;
  constexpr int bytes = sizeof(Shared<size>), most = 227 * 1024;
  static_assert(bytes <= most);
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const int all_items =
      a.key_order.sequences * a.key_order.tiles + a.query_order.sequences * a.query_order.tiles;
  return launch_kernel(kernel, std::min(all_items, multiprocessors), threads, bytes, true, stream,
                       a);
}

template <typename T>
cudaError_t launch_backward(const CudaAttention& c, const CudaAttentionGradients& g,
                            int multiprocessors, cudaStream_t stream) {
  cudaError_t error = launch_terms<T>(c, g, stream);
  if (error != cudaSuccess) return error;
  error = std::max(c.head_size, c.value_head_size) <= 64
              ? launch_gradients<T, 64>(c, g, multiprocessors, stream)
              : launch_gradients<T, 128>(c, g, multiprocessors, stream);
  if (error != cudaSuccess) return error;
  return launch_add_row_parts<T>(c, g, Scratch(c, g.scratch).parts, true, stream);
}

}  // namespace
}  // namespace hopper

int64_t attention_backward_hopper_scratch(const CudaAttention& c) {
  return hopper::Scratch(c, nullptr).bytes;
}

cudaError_t attention_backward_hopper(const CudaAttention& c, const CudaAttentionGradients& g,
                                      int32_t multiprocessors, cudaStream_t stream) {
  return c.dtype == DType::float16
             ? hopper::launch_backward<__half>(c, g, multiprocessors, stream)
             : hopper::launch_backward<__nv_bfloat16>(c, g, multiprocessors, stream);
}

}  // namespace zerotuning::attention
