// Forward attention without tensor cores: the exact route, for any dtype and geometry.
//
// Bound: arithmetic in float32 (float64 for float64). A block of 256 threads computes a tile of
// queries of one head and walks over the tiles of keys visible to them, with an online softmax.
#include "attention/cuda/plain/tiles.cuh"
#include "attention/cuda_forward.h"

namespace zerotuning::attention {
namespace plain {
namespace {

template <typename T, int size>
__global__ void __launch_bounds__(threads) forward(const CudaAttention call, int row_tiles) {
  // Long: the stages of one loop share registers and shared memory.
  using C = AccumulatorOf<T>;
  using Tile = Tiles<C, size>;
  extern __shared__ char memory[];
  C* query = reinterpret_cast<C*>(memory);
  C* other = query + Tile::rows * Tile::stride;       // keys, then values
  C* weights = other + Tile::columns * Tile::stride;  // [rows][columns + 1]
  const int tile = blockIdx.x % row_tiles, head = blockIdx.x / row_tiles % call.heads;
  const int sample = blockIdx.x / row_tiles / call.heads;
  const int key_head = head / (call.heads / call.key_heads);
  const Visibility v = visibility_of(call, sample);
  const int first = tile * Tile::rows, end = min(first + Tile::rows, call.queries);
  const C log_scale = log_scale_of<C>(call, sample, head), scale = static_cast<C>(call.scale);
  const int row = threadIdx.x / Tile::row_threads, lane = threadIdx.x % Tile::row_threads;

  load<T, C, size, Tile::rows>(query, call.query, sample, head, first, call.queries,
                               call.head_size);
  C output[Tile::values] = {}, row_max = -INFINITY, row_sum = 0;
  int key_begin, key_end;
  key_range(v, first, end, &key_begin, &key_end);
  for (int key = key_begin; key < key_end; key += Tile::columns) {
    __syncthreads();
    load<T, C, size, Tile::columns>(other, call.key, sample, key_head, key, call.keys,
                                    call.head_size);
    __syncthreads();
    for (int i = threadIdx.x; i < Tile::rows * Tile::columns; i += threads) {
      const int r = i / Tile::columns, j = i % Tile::columns;
      C logit = -INFINITY;
      if (v.is_visible(key + j, v.start + first + r)) {
        logit = scale * dot<C, size>(query + r * Tile::stride, other + j * Tile::stride);
        if (v.is_scaled(key + j)) logit += log_scale;
      }
      weights[r * (Tile::columns + 1) + j] = logit;
    }
    __syncthreads();
    load<T, C, size, Tile::columns>(other, call.value, sample, key_head, key, call.keys,
                                    call.value_head_size);
    C* row_weights = weights + row * (Tile::columns + 1);
    C new_max = -INFINITY;
    for (int j = lane; j < Tile::columns; j += Tile::row_threads)
      new_max = max(new_max, row_weights[j]);
    new_max = max(row_max, lane_max<Tile::row_threads>(new_max));
    const C offset = softmax_offset(new_max);
    C sum = 0;
    for (int j = lane; j < Tile::columns; j += Tile::row_threads) {
      row_weights[j] = exponential(row_weights[j] - offset);
      sum += row_weights[j];
    }
    const C rescale = exponential(row_max - offset);
    row_sum = row_sum * rescale + lane_sum<Tile::row_threads>(sum);
    row_max = new_max;
#pragma unroll
    for (C& x : output) x *= rescale;
    __syncthreads();
    for (int j = 0; j < Tile::columns; ++j) {
#pragma unroll
      for (int i = 0; i < Tile::values; ++i)
        output[i] += row_weights[j] * other[j * Tile::stride + lane + i * Tile::row_threads];
    }
  }
  if (first + row >= call.queries) return;
  T* to = written_row_of<T>(call.output, sample, head, first + row);
  const C factor = row_sum == 0 ? C{0} : 1 / row_sum;
  const bool has_no_span = v.span_begin == v.span_end;
  const T* initial_value = row_of<T>(call.value, sample, key_head, has_no_span ? 0 : v.span_begin);
#pragma unroll
  for (int i = 0; i < Tile::values; ++i) {
    const int column = lane + i * Tile::row_threads;
    if (column >= call.value_head_size) continue;
    to[column] = narrowed<T>(output[i] * factor);
    if (!call.output_minus_initial_value.data) continue;
    const C value = has_no_span ? C{0} : widened(initial_value[column]);
    written_row_of<T>(call.output_minus_initial_value, sample, head, first + row)[column] =
        narrowed<T>(output[i] * factor - value);
  }
  if (lane == 0 && call.logsumexp.data) {
    *written_row_of<C>(call.logsumexp, sample, head, first + row) =
        row_sum == 0 ? static_cast<C>(-INFINITY) : row_max + logarithm(row_sum);
  }
}

template <typename T, int size>
cudaError_t launch_forward(const CudaAttention& call, cudaStream_t stream) {
  using C = AccumulatorOf<T>;
  using Tile = Tiles<C, size>;
  constexpr int bytes =
      sizeof(C) * ((Tile::rows + Tile::columns) * Tile::stride + Tile::rows * (Tile::columns + 1));
  const cudaError_t error =
      cudaFuncSetAttribute(forward<T, size>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const int tiles = tile_count(call.queries, Tile::rows);
  forward<T, size><<<tiles * call.heads * call.batch, threads, bytes, stream>>>(call, tiles);
  return cudaGetLastError();
}

}  // namespace
}  // namespace plain

cudaError_t attention_plain(const CudaAttention& call, cudaStream_t stream) {
  return plain::with_type(call, [&](auto type, auto size) {
    return plain::launch_forward<decltype(type), decltype(size)::value>(call, stream);
  });
}

}  // namespace zerotuning::attention
