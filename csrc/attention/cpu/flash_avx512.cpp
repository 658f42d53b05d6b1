// The forward kernel (flash_cpu.h) in float32 on AVX-512 vectors.
#include "attention/cpu/flash_avx512.h"

namespace zerotuning::attention {
namespace {

struct Float32Engine {
  using Number = float;
  static constexpr int vectors = 3;
  static constexpr int64_t key_step = 8, head_step = 8, value_step = 16;
  static constexpr int64_t tile_rows = vectors * lanes;

  const FlashArguments& a;
  const Packed<Float32Engine> packed;
  const int64_t head_columns, value_columns;
  const float *keys = nullptr, *values = nullptr;
  alignas(64) float queries[flash_max_head_size * tile_rows];  // [column][query]

  explicit Float32Engine(const FlashArguments& arguments)
      : a(arguments),
        packed(arguments),
        head_columns(packed.head_columns),
        value_columns(packed.value_columns) {}

  static void pack_rows(const FlashArguments& a, const Strided4<const void>& from, int64_t batch,
                        int64_t key_head, int64_t first, int64_t size, int64_t columns, float* to) {
    for (int64_t key = first; key < pack_end(a, first, key_step); ++key) {
      float* row = to + key * columns;
      if (key >= a.keys) {
        std::fill(row, row + columns, 0.f);
      } else {
        const float* numbers = from.row<float>(batch, key_head, key);
        std::fill(std::copy(numbers, numbers + size, row), row + columns, 0.f);
      }
    }
  }

  static void pack(const FlashArguments& a, int64_t batch, int64_t key_head, int64_t first) {
    const Packed<Float32Engine> packed(a);
    pack_rows(a, a.key, batch, key_head, first, a.head_size, packed.head_columns,
              packed.keys(a, batch, key_head));
    pack_rows(a, a.value, batch, key_head, first, a.value_head_size, packed.value_columns,
              packed.values(a, batch, key_head));
  }

  void load_queries(const Tile& t) {
    const int64_t key_head = t.head / (a.heads / a.key_heads);
    keys = packed.keys(a, t.batch, key_head);
    values = packed.values(a, t.batch, key_head);
    for (int64_t v = 0; v < vectors; ++v) {
      for (int64_t c = 0; c < a.head_size; c += lanes) {
        __m512i rows[lanes];
        for (int64_t i = 0; i < lanes; ++i) {
          const int64_t row = std::min(t.row + v * lanes + i, a.queries - 1);
          const __mmask16 mask = v * lanes + i < t.rows ? first_lanes(a.head_size - c) : 0;
          rows[i] = _mm512_maskz_loadu_epi32(mask, a.query.row<float>(t.batch, t.head, row) + c);
        }
        transpose(rows);
        for (int64_t i = 0; i < lanes; ++i)
          _mm512_store_si512(queries + (c + i) * tile_rows + v * lanes, rows[i]);
      }
    }
  }

  // For 8 rows i: result[i] (+)= sum over k < depth of left[i][k] right[k]. left[i][k] lies at
  // left[i * row_stride + k * depth_stride]; right[k] is a row of numbers, one for each query of
  // the tile.
  static void multiply(const float* left, int64_t row_stride, int64_t depth_stride,
                       const float* right, int64_t depth, bool add, float* result) {
    constexpr int rows = 8;
    __m512 sum[rows][vectors];
    for (int i = 0; i < rows; ++i) {
      for (int v = 0; v < vectors; ++v) {
        sum[i][v] = add ? _mm512_load_ps(result + (i * vectors + v) * lanes) : _mm512_setzero_ps();
      }
    }
    for (int64_t k = 0; k < depth; ++k) {
      const float* row = right + k * tile_rows;
      const __m512 x = _mm512_load_ps(row), y = _mm512_load_ps(row + lanes),
                   z = _mm512_load_ps(row + 2 * lanes);
      for (int i = 0; i < rows; ++i) {
        const __m512 number = _mm512_set1_ps(left[i * row_stride + k * depth_stride]);
        sum[i][0] = _mm512_fmadd_ps(number, x, sum[i][0]);
        sum[i][1] = _mm512_fmadd_ps(number, y, sum[i][1]);
        sum[i][2] = _mm512_fmadd_ps(number, z, sum[i][2]);
      }
    }
    for (int i = 0; i < rows; ++i) {
      for (int v = 0; v < vectors; ++v)
        _mm512_store_ps(result + (i * vectors + v) * lanes, sum[i][v]);
    }
  }

  void multiply_keys(int64_t begin, int64_t end, float* logits) const {
    for (int64_t key = begin; key < end; key += key_step) {
      multiply(keys + key * head_columns, head_columns, 1, queries, a.head_size, false,
               logits + (key - begin) * tile_rows);
    }
  }

  void softmax_step(int64_t count, Softmax<vectors>& softmax, float* logits) const {
    for (int64_t i = 0; i < count * vectors; i += vectors) {
      for (int v = 0; v < vectors; ++v) {
        float* x = logits + (i + v) * lanes;
        _mm512_store_ps(x, softmax.weight(v, _mm512_load_ps(x)));
      }
    }
  }

  void add_values(int64_t begin, int64_t end, bool first, const float* weights, float* sums) const {
    for (int64_t c = 0; c < value_columns; c += 8) {
      multiply(values + begin * value_columns + c, 1, value_columns, weights, end - begin, !first,
               sums + c * tile_rows);
    }
  }

  static void store(float* to, int64_t count, __m512 x) {
    _mm512_mask_storeu_ps(to, first_lanes(count), x);
  }
};

}  // namespace

const FlashKernel& avx512_flash_kernel() {
  static constexpr FlashKernel kernel = kernel_of<Float32Engine>();
  return kernel;
}

}  // namespace zerotuning::attention
