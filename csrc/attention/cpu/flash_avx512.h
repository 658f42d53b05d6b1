// The part that the AVX-512 forward kernels (flash_cpu.h) have in common: tiles of queries, the
// mask, the softmax, the output. Only files that are compiled for AVX-512 may include this header.
// Everything is in an unnamed namespace, so that the linker cannot use this code in other files.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "attention/flash_cpu.h"

namespace zerotuning::attention {
namespace {

constexpr int lanes = 16;
constexpr int64_t block_keys = 128;  // keys between two steps of the softmax
constexpr int64_t pack_keys = 128;   // keys of a packing item: a multiple of every step of keys
constexpr float minus_infinity = -std::numeric_limits<float>::infinity();

constexpr int64_t rounded_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// Transposes 16 x 16 numbers of 32 bits.
inline void transpose(__m512i (&m)[lanes]) {
  __m512i t[lanes];
  for (int i = 0; i < lanes; i += 2) {
    t[i] = _mm512_unpacklo_epi32(m[i], m[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(m[i], m[i + 1]);
  }
  for (int i = 0; i < lanes; i += 4) {
    m[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    m[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    m[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    m[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(m[i], m[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(m[i], m[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(m[i + 8], m[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(m[i + 8], m[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    m[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    m[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    m[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    m[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// 2^x for x <= 0, relative error below 2e-7 (a minimax polynomial). The result is 0 where 2^x is
// subnormal: subnormal results need a hundred times the time of normal results. NaN stays NaN.
inline __m512 exp2_of(__m512 x) {
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126), _CMP_NLT_UQ);
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 part = _mm512_sub_ps(x, whole);
  __m512 y = _mm512_set1_ps(1.326472708e-3f);
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(9.671512862e-3f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(5.550733746e-2f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(2.402224208e-1f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(6.931469776e-1f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(1));
  return _mm512_maskz_scalef_ps(normal, y, whole);
}

// log x for x > 0, finite: x = 2^e m with m in [0.75, 1.5), log m = 2 artanh((m - 1) / (m + 1)).
inline __m512 log_of(__m512 x) {
  const __m512 m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
  const __m512 e = _mm512_getexp_ps(_mm512_div_ps(x, m));
  const __m512 one = _mm512_set1_ps(1);
  const __m512 s = _mm512_div_ps(_mm512_sub_ps(m, one), _mm512_add_ps(m, one));
  const __m512 square = _mm512_mul_ps(s, s);
  __m512 y = _mm512_set1_ps(2.f / 9);
  y = _mm512_fmadd_ps(y, square, _mm512_set1_ps(2.f / 7));
  y = _mm512_fmadd_ps(y, square, _mm512_set1_ps(2.f / 5));
  y = _mm512_fmadd_ps(y, square, _mm512_set1_ps(2.f / 3));
  y = _mm512_fmadd_ps(y, square, _mm512_set1_ps(2));
  return _mm512_fmadd_ps(y, s, _mm512_mul_ps(e, _mm512_set1_ps(0.69314718f)));
}

// The lanes from `first` on. `first` may be negative, or larger than the last lane.
inline __mmask16 lanes_from(int64_t first) {
  return first <= 0 ? 0xffff : first >= lanes ? 0 : static_cast<__mmask16>(0xffff << first);
}
inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>(~lanes_from(count)); }

// A tile of queries, and the keys [key_begin, key_end) that any query of the tile may attend to.
struct Tile {
  int64_t batch, head, row, rows;
  int64_t position;  // position of the tile's first query among the keys
  int64_t key_begin, key_end;
};

// Long and short tiles of a head alternate, so that threads with equal numbers of tiles have equal
// work.
inline Tile tile_of(const FlashArguments& a, int64_t item, int64_t tile_rows, int64_t key_step) {
  const int64_t tiles = (a.queries + tile_rows - 1) / tile_rows;
  const int64_t turn = item % tiles, index = turn % 2 ? tiles - 1 - turn / 2 : turn / 2;
  Tile t;
  t.head = item / tiles % a.heads;
  t.batch = item / tiles / a.heads;
  t.row = index * tile_rows;
  t.rows = std::min(tile_rows, a.queries - t.row);
  t.position = a.query_start[t.batch] + t.row;
  t.key_end = rounded_up(t.position + t.rows, key_step);
  const int64_t first = a.window ? std::max<int64_t>(t.position - a.window + 1, 0) : 0;
  t.key_begin = first / key_step * key_step;
  return t;
}

// The end of the packing item that begins at key `first`: whole steps of keys.
inline int64_t pack_end(const FlashArguments& a, int64_t first, int64_t key_step) {
  return std::min(first + pack_keys, rounded_up(a.keys, key_step));
}

// Whether a query of the sample may attend to one of the keys [begin, begin + pack_keys).
inline bool is_visible(const FlashArguments& a, int64_t batch, int64_t begin) {
  const int64_t start = a.query_start[batch];
  return begin < start + a.queries && !(a.window && begin + pack_keys <= start - a.window + 1);
}

// Adds log_scale to the logits of scaled keys, and replaces the logits of keys that a query does
// not attend to (later keys, keys before the query's window, padding) by -inf. logits: keys [begin,
// end) of [end - begin][vectors * lanes], queries side by side.
template <int vectors>
void apply_mask(const FlashArguments& a, const Tile& t, int64_t begin, int64_t end, float* logits) {
  const auto row_of_key = [&](int64_t key) { return logits + (key - begin) * vectors * lanes; };
  const int64_t* span = a.span + 2 * t.batch;
  const float log_scale =
      a.log_scale[t.batch * a.log_scale_batch_stride + t.head * a.log_scale_head_stride];
  const __m512 bias = _mm512_set1_ps(log_scale / static_cast<float>(a.scale));
  for (int64_t key = std::max(begin, span[0]); key < std::min(end, span[1]); ++key) {
    float* row = row_of_key(key);
    for (int v = 0; v < vectors; ++v) {
      _mm512_store_ps(row + v * lanes, _mm512_add_ps(_mm512_load_ps(row + v * lanes), bias));
    }
  }
  const __m512 masked = _mm512_set1_ps(minus_infinity);
  for (int64_t key = std::max(begin, t.position + 1); key < end; ++key) {
    for (int v = 0; v < vectors; ++v) {
      const __mmask16 visible = lanes_from(key - t.position - v * lanes);
      _mm512_mask_store_ps(row_of_key(key) + v * lanes, static_cast<__mmask16>(~visible), masked);
    }
  }
  const int64_t last_position = t.position + vectors * lanes - 1;
  for (int64_t key = begin; a.window && key < std::min(end, last_position - a.window + 1); ++key) {
    for (int v = 0; v < vectors; ++v) {
      const __mmask16 visible = first_lanes(key + a.window - t.position - v * lanes);
      _mm512_mask_store_ps(row_of_key(key) + v * lanes, static_cast<__mmask16>(~visible), masked);
    }
  }
  if (!a.key_mask) return;
  const bool* mask = a.key_mask + t.batch * a.keys;
  const bool* stop = mask + std::min(end, a.keys);
  for (const bool* key = std::find(mask + begin, stop, false); key != stop;
       key = std::find(key + 1, stop, false)) {
    for (int v = 0; v < vectors; ++v) _mm512_store_ps(row_of_key(key - mask) + v * lanes, masked);
  }
}

// The running softmax of a tile's queries: one lane each.
template <int vectors>
struct Softmax {
  __m512 row_max[vectors];    // the largest logit so far, unscaled
  __m512 row_sum[vectors];    // the sum of the weights so far
  __m512 reference[vectors];  // a weight is 2^(scale_log2 logit - reference): scaled row_max
  __m512 scale_log2;

  explicit Softmax(double scale) : scale_log2(_mm512_set1_ps(static_cast<float>(scale * M_LOG2E))) {
    for (int v = 0; v < vectors; ++v) {
      row_max[v] = _mm512_set1_ps(minus_infinity);
      row_sum[v] = reference[v] = _mm512_setzero_ps();
    }
  }

  // Updates the maxima by a block's logits. Returns whether earlier sums must be multiplied by
  // `rescale`.
  bool update_row_max(const float* logits, int64_t rows, __m512 (&rescale)[vectors]) {
    __mmask16 changed = 0;
    for (int v = 0; v < vectors; ++v) {
      __m512 new_max = row_max[v];
      for (int64_t i = 0; i < rows; ++i) {
        new_max = _mm512_max_ps(new_max, _mm512_load_ps(logits + (i * vectors + v) * lanes));
      }
      changed |= _mm512_cmp_ps_mask(new_max, row_max[v], _CMP_NEQ_UQ);
      const __mmask16 attends =
          _mm512_cmp_ps_mask(new_max, _mm512_set1_ps(minus_infinity), _CMP_NEQ_UQ);
      reference[v] = _mm512_maskz_mul_ps(attends, new_max, scale_log2);
      rescale[v] = exp2_of(_mm512_fmsub_ps(row_max[v], scale_log2, reference[v]));
      row_max[v] = new_max;
      row_sum[v] = _mm512_mul_ps(row_sum[v], rescale[v]);
    }
    return changed != 0;
  }

  __m512 weight(int v, __m512 logit) {
    const __m512 w = exp2_of(_mm512_fmsub_ps(logit, scale_log2, reference[v]));
    row_sum[v] = _mm512_add_ps(row_sum[v], w);
    return w;
  }
};

// Divides the sums [columns][vectors * lanes] by the row sums, and writes output and logsumexp.
// store(row, column, count, numbers) writes `count` numbers of a row from `column` on.
template <int vectors, typename Store>
void write_results(const FlashArguments& a, const Tile& t, const Softmax<vectors>& softmax,
                   const float* sums, const Store& store) {
  for (int v = 0; v < vectors && v * lanes < t.rows; ++v) {
    const int64_t rows = std::min<int64_t>(lanes, t.rows - v * lanes);
    const __m512 row_sum = softmax.row_sum[v];
    const __mmask16 attends = _mm512_cmp_ps_mask(row_sum, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    const __m512 factor = _mm512_maskz_div_ps(attends, _mm512_set1_ps(1), row_sum);
    alignas(64) float logsumexp[lanes];
    const __m512 scale = _mm512_set1_ps(static_cast<float>(a.scale));
    _mm512_store_ps(logsumexp,
                    _mm512_mask_fmadd_ps(softmax.row_max[v], attends, scale, log_of(row_sum)));
    float* to = a.logsumexp.row<float>(t.batch, t.head, t.row + v * lanes);
    for (int64_t i = 0; i < rows; ++i) to[i * a.logsumexp.row_stride] = logsumexp[i];
    for (int64_t column = 0; column < a.value_head_size; column += lanes) {
      __m512i m[lanes];
      for (int i = 0; i < lanes; ++i) {
        const __m512 x = _mm512_load_ps(sums + ((column + i) * vectors + v) * lanes);
        m[i] = _mm512_castps_si512(_mm512_mul_ps(x, factor));
      }
      transpose(m);
      const int64_t count = std::min<int64_t>(lanes, a.value_head_size - column);
      for (int64_t i = 0; i < rows; ++i) {
        store(t.row + v * lanes + i, column, count, _mm512_castsi512_ps(m[i]));
      }
    }
  }
}

// Computes tiles [begin, end). Engine: the sizes of tiles, the packed arrays, and the two products.
template <typename Engine>
void attend(const FlashArguments& a, int64_t begin, int64_t end) {
  constexpr int vectors = Engine::vectors;
  Engine engine(a);
  alignas(64) float logits[block_keys * vectors * lanes];
  alignas(64) float sums[flash_max_head_size * vectors * lanes];
  for (int64_t item = begin; item < end; ++item) {
    const Tile t = tile_of(a, item, vectors * lanes, Engine::key_step);
    engine.load_queries(t);
    Softmax<vectors> softmax(a.scale);
    bool first = true;
    for (int64_t key = t.key_begin; key < t.key_end; key += block_keys) {
      const int64_t key_end = std::min(key + block_keys, t.key_end);
      engine.multiply_keys(key, key_end, logits);
      apply_mask<vectors>(a, t, key, key_end, logits);
      __m512 rescale[vectors];
      if (softmax.update_row_max(logits, key_end - key, rescale) && !first) {
        for (int64_t i = 0; i < engine.value_columns * vectors; ++i) {
          float* x = sums + i * lanes;
          _mm512_store_ps(x, _mm512_mul_ps(_mm512_load_ps(x), rescale[i % vectors]));
        }
      }
      engine.softmax_step(key_end - key, softmax, logits);
      engine.add_values(key, key_end, first, logits, sums);
      first = false;
    }
    write_results<vectors>(
        a, t, softmax, sums, [&](int64_t row, int64_t column, int64_t count, __m512 x) {
          Engine::store(a.output.row<typename Engine::Number>(t.batch, t.head, row) + column, count,
                        x);
        });
  }
}

template <typename Engine>
int64_t flash_items(const FlashArguments& a) {
  constexpr int64_t rows = Engine::vectors * lanes;
  return a.batch * a.heads * ((a.queries + rows - 1) / rows);
}

inline int64_t flash_pack_items(const FlashArguments& a) {
  return a.batch * a.key_heads * ((a.keys + pack_keys - 1) / pack_keys);
}

// Sizes and addresses of the packed keys and values of a key head.
template <typename Engine>
struct Packed {
  int64_t rows, head_columns, value_columns;

  explicit Packed(const FlashArguments& a)
      : rows(rounded_up(a.keys, pack_keys)),
        head_columns(rounded_up(a.head_size, Engine::head_step)),
        value_columns(rounded_up(a.value_head_size, Engine::value_step)) {}
  int64_t bytes(const FlashArguments& a) const {
    return a.batch * a.key_heads * rows * (head_columns + value_columns) *
           static_cast<int64_t>(sizeof(typename Engine::Number));
  }
  typename Engine::Number* keys(const FlashArguments& a, int64_t batch, int64_t key_head) const {
    return static_cast<typename Engine::Number*>(a.packed) +
           (batch * a.key_heads + key_head) * rows * (head_columns + value_columns);
  }
  typename Engine::Number* values(const FlashArguments& a, int64_t batch, int64_t key_head) const {
    return keys(a, batch, key_head) + rows * head_columns;
  }
};

template <typename Engine>
void pack(const FlashArguments& a, int64_t begin, int64_t end) {
  const int64_t chunks = (a.keys + pack_keys - 1) / pack_keys;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t key = item % chunks * pack_keys, key_head = item / chunks % a.key_heads;
    const int64_t batch = item / chunks / a.key_heads;
    if (is_visible(a, batch, key)) Engine::pack(a, batch, key_head, key);
  }
}

template <typename Engine>
constexpr FlashKernel kernel_of() {
  return {[](const FlashArguments& a) { return Packed<Engine>(a).bytes(a); }, flash_pack_items,
          pack<Engine>, flash_items<Engine>, attend<Engine>};
}

}  // namespace
}  // namespace zerotuning::attention
