// Sums over query rows that every block of a backward kernel left as a part: what the first scaled
// key's rows of gradients and the gradient of log_scale are made of. Added in a fixed order.
#pragma once

#include "attention/cuda/device.cuh"

namespace zerotuning::attention::device {

// [batch, heads, parts of a head][key columns, value columns, 1]: sums of ds q, of a do and of ds.
struct RowParts {
  float* data;
  int of_head, key_columns, value_columns;

  __host__ __device__ int columns() const { return key_columns + value_columns; }
  __host__ __device__ int size() const { return columns() + 1; }
  __device__ __forceinline__ float* at(int64_t sequence, int part) const {
    return data + (sequence * of_head + part) * size();
  }
  int64_t bytes(const CudaAttention& c) const {
    return int64_t{c.batch} * c.heads * of_head * size() * static_cast<int64_t>(sizeof(float));
  }
};

constexpr int parts_threads = 256;
constexpr int parts_block_columns = 32;

// One block for 32 columns of the rows of a sample's key head, a lane for each column; the block's
// warps take the parts by turns.
template <typename T>
__device__ void write_first_scaled_rows(const CudaAttention& c, const CudaAttentionGradients& g,
                                        const RowParts& parts, int block) {
  constexpr int warps = parts_threads / 32;
  __shared__ float sums[warps][32];
  const int columns = parts.columns();
  const int blocks = (columns + parts_block_columns - 1) / parts_block_columns;
  const int sequence = block / blocks, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int i = block % blocks * parts_block_columns + lane;
  const int sample = sequence / c.key_heads, key_head = sequence % c.key_heads;
  const int group = c.heads / c.key_heads;
  const Sight s = sight_of(c, sample);
  if (s.span_begin >= s.span_end) return;
  const float* first = parts.at(static_cast<int64_t>(sample) * c.heads + key_head * group, 0);
  float sum = 0;
#pragma unroll 8
  for (int part = warp; part < group * parts.of_head; part += warps) {
    if (i < columns) sum += first[static_cast<int64_t>(part) * parts.size() + i];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || i >= columns) return;
  for (int other = 1; other < warps; ++other) sum += sums[other][lane];
  if (i < parts.key_columns) {
    written_row_of<T>(g.grad_key, sample, key_head, s.span_begin)[i] =
        narrowed<T>(sum * static_cast<float>(c.scale));
  } else {
    written_row_of<T>(g.grad_value, sample, key_head, s.span_begin)[i - parts.key_columns] =
        narrowed<T>(sum);
  }
}

// One warp for an entry of log_scale.
__device__ __forceinline__ void write_log_scale(const CudaAttention& c,
                                                const CudaAttentionGradients& g,
                                                const RowParts& parts, int entry) {
  const bool per_sample = c.log_scale_batch_stride != 0;
  const int lane = threadIdx.x % 32, samples = per_sample ? 1 : c.batch;
  if (entry >= (per_sample ? c.batch : 1) * c.heads) return;
  double sum = 0;
#pragma unroll 4
  for (int i = lane; i < samples * parts.of_head; i += 32) {
    const int64_t sequence = static_cast<int64_t>(i / parts.of_head) * c.heads + entry;
    sum += parts.at(sequence, i % parts.of_head)[parts.columns()];
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (lane == 0) static_cast<float*>(g.grad_log_scale)[entry] = static_cast<float>(sum);
}

// Its first blocks add the parts of rows, the others those of log_scale. Static: files are built
// for different cards.
template <typename T>
static __global__ void __launch_bounds__(parts_threads)
    add_row_parts(const CudaAttention c, const CudaAttentionGradients g, const RowParts parts,
                  int row_blocks) {
  wait_for_previous_kernel();
  const int block = blockIdx.x, entry_block = block - row_blocks;
  if (entry_block < 0) {
    write_first_scaled_rows<T>(c, g, parts, block);
  } else {
    write_log_scale(c, g, parts, (entry_block * parts_threads + threadIdx.x) / 32);
  }
}

template <typename T>
static cudaError_t launch_add_row_parts(const CudaAttention& c, const CudaAttentionGradients& g,
                                        const RowParts& parts, bool early, cudaStream_t stream) {
  const int entries = c.log_scale_batch_stride != 0 ? c.batch * c.heads : c.heads;
  const int column_blocks = (parts.columns() + parts_block_columns - 1) / parts_block_columns;
  const int row_blocks = c.batch * c.key_heads * column_blocks;
  const int log_scale_blocks = (entries * 32 + parts_threads - 1) / parts_threads;
  return launch_kernel(add_row_parts<T>, row_blocks + log_scale_blocks, parts_threads, 0, early,
                       stream, c, g, parts, row_blocks);
}

}  // namespace zerotuning::attention::device
