// Attention of one query a head (DecodeKernel of flash_cpu.h) on AVX-512 vectors. Keys and values
// are not packed: for one query, packing costs more time than packed tiles save.
#include "attention/cpu/flash_avx512.h"

namespace zerotuning::attention {
namespace {

// Heads of a key head that share one read of keys and values.
constexpr int64_t max_heads_at_once = 4;

inline __m512 load(const float* from, __mmask16 columns) {
  return _mm512_maskz_loadu_ps(columns, from);
}
inline __m512 load(const BFloat16* from, __mmask16 columns) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(columns, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
inline __m512 load(const Float16* from, __mmask16 columns) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(columns, from));
}

inline void store(float* to, __mmask16 columns, __m512 x) { _mm512_mask_storeu_ps(to, columns, x); }
inline void store(BFloat16* to, __mmask16 columns, __m512 x) {
  const __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  const __m512i rounded = _mm512_srli_epi32(
      _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
  _mm256_mask_storeu_epi16(to, columns, _mm512_cvtepi32_epi16(result));
}
inline void store(Float16* to, __mmask16 columns, __m512 x) {
  _mm256_mask_storeu_epi16(to, columns,
                           _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// One head's query, and the running softmax over the keys so far, relative to the largest logit.
struct Head {
  alignas(64) float query[flash_max_head_size], sums[flash_max_head_size];
  float bias, row_max, row_sum;  // bias and row_max in base 2
};

using Logits = float[block_keys];

// The keys of a block that the query attends to.
struct Keys {
  int64_t index[block_keys];
  int64_t count;
};

template <typename T>
void load_query(const FlashArguments& a, int64_t batch, int64_t head, Head& to) {
  const __m512 scale = _mm512_set1_ps(static_cast<float>(a.scale * M_LOG2E));
  const T* query = a.query.row<T>(batch, head, 0);
  for (int64_t c = 0; c < a.head_size; c += lanes) {
    _mm512_store_ps(to.query + c,
                    _mm512_mul_ps(load(query + c, first_lanes(a.head_size - c)), scale));
  }
  std::fill(to.sums, to.sums + flash_max_head_size, 0.f);
  to.bias = static_cast<float>(M_LOG2E) *
            a.log_scale[batch * a.log_scale_batch_stride + head * a.log_scale_head_stride];
  to.row_max = minus_infinity;
  to.row_sum = 0;
}

// Computes the logits of the keys in base 2, padded with -inf to whole vectors.
template <int heads, typename T>
void multiply_keys(const FlashArguments& a, const T* key, const Keys& keys, const int64_t* span,
                   const Head (&states)[heads], Logits (&logits)[heads]) {
  for (int64_t i = 0; i < keys.count; ++i) {
    const T* row = key + keys.index[i] * a.key.row_stride;
    __m512 sums[heads];
    for (int h = 0; h < heads; ++h) sums[h] = _mm512_setzero_ps();
    for (int64_t c = 0; c < a.head_size; c += lanes) {
      const __m512 numbers = load(row + c, first_lanes(a.head_size - c));
      for (int h = 0; h < heads; ++h)
        sums[h] = _mm512_fmadd_ps(numbers, _mm512_load_ps(states[h].query + c), sums[h]);
    }
    const bool scaled = keys.index[i] >= span[0] && keys.index[i] < span[1];
    for (int h = 0; h < heads; ++h)
      logits[h][i] = _mm512_reduce_add_ps(sums[h]) + (scaled ? states[h].bias : 0);
  }
  for (int h = 0; h < heads; ++h)
    std::fill(logits[h] + keys.count, logits[h] + rounded_up(keys.count, lanes), minus_infinity);
}

// Replaces logits by weights, and rescales earlier sums if the maximum has changed.
inline void softmax_step(int64_t count, int64_t columns, Head& head, float* logits) {
  __m512 largest = _mm512_set1_ps(head.row_max);
  for (int64_t i = 0; i < count; i += lanes)
    largest = _mm512_max_ps(largest, _mm512_load_ps(logits + i));
  const float new_max = _mm512_reduce_max_ps(largest);
  const __m512 reference = _mm512_set1_ps(new_max);
  __m512 row_sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += lanes) {
    const __m512 weight = exp2_of(_mm512_sub_ps(_mm512_load_ps(logits + i), reference));
    _mm512_store_ps(logits + i, weight);
    row_sum = _mm512_add_ps(row_sum, weight);
  }
  if (new_max != head.row_max) {
    const __m512 rescale = exp2_of(_mm512_set1_ps(head.row_max - new_max));
    for (int64_t c = 0; c < columns; c += lanes) {
      _mm512_store_ps(head.sums + c, _mm512_mul_ps(_mm512_load_ps(head.sums + c), rescale));
    }
    head.row_sum *= _mm512_cvtss_f32(rescale);
    head.row_max = new_max;
  }
  head.row_sum += _mm512_reduce_add_ps(row_sum);
}

// Adds the weighted values to columns [column, column + vectors * lanes) of the sums.
template <int vectors, int heads, typename T>
void add_values(const FlashArguments& a, const T* value, const Keys& keys,
                const Logits (&weights)[heads], int64_t column, Head (&states)[heads]) {
  __m512 sums[heads][vectors];
  __mmask16 columns[vectors];
  for (int v = 0; v < vectors; ++v) {
    columns[v] = first_lanes(a.value_head_size - column - v * lanes);
    for (int h = 0; h < heads; ++h)
      sums[h][v] = _mm512_load_ps(states[h].sums + column + v * lanes);
  }
  for (int64_t i = 0; i < keys.count; ++i) {
    const T* row = value + keys.index[i] * a.value.row_stride + column;
    for (int v = 0; v < vectors; ++v) {
      const __m512 numbers = load(row + v * lanes, columns[v]);
      for (int h = 0; h < heads; ++h)
        sums[h][v] = _mm512_fmadd_ps(_mm512_set1_ps(weights[h][i]), numbers, sums[h][v]);
    }
  }
  for (int v = 0; v < vectors; ++v) {
    for (int h = 0; h < heads; ++h)
      _mm512_store_ps(states[h].sums + column + v * lanes, sums[h][v]);
  }
}

template <int heads, typename T>
void decode_heads(const FlashArguments& a, int64_t batch, int64_t first_head) {
  constexpr int vectors = 4;
  Head states[heads];
  for (int h = 0; h < heads; ++h) load_query<T>(a, batch, first_head + h, states[h]);
  const int64_t key_head = first_head / (a.heads / a.key_heads);
  const T* key = a.key.row<T>(batch, key_head, 0);
  const T* value = a.value.row<T>(batch, key_head, 0);
  const bool* mask = a.key_mask ? a.key_mask + batch * a.keys : nullptr;
  const int64_t end = a.query_start[batch] + 1;
  const int64_t begin = a.window > 0 ? std::max<int64_t>(0, end - a.window) : 0;
  Keys keys;
  alignas(64) Logits logits[heads];
  for (int64_t first = begin; first < end; first += block_keys) {
    keys.count = 0;
    for (int64_t i = first; i < std::min(first + block_keys, end); ++i) {
      if (!mask || mask[i]) keys.index[keys.count++] = i;
    }
    if (keys.count == 0) continue;
    multiply_keys(a, key, keys, a.span + 2 * batch, states, logits);
    for (int h = 0; h < heads; ++h)
      softmax_step(keys.count, a.value_head_size, states[h], logits[h]);
    int64_t column = 0;
    for (; column + (vectors - 1) * lanes < a.value_head_size; column += vectors * lanes)
      add_values<vectors>(a, value, keys, logits, column, states);
    for (; column < a.value_head_size; column += lanes)
      add_values<1>(a, value, keys, logits, column, states);
  }
  for (int h = 0; h < heads; ++h) {
    const Head& head = states[h];
    const __m512 factor = _mm512_set1_ps(head.row_sum == 0 ? 0 : 1 / head.row_sum);
    T* output = a.output.row<T>(batch, first_head + h, 0);
    for (int64_t c = 0; c < a.value_head_size; c += lanes) {
      store(output + c, first_lanes(a.value_head_size - c),
            _mm512_mul_ps(_mm512_load_ps(head.sums + c), factor));
    }
  }
}

template <typename T>
void decode(const FlashArguments& a, int64_t begin, int64_t end) {
  const int64_t group = a.heads / a.key_heads;
  while (begin < end) {
    const int64_t batch = begin / a.heads, head = begin % a.heads;
    const int64_t of_key_head = group - head % group;
    const int64_t heads = std::min({end - begin, of_key_head, max_heads_at_once});
    switch (heads) {
      case 4:
        decode_heads<4, T>(a, batch, head);
        break;
      case 3:
        decode_heads<3, T>(a, batch, head);
        break;
      case 2:
        decode_heads<2, T>(a, batch, head);
        break;
      default:
        decode_heads<1, T>(a, batch, head);
    }
    begin += heads;
  }
}

}  // namespace

DecodeKernel avx512_decode_kernel(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return decode<float>;
    case DType::bfloat16:
      return decode<BFloat16>;
    case DType::float16:
      return decode<Float16>;
    default:
      return nullptr;
  }
}

}  // namespace zerotuning::attention
