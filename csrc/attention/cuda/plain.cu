// The exact route: flash attention without tensor cores, for any dtype, head size and geometry. A
// block of 256 threads takes a tile of queries (backward of keys: a tile of keys) and walks over
// the tiles that it sees; tiles lie in shared memory in the accumulator's type.
#include <algorithm>

#include "attention/cuda/device.cuh"
#include "attention/cuda_backward.h"
#include "attention/cuda_forward.h"

namespace zerotuning::attention {
namespace plain {
namespace {

using namespace device;

constexpr int threads = 256;

// Tile sizes by the accumulator and the largest head size; all of a kernel's tiles fit in 100 KB.
template <typename C, int size>
struct Tiles {
  static constexpr int rows = (size > 128 ? 16 : 32) / (sizeof(C) / 4);
  static constexpr int columns = rows;
  static constexpr int stride = size + 1;  // rows in different banks
  static constexpr int row_threads = threads / rows;
  static constexpr int values = size / row_threads;  // of a row, a thread's share
};

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }

// Rows [first, first + count) of one head into shared memory; zeros beyond the end and the size.
template <typename T, typename C, int size, int rows>
__device__ void load(C* tile, const Strided4<const void>& a, int sample, int head, int first,
                     int end, int columns) {
  using Tile = Tiles<C, size>;
  for (int i = threadIdx.x; i < rows * size; i += threads) {
    const int row = i / size, column = i % size;
    C x = 0;
    if (first + row < end && column < columns)
      x = widened(row_of<T>(a, sample, head, first + row)[column]);
    tile[row * Tile::stride + column] = x;
  }
}

// The same rows of two arrays, of query's or key's head size and of value's.
template <typename T, typename C, int size, int rows>
__device__ void load_both(C* tile, const Strided4<const void>& a, C* value_tile,
                          const Strided4<const void>& values, const CudaAttention& c, int sample,
                          int head, int first, int end) {
  load<T, C, size, rows>(tile, a, sample, head, first, end, c.head_size);
  load<T, C, size, rows>(value_tile, values, sample, head, first, end, c.value_head_size);
}

template <typename C, int size>
__device__ __forceinline__ C dot(const C* a, const C* b) {
  C sum = 0;
#pragma unroll 8
  for (int i = 0; i < size; ++i) sum += a[i] * b[i];
  return sum;
}

template <typename C>
__device__ __forceinline__ C log_scale_of(const CudaAttention& c, int sample, int head) {
  return static_cast<const C*>(
      c.log_scale)[sample * c.log_scale_batch_stride + head * c.log_scale_head_stride];
}

// The tile's sums over a row's threads, which are neighbours.
template <int count, typename C>
__device__ __forceinline__ C row_sum(C x) {
#pragma unroll
  for (int step = count / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}
template <int count, typename C>
__device__ __forceinline__ C row_max(C x) {
#pragma unroll
  for (int step = count / 2; step > 0; step /= 2) x = max(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

// Keys that queries [row, end) of the sample see, as far as position and window say.
__device__ __forceinline__ void key_range(const Sight& s, int row, int end, int* begin, int* last) {
  *begin = s.window ? max(0, s.start + row - s.window + 1) : 0;
  *last = min(s.keys, s.start + end);
}

template <typename T, int size>
__global__ void __launch_bounds__(threads) forward(const CudaAttention c, int row_tiles) {
  using C = AccumulatorOf<T>;
  using Tile = Tiles<C, size>;
  extern __shared__ char memory[];
  C* query = reinterpret_cast<C*>(memory);
  C* other = query + Tile::rows * Tile::stride;       // keys, then values
  C* weights = other + Tile::columns * Tile::stride;  // [rows][columns + 1]
  const int tile = blockIdx.x % row_tiles, head = blockIdx.x / row_tiles % c.heads;
  const int sample = blockIdx.x / row_tiles / c.heads, key_head = head / (c.heads / c.key_heads);
  const Sight s = sight_of(c, sample);
  const int first = tile * Tile::rows, end = min(first + Tile::rows, c.queries);
  const C bias = log_scale_of<C>(c, sample, head), scale = static_cast<C>(c.scale);
  const int row = threadIdx.x / Tile::row_threads, lane = threadIdx.x % Tile::row_threads;

  load<T, C, size, Tile::rows>(query, c.query, sample, head, first, c.queries, c.head_size);
  C output[Tile::values] = {}, largest = -INFINITY, total = 0;
  int key_begin, key_end;
  key_range(s, first, end, &key_begin, &key_end);
  for (int key = key_begin; key < key_end; key += Tile::columns) {
    __syncthreads();
    load<T, C, size, Tile::columns>(other, c.key, sample, key_head, key, c.keys, c.head_size);
    __syncthreads();
    for (int i = threadIdx.x; i < Tile::rows * Tile::columns; i += threads) {
      const int r = i / Tile::columns, j = i % Tile::columns;
      C logit = -INFINITY;
      if (s.visible(key + j, s.start + first + r)) {
        logit = scale * dot<C, size>(query + r * Tile::stride, other + j * Tile::stride);
        if (s.scaled(key + j)) logit += bias;
      }
      weights[r * (Tile::columns + 1) + j] = logit;
    }
    __syncthreads();
    load<T, C, size, Tile::columns>(other, c.value, sample, key_head, key, c.keys,
                                    c.value_head_size);
    C* own = weights + row * (Tile::columns + 1);
    C top = -INFINITY;
    for (int j = lane; j < Tile::columns; j += Tile::row_threads) top = max(top, own[j]);
    top = max(largest, row_max<Tile::row_threads>(top));
    const C zero = top == -INFINITY ? C{0} : top;
    C sum = 0;
    for (int j = lane; j < Tile::columns; j += Tile::row_threads) {
      own[j] = exponential(own[j] - zero);
      sum += own[j];
    }
    const C rescale = exponential(largest - zero);
    total = total * rescale + row_sum<Tile::row_threads>(sum);
    largest = top;
#pragma unroll
    for (C& x : output) x *= rescale;
    __syncthreads();
    for (int j = 0; j < Tile::columns; ++j) {
#pragma unroll
      for (int i = 0; i < Tile::values; ++i)
        output[i] += own[j] * other[j * Tile::stride + lane + i * Tile::row_threads];
    }
  }
  if (first + row >= c.queries) return;
  T* to = written_row_of<T>(c.output, sample, head, first + row);
  const C factor = total == 0 ? C{0} : 1 / total;
  const bool none = s.span_begin == s.span_end;
  const T* first_value = row_of<T>(c.value, sample, key_head, none ? 0 : s.span_begin);
#pragma unroll
  for (int i = 0; i < Tile::values; ++i) {
    const int column = lane + i * Tile::row_threads;
    if (column >= c.value_head_size) continue;
    to[column] = narrowed<T>(output[i] * factor);
    if (!c.output_minus_initial_value.data) continue;
    const C value = none ? C{0} : widened(first_value[column]);
    written_row_of<T>(c.output_minus_initial_value, sample, head, first + row)[column] =
        narrowed<T>(output[i] * factor - value);
  }
  if (lane == 0 && c.logsumexp.data) {
    *written_row_of<C>(c.logsumexp, sample, head, first + row) =
        total == 0 ? static_cast<C>(-INFINITY) : largest + logarithm(total);
  }
}

// Backward. scratch: delta (do·o of each row) and first_change (ds of its first scaled key), both
// [batch, heads, queries], then the parts of grad_log_scale [batch, heads, row_tiles] in double.

template <typename T>
__global__ void __launch_bounds__(threads)
    make_delta(const CudaAttention c, const CudaAttentionGradients g, AccumulatorOf<T>* delta) {
  using C = AccumulatorOf<T>;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * (threads / 32) + threadIdx.x / 32;
  if (item >= static_cast<int64_t>(c.batch) * c.heads * c.queries) return;
  const int row = item % c.queries, head = item / c.queries % c.heads,
            sample = item / c.queries / c.heads;
  const T* a = row_of<T>(g.output, sample, head, row);
  const T* b = row_of<T>(g.grad_output, sample, head, row);
  C sum = 0;
  for (int i = threadIdx.x % 32; i < c.value_head_size; i += 32)
    sum += widened(a[i]) * widened(b[i]);
  sum = row_sum<32>(sum);
  if (threadIdx.x % 32 == 0) delta[item] = sum;
}

// What the backward kernels read of one head besides its tiles.
template <typename C>
struct HeadRows {
  C scale, bias;
  const C* logsumexp;
  int64_t logsumexp_stride;
  const C* delta;
  C* first_change;
  int queries;

  __device__ HeadRows(const CudaAttention& c, const CudaAttentionGradients& g, C* rows, int sample,
                      int head)
      : scale(static_cast<C>(c.scale)),
        bias(log_scale_of<C>(c, sample, head)),
        logsumexp(row_of<C>(g.logsumexp, sample, head, 0)),
        logsumexp_stride(g.logsumexp.row_stride),
        delta(rows + (static_cast<int64_t>(sample) * c.heads + head) * c.queries),
        first_change(rows + (static_cast<int64_t>(sample + c.batch) * c.heads + head) * c.queries),
        queries(c.queries) {}
};

// A key's weight for a query and the gradient ds of its logit; zeros where the query does not see
// the key. A row whose visible logits are all -inf has logsumexp -inf too, and no weights: exp(-inf
// + inf) would be NaN.
template <typename C>
struct Pair {
  C weight, gradient;
};

template <int size, typename C>
__device__ __forceinline__ Pair<C> pair_of(const Sight& s, const HeadRows<C>& head, int query,
                                           int key, const C* query_row, const C* key_row,
                                           const C* grad_output_row, const C* value_row) {
  if (query >= head.queries || !s.visible(key, s.start + query)) return {0, 0};
  const C logsumexp = head.logsumexp[query * head.logsumexp_stride];
  const C bias = s.scaled(key) ? head.bias : C{0};
  const C exponent = head.scale * dot<C, size>(query_row, key_row) + bias - logsumexp;
  const C weight = logsumexp == -INFINITY ? C{0} : exponential(exponent);
  return {weight, weight * (dot<C, size>(grad_output_row, value_row) - head.delta[query])};
}

template <typename T, int size>
__global__ void __launch_bounds__(threads)
    backward_queries(const CudaAttention c, const CudaAttentionGradients g, AccumulatorOf<T>* rows,
                     double* parts, int row_tiles) {
  using C = AccumulatorOf<T>;
  using Tile = Tiles<C, size>;
  extern __shared__ char memory[];
  C* query = reinterpret_cast<C*>(memory);
  C* grad_output = query + Tile::rows * Tile::stride;
  C* key_tile = grad_output + Tile::rows * Tile::stride;
  C* value_tile = key_tile + Tile::columns * Tile::stride;
  C* weights = value_tile + Tile::columns * Tile::stride;     // [rows][columns + 1]
  C* gradients = weights + Tile::rows * (Tile::columns + 1);  // likewise
  __shared__ double sums[threads / 32];
  const int tile = blockIdx.x % row_tiles, head = blockIdx.x / row_tiles % c.heads;
  const int sample = blockIdx.x / row_tiles / c.heads, key_head = head / (c.heads / c.key_heads);
  const Sight s = sight_of(c, sample);
  const HeadRows<C> head_rows(c, g, rows, sample, head);
  const int first = tile * Tile::rows, end = min(first + Tile::rows, c.queries);
  const int row = threadIdx.x / Tile::row_threads, lane = threadIdx.x % Tile::row_threads;

  load_both<T, C, size, Tile::rows>(query, c.query, grad_output, g.grad_output, c, sample, head,
                                    first, c.queries);
  C grad_query[Tile::values] = {}, others = 0;
  RowShare<C> first_scaled, rest_scaled;
  int key_begin, key_end;
  key_range(s, first, end, &key_begin, &key_end);
  for (int key = key_begin; key < key_end; key += Tile::columns) {
    __syncthreads();
    load_both<T, C, size, Tile::columns>(key_tile, c.key, value_tile, c.value, c, sample, key_head,
                                         key, c.keys);
    __syncthreads();
    for (int i = threadIdx.x; i < Tile::rows * Tile::columns; i += threads) {
      const int r = i / Tile::columns, j = i % Tile::columns;
      const Pair<C> pair = pair_of<size>(
          s, head_rows, first + r, key + j, query + r * Tile::stride, key_tile + j * Tile::stride,
          grad_output + r * Tile::stride, value_tile + j * Tile::stride);
      weights[r * (Tile::columns + 1) + j] = pair.weight;
      gradients[r * (Tile::columns + 1) + j] = pair.gradient;
    }
    __syncthreads();
    for (int j = 0; j < Tile::columns; ++j) {
      const C gradient = gradients[row * (Tile::columns + 1) + j];
      if (s.scaled(key + j)) {
        const C weight = weights[row * (Tile::columns + 1) + j];
        if (key + j == s.span_begin) {
          first_scaled.add(weight, gradient);
          continue;
        }
        rest_scaled.add(weight, gradient);
      } else {
        others += gradient;
      }
#pragma unroll
      for (int i = 0; i < Tile::values; ++i)
        grad_query[i] += gradient * key_tile[j * Tile::stride + lane + i * Tile::row_threads];
    }
  }
  const C first_change = first_scaled.settled(rest_scaled.change + others);
  first_scaled.add(rest_scaled.weight, rest_scaled.change);
  double log_scale_part = 0;
  if (lane == 0 && first + row < c.queries) {
    head_rows.first_change[first + row] = first_change;
    log_scale_part = first_scaled.settled(others);
  }
  log_scale_part = row_sum<32>(log_scale_part);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = log_scale_part;
  __syncthreads();
  if (threadIdx.x == 0) {
    double sum = 0;
    for (const double x : sums) sum += x;
    parts[(static_cast<int64_t>(sample) * c.heads + head) * row_tiles + tile] = sum;
  }
  if (first + row >= c.queries) return;
  T* to = written_row_of<T>(g.grad_query, sample, head, first + row);
  const bool none = s.span_begin == s.span_end;
  const T* first_key = row_of<T>(c.key, sample, key_head, none ? 0 : s.span_begin);
#pragma unroll
  for (int i = 0; i < Tile::values; ++i) {
    const int column = lane + i * Tile::row_threads;
    if (column >= c.head_size) continue;
    if (!none) grad_query[i] += first_change * widened(first_key[column]);
    to[column] = narrowed<T>(grad_query[i] * head_rows.scale);
  }
}

template <typename T, int size>
__global__ void __launch_bounds__(threads)
    backward_keys(const CudaAttention c, const CudaAttentionGradients g, AccumulatorOf<T>* rows,
                  int key_tiles) {
  using C = AccumulatorOf<T>;
  using Tile = Tiles<C, size>;
  extern __shared__ char memory[];
  C* key_tile = reinterpret_cast<C*>(memory);
  C* value_tile = key_tile + Tile::rows * Tile::stride;
  C* query = value_tile + Tile::rows * Tile::stride;
  C* grad_output = query + Tile::columns * Tile::stride;
  C* weights = grad_output + Tile::columns * Tile::stride;    // [keys][queries + 1]
  C* gradients = weights + Tile::rows * (Tile::columns + 1);  // likewise
  const int tile = blockIdx.x % key_tiles, key_head = blockIdx.x / key_tiles % c.key_heads;
  const int sample = blockIdx.x / key_tiles / c.key_heads, group = c.heads / c.key_heads;
  const Sight s = sight_of(c, sample);
  const int first = tile * Tile::rows;
  const C scale = static_cast<C>(c.scale);
  const int row = threadIdx.x / Tile::row_threads, lane = threadIdx.x % Tile::row_threads;

  load_both<T, C, size, Tile::rows>(key_tile, c.key, value_tile, c.value, c, sample, key_head,
                                    first, c.keys);
  C grad_key[Tile::values] = {}, grad_value[Tile::values] = {};
  const int query_begin = max(0, first - s.start);
  const int query_end =
      s.window ? min(c.queries, first + Tile::rows - 1 + s.window - s.start) : c.queries;
  for (int head = key_head * group; head < (key_head + 1) * group; ++head) {
    const HeadRows<C> head_rows(c, g, rows, sample, head);
    for (int i0 = query_begin; i0 < query_end; i0 += Tile::columns) {
      __syncthreads();
      load_both<T, C, size, Tile::columns>(query, c.query, grad_output, g.grad_output, c, sample,
                                           head, i0, c.queries);
      __syncthreads();
      for (int i = threadIdx.x; i < Tile::rows * Tile::columns; i += threads) {
        const int r = i / Tile::columns, j = i % Tile::columns;
        const Pair<C> pair = pair_of<size>(
            s, head_rows, i0 + j, first + r, query + j * Tile::stride, key_tile + r * Tile::stride,
            grad_output + j * Tile::stride, value_tile + r * Tile::stride);
        weights[r * (Tile::columns + 1) + j] = pair.weight;
        gradients[r * (Tile::columns + 1) + j] =
            first + r == s.span_begin && s.scaled(first + r) && i0 + j < c.queries
                ? head_rows.first_change[i0 + j]
                : pair.gradient;
      }
      __syncthreads();
      for (int j = 0; j < Tile::columns; ++j) {
        const C weight = weights[row * (Tile::columns + 1) + j];
        const C gradient = gradients[row * (Tile::columns + 1) + j];
#pragma unroll
        for (int i = 0; i < Tile::values; ++i) {
          const int column = lane + i * Tile::row_threads;
          grad_value[i] += weight * grad_output[j * Tile::stride + column];
          grad_key[i] += gradient * query[j * Tile::stride + column];
        }
      }
    }
  }
  if (first + row >= c.keys) return;
  T* to_key = written_row_of<T>(g.grad_key, sample, key_head, first + row);
  T* to_value = written_row_of<T>(g.grad_value, sample, key_head, first + row);
#pragma unroll
  for (int i = 0; i < Tile::values; ++i) {
    const int column = lane + i * Tile::row_threads;
    if (column < c.head_size) to_key[column] = narrowed<T>(grad_key[i] * scale);
    if (column < c.value_head_size) to_value[column] = narrowed<T>(grad_value[i]);
  }
}

template <typename C>
__global__ void __launch_bounds__(threads)
    add_parts(const CudaAttention c, const double* parts, int row_tiles, C* grad_log_scale) {
  const int item = blockIdx.x * threads + threadIdx.x;
  const bool per_sample = c.log_scale_batch_stride != 0;
  if (item >= (per_sample ? c.batch : 1) * c.heads) return;
  double sum = 0;
  for (int sample = 0; sample < (per_sample ? 1 : c.batch); ++sample) {
    const int64_t first = (static_cast<int64_t>(sample) * c.heads + item) * row_tiles;
    for (int i = 0; i < row_tiles; ++i) sum += parts[first + i];
  }
  grad_log_scale[item] = static_cast<C>(sum);
}

int tiles_of(int rows, int tile) { return (rows + tile - 1) / tile; }

int64_t rows_bytes(const CudaAttention& c) {
  const int64_t size = c.dtype == DType::float64 ? 8 : 4;
  return 2 * int64_t{c.batch} * c.heads * c.queries * size;
}

template <typename Kernel>
cudaError_t allow_shared_memory(Kernel kernel, int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

template <typename T, int size>
cudaError_t launch_forward(const CudaAttention& c, cudaStream_t stream) {
  using C = AccumulatorOf<T>;
  using Tile = Tiles<C, size>;
  constexpr int bytes =
      sizeof(C) * ((Tile::rows + Tile::columns) * Tile::stride + Tile::rows * (Tile::columns + 1));
  const cudaError_t error = allow_shared_memory(forward<T, size>, bytes);
  if (error != cudaSuccess) return error;
  const int tiles = tiles_of(c.queries, Tile::rows);
  forward<T, size><<<tiles * c.heads * c.batch, threads, bytes, stream>>>(c, tiles);
  return cudaGetLastError();
}

template <typename T, int size>
cudaError_t launch_backward(const CudaAttention& c, const CudaAttentionGradients& g,
                            cudaStream_t stream) {
  using C = AccumulatorOf<T>;
  using Tile = Tiles<C, size>;
  constexpr int bytes = sizeof(C) * (2 * (Tile::rows + Tile::columns) * Tile::stride +
                                     2 * Tile::rows * (Tile::columns + 1));
  C* rows = static_cast<C*>(g.scratch);
  double* parts = reinterpret_cast<double*>(static_cast<char*>(g.scratch) + rows_bytes(c));
  const int row_tiles = tiles_of(c.queries, Tile::rows), key_tiles = tiles_of(c.keys, Tile::rows);
  const int64_t row_count = int64_t{c.batch} * c.heads * c.queries;
  for (const cudaError_t error : {allow_shared_memory(backward_queries<T, size>, bytes),
                                  allow_shared_memory(backward_keys<T, size>, bytes)}) {
    if (error != cudaSuccess) return error;
  }
  make_delta<T>
      <<<static_cast<unsigned>((row_count * 32 + threads - 1) / threads), threads, 0, stream>>>(
          c, g, rows);
  backward_queries<T, size>
      <<<row_tiles * c.heads * c.batch, threads, bytes, stream>>>(c, g, rows, parts, row_tiles);
  if (key_tiles > 0) {
    backward_keys<T, size>
        <<<key_tiles * c.key_heads * c.batch, threads, bytes, stream>>>(c, g, rows, key_tiles);
  }
  add_parts<C><<<tiles_of(c.batch * c.heads, threads), threads, 0, stream>>>(
      c, parts, row_tiles, static_cast<C*>(g.grad_log_scale));
  return cudaGetLastError();
}

// Calls launch with the element type and the smallest of 64, 128, 256 that holds the heads.
template <typename T, typename Launch>
cudaError_t with_size(const CudaAttention& c, const Launch& launch) {
  const int size = std::max(c.head_size, c.value_head_size);
  if (size <= 64) return launch(T{}, std::integral_constant<int, 64>());
  if (size <= 128) return launch(T{}, std::integral_constant<int, 128>());
  if (size <= 256) return launch(T{}, std::integral_constant<int, 256>());
  return cudaErrorNotSupported;
}
template <typename Launch>
cudaError_t with_type(const CudaAttention& c, const Launch& launch) {
  switch (c.dtype) {
    case DType::float64:
      return with_size<double>(c, launch);
    case DType::float32:
      return with_size<float>(c, launch);
    case DType::bfloat16:
      return with_size<__nv_bfloat16>(c, launch);
    default:
      return with_size<__half>(c, launch);
  }
}

}  // namespace
}  // namespace plain

cudaError_t attention_plain(const CudaAttention& c, cudaStream_t stream) {
  return plain::with_type(c, [&](auto type, auto size) {
    return plain::launch_forward<decltype(type), decltype(size)::value>(c, stream);
  });
}

int64_t attention_backward_plain_scratch(const CudaAttention& c) {
  constexpr int smallest_tile = 8;
  return plain::rows_bytes(c) + int64_t{c.batch} * c.heads *
                                    plain::tiles_of(c.queries, smallest_tile) *
                                    static_cast<int64_t>(sizeof(double));
}

cudaError_t attention_backward_plain(const CudaAttention& c, const CudaAttentionGradients& g,
                                     cudaStream_t stream) {
  return plain::with_type(c, [&](auto type, auto size) {
    return plain::launch_backward<decltype(type), decltype(size)::value>(c, g, stream);
  });
}

}  // namespace zerotuning::attention
