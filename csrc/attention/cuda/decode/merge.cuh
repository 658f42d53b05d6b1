// Merges partial attention over disjoint keys: of a block's warps, then of the blocks ("splits")
// that share a key head. The order is fixed, so that results repeat bit by bit.
//
// Two partial rows with row_max m, row_sum l and unnormalised output O merge to
//   m' = max(m_a, m_b);  l' = 2^(m_a - m') l_a + 2^(m_b - m') l_b;  O' likewise
#pragma once

#include "attention/cuda/decode/mathematics.cuh"

namespace zerotuning::attention::decoding {

// Four columns of a row of attention over some of the keys. Weights are relative to row_max.
struct PartialRow {
  float4 output;
  float row_sum, row_max;
};

__device__ __forceinline__ void merge(PartialRow& to, const PartialRow& from) {
  const float row_max = fmaxf(to.row_max, from.row_max), offset = softmax_offset(row_max);
  const float a = exp2_fast(to.row_max - offset), b = exp2_fast(from.row_max - offset);
  to.output = {to.output.x * a + from.output.x * b, to.output.y * a + from.output.y * b,
               to.output.z * a + from.output.z * b, to.output.w * a + from.output.w * b};
  to.row_sum = to.row_sum * a + from.row_sum * b;
  to.row_max = row_max;
}

__device__ __forceinline__ PartialRow empty_row() { return {{0, 0, 0, 0}, 0, -INFINITY}; }

// Divides the output by row_sum. The output is 0 for a row that attends to no key. Returns
// logsumexp, base 2.
__device__ __forceinline__ float normalize(PartialRow& row) {
  const float factor = row.row_sum == 0 ? 0 : 1 / row.row_sum;
  row.output.x *= factor;
  row.output.y *= factor;
  row.output.z *= factor;
  row.output.w *= factor;
  return row.row_max + log2f(row.row_sum);
}

// A warp's sums in shared memory, written over the warp's tiles.
template <int size, int rows>
struct WarpSums {
  // Padded: the lanes of a half warp then write to different banks.
  float output[rows][size + 8];
  float row_max[rows], row_sum[rows];

  __device__ __forceinline__ PartialRow partial_row(int row, int column) const {
    return {*reinterpret_cast<const float4*>(&output[row][column]), row_sum[row], row_max[row]};
  }
};

template <int size, int row_tiles>
__device__ __forceinline__ void store_sums(const Accumulators<size, row_tiles>& sums,
                                           WarpSums<size, row_tiles * tile_rows>& to) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < row_tiles * 2; ++i) {
    const int tile = i / 2, half = i % 2, row = tile * tile_rows + lane / 4 + half * 8;
#pragma unroll
    for (int n = 0; n < size / 8; ++n) {
      *reinterpret_cast<float2*>(&to.output[row][n * 8 + lane % 4 * 2]) = {
          sums.output[tile][n][2 * half], sums.output[tile][n][2 * half + 1]};
    }
    const float row_sum = quad_sum(sums.row_sum[tile][half]);
    if (lane % 4 == 0) {
      to.row_max[row] = sums.row_max[tile][half];
      to.row_sum[row] = row_sum;
    }
  }
}

template <typename T>
__device__ __forceinline__ void write_result(const Arguments& args, int64_t batch, int64_t head,
                                             int64_t query, int column, PartialRow row) {
  const float logsumexp = normalize(row);
  uint16_t* output = written_row_of<uint16_t>(args.output, batch, head, query) + column;
  *reinterpret_cast<uint2*>(output) = {pack<T>(row.output.x, row.output.y),
                                       pack<T>(row.output.z, row.output.w)};
  if (args.logsumexp.data && column == 0)
    *written_row_of<float>(args.logsumexp, batch, head, query) = logsumexp * ln_2;
}

// Four columns of the results of a row's splits in scratch memory.
struct RowSplits {
  const float *output, *logsumexp;
  int count, last_row, columns;

  // Merges splits first, first + step, ... The rehearsal of merge_splits reads row 0 each time.
  __device__ __forceinline__ PartialRow merged(int first, int step) const {
    PartialRow result = empty_row();
#pragma unroll 4
    for (int split = first; split < count; split += step) {
      const int row = min(split, last_row);
      const float4 columns_of_row = *reinterpret_cast<const float4*>(output + row * columns);
      merge(result, {columns_of_row, 1, logsumexp[row]});
    }
    return result;
  }
};

// The index in scratch memory of a row's first split.
__device__ __forceinline__ int64_t first_split_of(const Arguments& args, int64_t batch, int head,
                                                  int query) {
  return ((batch * args.heads + head) * args.queries + query) * args.splits;
}

__device__ __forceinline__ RowSplits splits_of_row(const Arguments& args, int64_t first,
                                                   int column) {
  return {args.split_output + first * args.value_head_size + column, args.split_logsumexp + first,
          args.splits, args.splits - 1, args.value_head_size};
}

// Whether this block is the last of the blocks that share its rows. The last block can read the
// results of all these blocks.
__device__ __forceinline__ bool arrives_last(const Arguments& args) {
  __threadfence();
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    const int group = blockIdx.x % args.row_groups;
    uint32_t* arrivals =
        args.arrivals + (int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * args.row_groups + group;
    last = atomicAdd(arrivals, 1) == args.splits - 1;
    if (last) *arrivals = 0;
  }
  last = __syncthreads_or(last);
  __threadfence();
  return last;
}

// Merges the block's warps, whose sums lie `sums_pitch` bytes apart, into the result or, if the
// keys are split, into scratch memory. The last block of a key head then merges the splits.
template <typename T, int size, int rows>
__device__ __forceinline__ void merge_and_write(const Arguments& args, int split, int first_row,
                                                int warps, const char* sums, int sums_pitch) {
  const int key_head = blockIdx.y, batch = blockIdx.z;
  const int columns = args.value_head_size / 4, count = min(rows, args.rows - first_row) * columns;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int tile_row = i / columns, column = i % columns * 4, row = first_row + tile_row;
    PartialRow result = empty_row();
    for (int warp = 0; warp < warps; ++warp) {
      merge(result, reinterpret_cast<const WarpSums<size, rows>*>(sums + warp * sums_pitch)
                        ->partial_row(tile_row, column));
    }
    const int head = key_head * args.group + row / args.queries, query = row % args.queries;
    if (args.splits == 1) {
      write_result<T>(args, batch, head, query, column, result);
      continue;
    }
    const float logsumexp = normalize(result);
    const int64_t index = first_split_of(args, batch, head, query) + split;
    *reinterpret_cast<float4*>(args.split_output + index * args.value_head_size + column) =
        result.output;
    if (column == 0) args.split_logsumexp[index] = logsumexp;
  }
  if (args.splits == 1 || !args.arrivals || !arrives_last(args)) return;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int column = i % columns * 4, row = first_row + i / columns;
    const int head = key_head * args.group + row / args.queries, query = row % args.queries;
    const RowSplits splits = splits_of_row(args, first_split_of(args, batch, head, query), column);
    const int slices = merge_threads / columns;
    PartialRow result = splits.merged(0, slices);
    for (int slice = 1; slice < slices; ++slice) merge(result, splits.merged(slice, slices));
    write_result<T>(args, batch, head, query, column, result);
  }
}

}  // namespace zerotuning::attention::decoding
