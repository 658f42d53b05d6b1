// The forward kernel (flash_cpu.h) in bfloat16 on the matrix unit (AMX). A matrix tile has 16 rows
// of 64 bytes. A right operand stores its rows in pairs: [row / 2][column][row % 2].
#include "attention/cpu/flash_avx512.h"

namespace zerotuning::attention {
namespace {

constexpr int64_t tile_numbers = 512;  // 16 x 32 bfloat16
constexpr int64_t tile_depth = 32;     // terms of a sum in one product

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

inline __m512i row_or_zeros(const BFloat16* row, int64_t count, bool real) {
  const __mmask32 mask = !real || count <= 0   ? 0
                         : count >= tile_depth ? ~__mmask32{0}
                                               : (__mmask32{1} << count) - 1;
  return _mm512_maskz_loadu_epi16(mask, row);
}

// Adds the product of 32 x 32 numbers to tiles 0 to 3. Tiles 4 and 5 hold the left operands, tiles
// 6 and 7 the right operands.
inline void multiply(const BFloat16* left0, const BFloat16* left1, const BFloat16* right0,
                     const BFloat16* right1) {
  _tile_loadd(4, left0, 64);
  _tile_loadd(6, right0, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, right1, 64);
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(5, left1, 64);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

struct Bfloat16Engine {
  using Number = BFloat16;
  static constexpr int vectors = 2;
  static constexpr int64_t key_step = 32, head_step = 32, value_step = 32;
  static constexpr int64_t row_bytes = vectors * lanes * sizeof(float);

  const FlashArguments& a;
  const Packed<Bfloat16Engine> packed;
  const int64_t head_columns, value_columns;
  const BFloat16 *keys = nullptr, *values = nullptr;
  alignas(64) BFloat16 queries[vectors * flash_max_head_size / tile_depth * tile_numbers];
  alignas(64) BFloat16 weights[vectors * block_keys / tile_depth * tile_numbers];

  explicit Bfloat16Engine(const FlashArguments& arguments)
      : a(arguments),
        packed(arguments),
        head_columns(packed.head_columns),
        value_columns(packed.value_columns) {
    TileShapes shapes;
    for (int i = 0; i < 8; ++i) shapes.row_bytes[i] = 64, shapes.rows[i] = 16;
    _tile_loadconfig(&shapes);
  }
  ~Bfloat16Engine() { _tile_release(); }

  // Keys as left operands: [key / 16][column / 32][16][32].
  static void pack_keys_of(const FlashArguments& a, int64_t batch, int64_t key_head, int64_t first,
                           int64_t columns, BFloat16* to) {
    for (int64_t key = first; key < pack_end(a, first, key_step); ++key) {
      const BFloat16* from = a.key.row<BFloat16>(batch, key_head, std::min(key, a.keys - 1));
      BFloat16* tile = to + key / lanes * lanes * columns + key % lanes * tile_depth;
      for (int64_t c = 0; c < columns; c += tile_depth) {
        _mm512_store_si512(tile + c * lanes, row_or_zeros(from + c, a.head_size - c, key < a.keys));
      }
    }
  }

  // Values transposed, as left operands: [key / 32][column / 16][16][32].
  static void pack_values_of(const FlashArguments& a, int64_t batch, int64_t key_head,
                             int64_t first, int64_t columns, BFloat16* to) {
    for (int64_t key = first; key < pack_end(a, first, key_step); key += tile_depth) {
      for (int64_t c = 0; c < columns; c += lanes) {
        __m512i pairs[lanes];
        for (int64_t i = 0; i < lanes; ++i) {
          const auto read = [&](int64_t row) {
            const BFloat16* from =
                a.value.row<BFloat16>(batch, key_head, std::min(row, a.keys - 1));
            const __mmask16 mask = row < a.keys ? first_lanes(a.value_head_size - c) : 0;
            return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from + c));
          };
          pairs[i] =
              _mm512_or_si512(read(key + 2 * i), _mm512_slli_epi32(read(key + 2 * i + 1), 16));
        }
        transpose(pairs);
        BFloat16* tile = to + key * columns + c * tile_depth;
        for (int i = 0; i < lanes; ++i) _mm512_store_si512(tile + i * tile_depth, pairs[i]);
      }
    }
  }

  static void pack(const FlashArguments& a, int64_t batch, int64_t key_head, int64_t first) {
    const Packed<Bfloat16Engine> packed(a);
    pack_keys_of(a, batch, key_head, first, packed.head_columns, packed.keys(a, batch, key_head));
    pack_values_of(a, batch, key_head, first, packed.value_columns,
                   packed.values(a, batch, key_head));
  }

  // Queries as right operands: [vector][column / 32][16 pairs of columns][16 queries][2].
  void load_queries(const Tile& t) {
    const int64_t key_head = t.head / (a.heads / a.key_heads);
    keys = packed.keys(a, t.batch, key_head);
    values = packed.values(a, t.batch, key_head);
    for (int64_t v = 0; v < vectors; ++v) {
      for (int64_t c = 0; c < head_columns; c += tile_depth) {
        __m512i rows[lanes];
        for (int64_t i = 0; i < lanes; ++i) {
          const int64_t row = std::min(t.row + v * lanes + i, a.queries - 1);
          rows[i] = row_or_zeros(a.query.row<BFloat16>(t.batch, t.head, row) + c, a.head_size - c,
                                 v * lanes + i < t.rows);
        }
        transpose(rows);
        BFloat16* tile = queries + (v * head_columns + c) * lanes;
        for (int i = 0; i < lanes; ++i) _mm512_store_si512(tile + i * tile_depth, rows[i]);
      }
    }
  }

  void multiply_keys(int64_t begin, int64_t end, float* logits) const {
    const BFloat16* second = queries + head_columns * lanes;
    for (int64_t key = begin; key < end; key += key_step) {
      const BFloat16* tiles = keys + key * head_columns;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t c = 0; c < head_columns * lanes; c += tile_numbers) {
        multiply(tiles + c, tiles + head_columns * lanes + c, queries + c, second + c);
      }
      float* to = logits + (key - begin) * vectors * lanes;
      _tile_stored(0, to, row_bytes);
      _tile_stored(1, to + lanes, row_bytes);
      _tile_stored(2, to + lanes * vectors * lanes, row_bytes);
      _tile_stored(3, to + lanes * vectors * lanes + lanes, row_bytes);
    }
  }

  // Weights as right operands: [vector][key / 32][16 pairs of keys][16 queries][2].
  void softmax_step(int64_t count, Softmax<vectors>& softmax, const float* logits) {
    // Interleaves two rows of 16 rounded numbers: a pair of keys side by side for each query.
    const __m512i pairs =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int64_t key = 0; key < count; key += 2) {
      const float* row = logits + key * vectors * lanes;
      for (int v = 0; v < vectors; ++v) {
        const __m512 a = softmax.weight(v, _mm512_load_ps(row + v * lanes));
        const __m512 b = softmax.weight(v, _mm512_load_ps(row + (vectors + v) * lanes));
        const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(b, a);
        _mm512_store_si512(weights + (v * block_keys + key) * lanes,
                           _mm512_permutexvar_epi16(pairs, rounded));
      }
    }
  }

  void add_values(int64_t begin, int64_t end, bool first, const float*, float* sums) const {
    const BFloat16* second = weights + block_keys * lanes;
    for (int64_t c = 0; c < value_columns; c += 2 * lanes) {
      float* to = sums + c * vectors * lanes;
      if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      } else {
        _tile_loadd(0, to, row_bytes);
        _tile_loadd(1, to + lanes, row_bytes);
        _tile_loadd(2, to + lanes * vectors * lanes, row_bytes);
        _tile_loadd(3, to + lanes * vectors * lanes + lanes, row_bytes);
      }
      for (int64_t key = begin; key < end; key += tile_depth) {
        const BFloat16* tiles = values + key * value_columns + c * tile_depth;
        multiply(tiles, tiles + tile_numbers, weights + (key - begin) * lanes,
                 second + (key - begin) * lanes);
      }
      _tile_stored(0, to, row_bytes);
      _tile_stored(1, to + lanes, row_bytes);
      _tile_stored(2, to + lanes * vectors * lanes, row_bytes);
      _tile_stored(3, to + lanes * vectors * lanes + lanes, row_bytes);
    }
  }

  static void store(BFloat16* to, int64_t count, __m512 x) {
    _mm256_mask_storeu_epi16(to, first_lanes(count), (__m256i)_mm512_cvtneps_pbh(x));
  }
};

}  // namespace

const FlashKernel& amx_flash_kernel() {
  static constexpr FlashKernel kernel = kernel_of<Bfloat16Engine>();
  return kernel;
}

}  // namespace zerotuning::attention
