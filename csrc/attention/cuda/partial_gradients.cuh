// The second step of sums over query rows: gradients of the first scaled key and of log_scale.
//
// Each block of a backward kernel writes its partial sums over the query rows of a head; this
// kernel adds them in a fixed order, so that the gradients repeat bit by bit.
#pragma once

#include "attention/cuda/addresses.cuh"
#include "attention/cuda/launch.cuh"
#include "attention/cuda/numbers.cuh"
#include "attention/cuda/visibility.cuh"

namespace zerotuning::attention::device {

// [batch, heads, per_head][key columns, value columns, 1]: sums of ds q, of a do, and of ds.
struct PartialGradients {
  float* data;
  int per_head, key_columns, value_columns;

  __host__ __device__ int columns() const { return key_columns + value_columns; }
  __host__ __device__ int size() const { return columns() + 1; }
  // sequence: sample * heads + head.
  __device__ __forceinline__ float* at(int64_t sequence, int part) const {
    return data + (sequence * per_head + part) * size();
  }
  int64_t bytes(const CudaAttention& call) const {
    return int64_t{call.batch} * call.heads * per_head * size() *
           static_cast<int64_t>(sizeof(float));
  }
};

constexpr int reduction_threads = 256;
constexpr int reduction_columns = 32;  // of a block

// Writes the gradients of the first scaled key's rows of key and value. A block reduces 32 columns
// of one key head of a sample: a lane per column, the partial sums divided among the warps.
template <typename T>
__device__ void write_first_scaled_rows(const CudaAttention& call,
                                        const CudaAttentionGradients& gradients,
                                        const PartialGradients& partial, int block) {
  constexpr int warps = reduction_threads / 32;
  __shared__ float sums[warps][32];
  const int columns = partial.columns();
  const int blocks = (columns + reduction_columns - 1) / reduction_columns;
  const int sequence = block / blocks, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = block % blocks * reduction_columns + lane;
  const int sample = sequence / call.key_heads, key_head = sequence % call.key_heads;
  const int group = call.heads / call.key_heads;
  const Visibility visibility = visibility_of(call, sample);
  if (visibility.span_begin >= visibility.span_end) return;
  const float* first = partial.at(static_cast<int64_t>(sample) * call.heads + key_head * group, 0);
  float sum = 0;
#pragma unroll 8
  for (int part = warp; part < group * partial.per_head; part += warps) {
    if (column < columns) sum += first[static_cast<int64_t>(part) * partial.size() + column];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= columns) return;
  for (int other = 1; other < warps; ++other) sum += sums[other][lane];
  const int row = visibility.span_begin;
  if (column < partial.key_columns) {
    written_row_of<T>(gradients.grad_key, sample, key_head, row)[column] =
        narrowed<T>(sum * static_cast<float>(call.scale));
  } else {
    written_row_of<T>(gradients.grad_value, sample, key_head, row)[column - partial.key_columns] =
        narrowed<T>(sum);
  }
}

// Writes one entry of grad_log_scale; a warp sums over the heads' partial sums, and over the
// samples if log_scale is one vector for all of them.
__device__ __forceinline__ void write_log_scale(const CudaAttention& call,
                                                const CudaAttentionGradients& gradients,
                                                const PartialGradients& partial, int entry) {
  const bool per_sample = call.log_scale_batch_stride != 0;
  const int lane = threadIdx.x % 32, samples = per_sample ? 1 : call.batch;
  if (entry >= (per_sample ? call.batch : 1) * call.heads) return;
  double sum = 0;
#pragma unroll 4
  for (int i = lane; i < samples * partial.per_head; i += 32) {
    const int64_t sequence = static_cast<int64_t>(i / partial.per_head) * call.heads + entry;
    sum += partial.at(sequence, i % partial.per_head)[partial.columns()];
  }
  sum = lane_sum<32>(sum);
  if (lane == 0) static_cast<float*>(gradients.grad_log_scale)[entry] = static_cast<float>(sum);
}

// The first row_blocks blocks reduce rows of key and value, the others entries of log_scale.
// Static: the files that include this header are compiled for different architectures.
template <typename T>
static __global__ void __launch_bounds__(reduction_threads)
    reduce_partial_gradients(const CudaAttention call, const CudaAttentionGradients gradients,
                             const PartialGradients partial, int row_blocks) {
  wait_for_previous_kernel();
  const int block = blockIdx.x, entry_block = block - row_blocks;
  if (entry_block < 0) {
    write_first_scaled_rows<T>(call, gradients, partial, block);
  } else {
    write_log_scale(call, gradients, partial, (entry_block * reduction_threads + threadIdx.x) / 32);
  }
}

template <typename T>
static cudaError_t launch_reduction(const CudaAttention& call,
                                    const CudaAttentionGradients& gradients,
                                    const PartialGradients& partial, bool dependent,
                                    cudaStream_t stream) {
  const int entries = call.log_scale_batch_stride != 0 ? call.batch * call.heads : call.heads;
  const int column_blocks = (partial.columns() + reduction_columns - 1) / reduction_columns;
  const int row_blocks = call.batch * call.key_heads * column_blocks;
  const int log_scale_blocks = (entries * 32 + reduction_threads - 1) / reduction_threads;
  return launch_kernel(reduce_partial_gradients<T>, row_blocks + log_scale_blocks,
                       reduction_threads, 0, dependent, stream, call, gradients, partial,
                       row_blocks);
}

}  // namespace zerotuning::attention::device
