// Backward attention without tensor cores: the exact route, for any dtype and geometry.
//
// Four kernels: compute_delta (Δ = do·o of each row), differentiate_queries (dQ, dS of the first
// scaled key, partial sums of log_scale's gradient; a block a tile of queries), differentiate_keys
// (dK, dV; a block a tile of keys) and reduce_log_scale. No gradient is added by atomics.
//
// Scratch memory: delta and initial_grad_logit (dS of each row's first scaled key), both [batch,
// heads, queries], then the partial sums of grad_log_scale [batch, heads, row_tiles] in float64.
#include "attention/cuda/plain/tiles.cuh"
#include "attention/cuda/rounding_correction.cuh"
#include "attention/cuda_backward.h"

namespace zerotuning::attention {
namespace plain {
namespace {

// Loads the same rows of two arrays: of the head size of query and key, and of value's.
template <typename T, typename C, int size, int rows>
__device__ void load_both(C* tile, const Strided4<const void>& array, C* value_tile,
                          const Strided4<const void>& value_array, const CudaAttention& call,
                          int sample, int head, int first, int end) {
  load<T, C, size, rows>(tile, array, sample, head, first, end, call.head_size);
  load<T, C, size, rows>(value_tile, value_array, sample, head, first, end, call.value_head_size);
}

template <typename T>
__global__ void __launch_bounds__(threads)
    compute_delta(const CudaAttention call, const CudaAttentionGradients gradients,
                  AccumulatorOf<T>* delta) {
  using C = AccumulatorOf<T>;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * (threads / 32) + threadIdx.x / 32;
  if (item >= static_cast<int64_t>(call.batch) * call.heads * call.queries) return;
  const int row = item % call.queries, head = item / call.queries % call.heads,
            sample = item / call.queries / call.heads;
  const T* output = row_of<T>(gradients.output, sample, head, row);
  const T* grad_output = row_of<T>(gradients.grad_output, sample, head, row);
  C sum = 0;
  for (int i = threadIdx.x % 32; i < call.value_head_size; i += 32)
    sum += widened(output[i]) * widened(grad_output[i]);
  sum = lane_sum<32>(sum);
  if (threadIdx.x % 32 == 0) delta[item] = sum;
}

// What the backward kernels read of one head in addition to its tiles.
template <typename C>
struct HeadRows {
  C scale, log_scale;
  const C* logsumexp;
  int64_t logsumexp_stride;
  const C* delta;
  C* initial_grad_logit;
  int queries;

  __device__ HeadRows(const CudaAttention& call, const CudaAttentionGradients& gradients, C* rows,
                      int sample, int head)
      : scale(static_cast<C>(call.scale)),
        log_scale(log_scale_of<C>(call, sample, head)),
        logsumexp(row_of<C>(gradients.logsumexp, sample, head, 0)),
        logsumexp_stride(gradients.logsumexp.row_stride),
        delta(rows + (static_cast<int64_t>(sample) * call.heads + head) * call.queries),
        initial_grad_logit(rows + (static_cast<int64_t>(sample + call.batch) * call.heads + head) *
                                      call.queries),
        queries(call.queries) {}
};

// A key's weight for a query and the gradient dS of its logit.
template <typename C>
struct WeightAndGradient {
  C weight, grad_logit;
};

// P = exp(scale q·k + log_scale - lse) and dS = P (do·v - Δ); zeros if the key is not visible to
// the query. A row whose visible logits are all -inf has logsumexp -inf and no weights: exp(-inf +
// inf) would be NaN.
template <int size, typename C>
__device__ __forceinline__ WeightAndGradient<C> differentiate_logit(
    const Visibility& v, const HeadRows<C>& head, int query, int key, const C* query_row,
    const C* key_row, const C* grad_output_row, const C* value_row) {
  if (query >= head.queries || !v.is_visible(key, v.start + query)) return {0, 0};
  const C logsumexp = head.logsumexp[query * head.logsumexp_stride];
  const C log_scale = v.is_scaled(key) ? head.log_scale : C{0};
  const C exponent = head.scale * dot<C, size>(query_row, key_row) + log_scale - logsumexp;
  const C weight = logsumexp == -INFINITY ? C{0} : exponential(exponent);
  return {weight, weight * (dot<C, size>(grad_output_row, value_row) - head.delta[query])};
}

template <typename T, int size>
__global__ void __launch_bounds__(threads)
    differentiate_queries(const CudaAttention call, const CudaAttentionGradients gradients,
                          AccumulatorOf<T>* rows, double* partial, int row_tiles) {
  // Long: the stages of one loop share registers and shared memory.
  using C = AccumulatorOf<T>;
  using Tile = Tiles<C, size>;
  extern __shared__ char memory[];
  C* query = reinterpret_cast<C*>(memory);
  C* grad_output = query + Tile::rows * Tile::stride;
  C* key_tile = grad_output + Tile::rows * Tile::stride;
  C* value_tile = key_tile + Tile::columns * Tile::stride;
  C* weights = value_tile + Tile::columns * Tile::stride;       // [rows][columns + 1]
  C* grad_logits = weights + Tile::rows * (Tile::columns + 1);  // likewise
  __shared__ double sums[threads / 32];
  const int tile = blockIdx.x % row_tiles, head = blockIdx.x / row_tiles % call.heads;
  const int sample = blockIdx.x / row_tiles / call.heads;
  const int key_head = head / (call.heads / call.key_heads);
  const Visibility v = visibility_of(call, sample);
  const HeadRows<C> head_rows(call, gradients, rows, sample, head);
  const int first = tile * Tile::rows, end = min(first + Tile::rows, call.queries);
  const int row = threadIdx.x / Tile::row_threads, lane = threadIdx.x % Tile::row_threads;

  load_both<T, C, size, Tile::rows>(query, call.query, grad_output, gradients.grad_output, call,
                                    sample, head, first, call.queries);
  C grad_query[Tile::values] = {}, others_grad_logit = 0;
  RowSums<C> first_scaled, rest_scaled;
  int key_begin, key_end;
  key_range(v, first, end, &key_begin, &key_end);
  for (int key = key_begin; key < key_end; key += Tile::columns) {
    __syncthreads();
    load_both<T, C, size, Tile::columns>(key_tile, call.key, value_tile, call.value, call, sample,
                                         key_head, key, call.keys);
    __syncthreads();
    for (int i = threadIdx.x; i < Tile::rows * Tile::columns; i += threads) {
      const int r = i / Tile::columns, j = i % Tile::columns;
      const WeightAndGradient<C> result = differentiate_logit<size>(
          v, head_rows, first + r, key + j, query + r * Tile::stride, key_tile + j * Tile::stride,
          grad_output + r * Tile::stride, value_tile + j * Tile::stride);
      weights[r * (Tile::columns + 1) + j] = result.weight;
      grad_logits[r * (Tile::columns + 1) + j] = result.grad_logit;
    }
    __syncthreads();
    for (int j = 0; j < Tile::columns; ++j) {
      const C grad_logit = grad_logits[row * (Tile::columns + 1) + j];
      if (v.is_scaled(key + j)) {
        const C weight = weights[row * (Tile::columns + 1) + j];
        if (key + j == v.span_begin) {
          first_scaled.add(weight, grad_logit);
          continue;
        }
        rest_scaled.add(weight, grad_logit);
      } else {
        others_grad_logit += grad_logit;
      }
#pragma unroll
      for (int i = 0; i < Tile::values; ++i)
        grad_query[i] += grad_logit * key_tile[j * Tile::stride + lane + i * Tile::row_threads];
    }
  }
  const C initial_grad_logit =
      first_scaled.correct_rounding(rest_scaled.grad_logit + others_grad_logit);
  first_scaled.add(rest_scaled.weight, rest_scaled.grad_logit);
  double log_scale_sum = 0;
  if (lane == 0 && first + row < call.queries) {
    head_rows.initial_grad_logit[first + row] = initial_grad_logit;
    log_scale_sum = first_scaled.correct_rounding(others_grad_logit);
  }
  log_scale_sum = lane_sum<32>(log_scale_sum);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = log_scale_sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    double sum = 0;
    for (const double x : sums) sum += x;
    partial[(static_cast<int64_t>(sample) * call.heads + head) * row_tiles + tile] = sum;
  }
  if (first + row >= call.queries) return;
  T* to = written_row_of<T>(gradients.grad_query, sample, head, first + row);
  const bool has_no_span = v.span_begin == v.span_end;
  const T* initial_key = row_of<T>(call.key, sample, key_head, has_no_span ? 0 : v.span_begin);
#pragma unroll
  for (int i = 0; i < Tile::values; ++i) {
    const int column = lane + i * Tile::row_threads;
    if (column >= call.head_size) continue;
    if (!has_no_span) grad_query[i] += initial_grad_logit * widened(initial_key[column]);
    to[column] = narrowed<T>(grad_query[i] * head_rows.scale);
  }
}

template <typename T, int size>
__global__ void __launch_bounds__(threads)
    differentiate_keys(const CudaAttention call, const CudaAttentionGradients gradients,
                       AccumulatorOf<T>* rows, int key_tiles) {
  // Long: the stages of one loop share registers and shared memory.
  using C = AccumulatorOf<T>;
  using Tile = Tiles<C, size>;
  extern __shared__ char memory[];
  C* key_tile = reinterpret_cast<C*>(memory);
  C* value_tile = key_tile + Tile::rows * Tile::stride;
  C* query = value_tile + Tile::rows * Tile::stride;
  C* grad_output = query + Tile::columns * Tile::stride;
  C* weights = grad_output + Tile::columns * Tile::stride;      // [keys][queries + 1]
  C* grad_logits = weights + Tile::rows * (Tile::columns + 1);  // likewise
  const int tile = blockIdx.x % key_tiles, key_head = blockIdx.x / key_tiles % call.key_heads;
  const int sample = blockIdx.x / key_tiles / call.key_heads;
  const int group = call.heads / call.key_heads;
  const Visibility v = visibility_of(call, sample);
  const int first = tile * Tile::rows;
  const C scale = static_cast<C>(call.scale);
  const int row = threadIdx.x / Tile::row_threads, lane = threadIdx.x % Tile::row_threads;

  load_both<T, C, size, Tile::rows>(key_tile, call.key, value_tile, call.value, call, sample,
                                    key_head, first, call.keys);
  C grad_key[Tile::values] = {}, grad_value[Tile::values] = {};
  const int query_begin = max(0, first - v.start);
  const int query_end =
      v.window ? min(call.queries, first + Tile::rows - 1 + v.window - v.start) : call.queries;
  for (int head = key_head * group; head < (key_head + 1) * group; ++head) {
    const HeadRows<C> head_rows(call, gradients, rows, sample, head);
    for (int i0 = query_begin; i0 < query_end; i0 += Tile::columns) {
      __syncthreads();
      load_both<T, C, size, Tile::columns>(query, call.query, grad_output, gradients.grad_output,
                                           call, sample, head, i0, call.queries);
      __syncthreads();
      for (int i = threadIdx.x; i < Tile::rows * Tile::columns; i += threads) {
        const int r = i / Tile::columns, j = i % Tile::columns;
        const WeightAndGradient<C> result = differentiate_logit<size>(
            v, head_rows, i0 + j, first + r, query + j * Tile::stride, key_tile + r * Tile::stride,
            grad_output + j * Tile::stride, value_tile + r * Tile::stride);
        weights[r * (Tile::columns + 1) + j] = result.weight;
        grad_logits[r * (Tile::columns + 1) + j] =
            first + r == v.span_begin && v.is_scaled(first + r) && i0 + j < call.queries
                ? head_rows.initial_grad_logit[i0 + j]
                : result.grad_logit;
      }
      __syncthreads();
      for (int j = 0; j < Tile::columns; ++j) {
        const C weight = weights[row * (Tile::columns + 1) + j];
        const C grad_logit = grad_logits[row * (Tile::columns + 1) + j];
#pragma unroll
        for (int i = 0; i < Tile::values; ++i) {
          const int column = lane + i * Tile::row_threads;
          grad_value[i] += weight * grad_output[j * Tile::stride + column];
          grad_key[i] += grad_logit * query[j * Tile::stride + column];
        }
      }
    }
  }
  if (first + row >= call.keys) return;
  T* to_key = written_row_of<T>(gradients.grad_key, sample, key_head, first + row);
  T* to_value = written_row_of<T>(gradients.grad_value, sample, key_head, first + row);
#pragma unroll
  for (int i = 0; i < Tile::values; ++i) {
    const int column = lane + i * Tile::row_threads;
    if (column < call.head_size) to_key[column] = narrowed<T>(grad_key[i] * scale);
    if (column < call.value_head_size) to_value[column] = narrowed<T>(grad_value[i]);
  }
}

// A thread sums one entry of grad_log_scale over row tiles, and over the samples if log_scale is
// one vector for all of them.
template <typename C>
__global__ void __launch_bounds__(threads)
    reduce_log_scale(const CudaAttention call, const double* partial, int row_tiles,
                     C* grad_log_scale) {
  const int entry = blockIdx.x * threads + threadIdx.x;
  const bool per_sample = call.log_scale_batch_stride != 0;
  if (entry >= (per_sample ? call.batch : 1) * call.heads) return;
  double sum = 0;
  for (int sample = 0; sample < (per_sample ? 1 : call.batch); ++sample) {
    const int64_t first = (static_cast<int64_t>(sample) * call.heads + entry) * row_tiles;
    for (int i = 0; i < row_tiles; ++i) sum += partial[first + i];
  }
  grad_log_scale[entry] = static_cast<C>(sum);
}

// The bytes of delta and initial_grad_logit in scratch memory.
int64_t rows_bytes(const CudaAttention& call) {
  const int64_t size = call.dtype == DType::float64 ? 8 : 4;
  return 2 * int64_t{call.batch} * call.heads * call.queries * size;
}

template <typename T, int size>
cudaError_t launch_backward(const CudaAttention& call, const CudaAttentionGradients& gradients,
                            cudaStream_t stream) {
  using C = AccumulatorOf<T>;
  using Tile = Tiles<C, size>;
  constexpr int bytes = sizeof(C) * (2 * (Tile::rows + Tile::columns) * Tile::stride +
                                     2 * Tile::rows * (Tile::columns + 1));
  const auto allow_bytes = [](auto kernel) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  };
  C* rows = static_cast<C*>(gradients.scratch);
  double* partial =
      reinterpret_cast<double*>(static_cast<char*>(gradients.scratch) + rows_bytes(call));
  const int row_tiles = tile_count(call.queries, Tile::rows);
  const int key_tiles = tile_count(call.keys, Tile::rows);
  const int64_t row_count = int64_t{call.batch} * call.heads * call.queries;
  const auto delta_blocks = static_cast<unsigned>((row_count * 32 + threads - 1) / threads);
  cudaError_t error = allow_bytes(differentiate_queries<T, size>);
  if (error == cudaSuccess) error = allow_bytes(differentiate_keys<T, size>);
  if (error != cudaSuccess) return error;
  compute_delta<T><<<delta_blocks, threads, 0, stream>>>(call, gradients, rows);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  differentiate_queries<T, size><<<row_tiles * call.heads * call.batch, threads, bytes, stream>>>(
      call, gradients, rows, partial, row_tiles);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  if (key_tiles > 0) {
    differentiate_keys<T, size>
        <<<key_tiles * call.key_heads * call.batch, threads, bytes, stream>>>(call, gradients, rows,
                                                                              key_tiles);
    error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  reduce_log_scale<C><<<tile_count(call.batch * call.heads, threads), threads, 0, stream>>>(
      call, partial, row_tiles, static_cast<C*>(gradients.grad_log_scale));
  return cudaGetLastError();
}

}  // namespace
}  // namespace plain

int64_t attention_backward_plain_scratch(const CudaAttention& call) {
  constexpr int smallest_tile = 8;
  const int64_t row_tiles = plain::tile_count(call.queries, smallest_tile);
  return plain::rows_bytes(call) +
         int64_t{call.batch} * call.heads * row_tiles * static_cast<int64_t>(sizeof(double));
}

cudaError_t attention_backward_plain(const CudaAttention& call,
                                     const CudaAttentionGradients& gradients, cudaStream_t stream) {
  return plain::with_type(call, [&](auto type, auto size) {
    return plain::launch_backward<decltype(type), decltype(size)::value>(call, gradients, stream);
  });
}

}  // namespace zerotuning::attention
