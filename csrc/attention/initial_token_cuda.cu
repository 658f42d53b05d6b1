// The initial token's part of attention whose other keys a stock kernel computed: one pass over the
// rows, bound by memory. A row belongs to `lanes` neighbouring lanes of 16 bytes each; k_0 and v_0
// stay in registers while a block goes through its rows.
#include <algorithm>

#include "attention/cuda_rows.cuh"

namespace zerotuning::attention {
namespace initial_token {
namespace {

using namespace device;

constexpr int threads = 256;
constexpr int block_rows = 256;

// What a block works on: rows [begin, end) of one head, and its scaled key.
struct Work {
  int sample, head, key_head, begin, end;
  int key, start, window;  // key == keys: there is none
  float bias;

  __device__ Work(const CudaAttention& c, int row_blocks) {
    const int sequence = blockIdx.x / row_blocks;
    sample = sequence / c.heads;
    head = sequence % c.heads;
    key_head = head / (c.heads / c.key_heads);
    begin = static_cast<int>(blockIdx.x % row_blocks) * block_rows;
    end = min(begin + block_rows, c.queries);
    const Sight s = sight_of(c, sample);
    key = s.span_begin < s.span_end ? s.span_begin : c.keys;
    start = s.start;
    window = s.window;
    bias = static_cast<const float*>(
        c.log_scale)[sample * c.log_scale_batch_stride + head * c.log_scale_head_stride];
  }
  __device__ __forceinline__ bool sees(int row, int keys) const {
    const int position = start + row;
    return key < keys && key <= position && (!window || key > position - window);
  }
};

template <typename T, int lanes>
__global__ void __launch_bounds__(threads)
    merge(const CudaAttention c, const Array4 part, const Array4 part_logsumexp, int first_row,
          int row_blocks) {
  constexpr int row_step = threads / lanes, unrolled = 4;
  const Work w(c, row_blocks);
  const int lane = threadIdx.x % lanes;
  Chunk key{}, value{};
  if (w.key < c.keys) {
    key = unpack<T>(read<T>(c.key, w.sample, w.key_head, w.key, lane, c.head_size));
    value = unpack<T>(read<T>(c.value, w.sample, w.key_head, w.key, lane, c.value_head_size));
  }
  const float scale = static_cast<float>(c.scale);
  for (int row0 = w.begin + threadIdx.x / lanes;
       row0 - static_cast<int>(threadIdx.x / lanes) < w.end; row0 += unrolled * row_step) {
    uint4 query[unrolled], output[unrolled];
    float logsumexp[unrolled];
#pragma unroll
    for (int u = 0; u < unrolled; ++u) {
      const int row = row0 + u * row_step;
      query[u] = output[u] = uint4{0, 0, 0, 0};
      logsumexp[u] = -INFINITY;
      if (row >= w.end) continue;
      query[u] = read<T>(c.query, w.sample, w.head, row, lane, c.head_size);
      if (row < first_row) continue;
      output[u] = read<T>(part, w.sample, w.head, row - first_row, lane, c.value_head_size);
      logsumexp[u] = *row_of<float>(part_logsumexp, w.sample, w.head, row - first_row);
    }
#pragma unroll
    for (int u = 0; u < unrolled; ++u) {
      const int row = row0 + u * row_step;
      const float product = lane_sum<lanes>(dot(unpack<T>(query[u]), key));
      if (row >= w.end) continue;
      const float logit = w.sees(row, c.keys) ? scale * product + w.bias : -INFINITY;
      const float top = fmaxf(logit, logsumexp[u]), zero = top == -INFINITY ? 0 : top;
      const float own = expf(logit - zero), others = expf(logsumexp[u] - zero);
      const float total = own + others, factor = total == 0 ? 0 : 1 / total;
      Chunk merged = unpack<T>(output[u]);
#pragma unroll
      for (int i = 0; i < chunk; ++i)
        merged.x[i] = (own * value.x[i] + (others == 0 ? 0 : others * merged.x[i])) * factor;
      write<T>(c.output, w.sample, w.head, row, lane, c.value_head_size, merged);
      if (lane == 0 && c.logsumexp.data) {
        *written_row_of<float>(c.logsumexp, w.sample, w.head, row) =
            total == 0 ? -INFINITY : top + logf(total);
      }
    }
  }
}

// Of a block: its sums of ds q, of a do and of ds.
__device__ __forceinline__ int64_t part_size(const CudaAttention& c) {
  return c.head_size + c.value_head_size + 1;
}

template <typename T, int lanes>
__global__ void __launch_bounds__(threads)
    backward(const CudaAttention c, const CudaAttentionGradients g, const Array4 part_query,
             int first_row, int row_blocks, float* parts) {
  constexpr int row_step = threads / lanes, unrolled = 2;
  const Work w(c, row_blocks);
  const int lane = threadIdx.x % lanes, row_thread = threadIdx.x / lanes;
  Chunk key{}, value{}, grad_key{}, grad_value{};
  float grad_log_scale = 0;
  if (w.key < c.keys) {
    key = unpack<T>(read<T>(c.key, w.sample, w.key_head, w.key, lane, c.head_size));
    value = unpack<T>(read<T>(c.value, w.sample, w.key_head, w.key, lane, c.value_head_size));
  }
  const float scale = static_cast<float>(c.scale);
  for (int row0 = w.begin + row_thread; row0 - row_thread < w.end; row0 += unrolled * row_step) {
    uint4 query[unrolled], grad_output[unrolled], output[unrolled], part[unrolled];
    float logsumexp[unrolled];
#pragma unroll
    for (int u = 0; u < unrolled; ++u) {
      const int row = row0 + u * row_step;
      query[u] = grad_output[u] = output[u] = part[u] = uint4{0, 0, 0, 0};
      logsumexp[u] = -INFINITY;
      if (row >= w.end) continue;
      query[u] = read<T>(c.query, w.sample, w.head, row, lane, c.head_size);
      grad_output[u] = read<T>(g.grad_output, w.sample, w.head, row, lane, c.value_head_size);
      output[u] = read<T>(c.output, w.sample, w.head, row, lane, c.value_head_size);
      logsumexp[u] = *row_of<float>(c.logsumexp, w.sample, w.head, row);
      if (row >= first_row)
        part[u] = read<T>(part_query, w.sample, w.head, row - first_row, lane, c.head_size);
    }
#pragma unroll
    for (int u = 0; u < unrolled; ++u) {
      const int row = row0 + u * row_step;
      const Chunk q = unpack<T>(query[u]), d = unpack<T>(grad_output[u]);
      Chunk difference = unpack<T>(output[u]);
#pragma unroll
      for (int i = 0; i < chunk; ++i) difference.x[i] = value.x[i] - difference.x[i];
      const float product = lane_sum<lanes>(dot(q, key));
      const float change = lane_sum<lanes>(dot(d, difference));  // do·v_0 - do·o
      if (row >= w.end) continue;
      const bool sees = w.sees(row, c.keys) && logsumexp[u] != -INFINITY;
      const float weight = sees ? expf(scale * product + w.bias - logsumexp[u]) : 0;
      const float gradient = weight * change;
      Chunk grad_query = unpack<T>(part[u]);
#pragma unroll
      for (int i = 0; i < chunk; ++i) {
        grad_query.x[i] += scale * gradient * key.x[i];
        grad_key.x[i] += gradient * q.x[i];
        grad_value.x[i] += weight * d.x[i];
      }
      grad_log_scale += gradient;
      write<T>(g.grad_query, w.sample, w.head, row, lane, c.head_size, grad_query);
    }
  }
  // The block's row threads, summed in order.
  __shared__ float sums[row_step][2 * lanes * chunk + 1];
#pragma unroll
  for (int i = 0; i < chunk; ++i) {
    sums[row_thread][lane * chunk + i] = grad_key.x[i];
    sums[row_thread][(lanes + lane) * chunk + i] = grad_value.x[i];
  }
  if (lane == 0) sums[row_thread][2 * lanes * chunk] = grad_log_scale;
  __syncthreads();
  float* own = parts + blockIdx.x * part_size(c);
  for (int i = threadIdx.x; i < part_size(c); i += threads) {
    const int column = i < c.head_size        ? i
                       : i < part_size(c) - 1 ? lanes * chunk + i - c.head_size
                                              : 2 * lanes * chunk;
    float sum = 0;
    for (int r = 0; r < row_step; ++r) sum += sums[r][column];
    own[i] = sum;
  }
}

// What is left of the gradients, in one launch: its first blocks add the parts of the initial
// token's rows, the next ones those of log_scale, all others copy the stock kernel's rows.
struct LastStep {
  Array4 part_key, part_value;  // of keys first_key, first_key + 1, ...
  int first_key, row_blocks, row_sum_blocks, log_scale_blocks;
};

__host__ __device__ constexpr int column_blocks(int columns) { return (columns + 31) / 32; }

// One block for 32 columns of the rows of a sample's key head, a lane for each column; the block's
// warps take the parts by turns.
template <typename T>
__device__ void write_initial_rows(const CudaAttention& c, const CudaAttentionGradients& g,
                                   int row_blocks, const float* parts, int block) {
  constexpr int warps = threads / 32;
  __shared__ float sums[warps][32];
  const int columns = c.head_size + c.value_head_size, blocks = column_blocks(columns);
  const int sequence = block / blocks, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int i = block % blocks * 32 + lane;
  const int sample = sequence / c.key_heads, key_head = sequence % c.key_heads;
  const int group = c.heads / c.key_heads;
  const Sight s = sight_of(c, sample);
  if (s.span_begin >= s.span_end) return;
  const int64_t first = (static_cast<int64_t>(sample) * c.heads + key_head * group) * row_blocks;
  float sum = 0;
#pragma unroll 8
  for (int part = warp; part < group * row_blocks; part += warps) {
    if (i < columns) sum += parts[(first + part) * part_size(c) + i];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || i >= columns) return;
  for (int other = 1; other < warps; ++other) sum += sums[other][lane];
  if (i < c.head_size) {
    written_row_of<T>(g.grad_key, sample, key_head, s.span_begin)[i] =
        narrowed<T>(sum * static_cast<float>(c.scale));
  } else {
    written_row_of<T>(g.grad_value, sample, key_head, s.span_begin)[i - c.head_size] =
        narrowed<T>(sum);
  }
}

// One warp for an entry of log_scale.
__device__ __forceinline__ void write_log_scale(const CudaAttention& c,
                                                const CudaAttentionGradients& g, int row_blocks,
                                                const float* parts, int entry) {
  const bool per_sample = c.log_scale_batch_stride != 0;
  const int lane = threadIdx.x % 32;
  if (entry >= (per_sample ? c.batch : 1) * c.heads) return;
  double sum = 0;
  for (int sample = 0; sample < (per_sample ? 1 : c.batch); ++sample) {
    const int64_t first = (static_cast<int64_t>(sample) * c.heads + entry) * row_blocks;
    for (int i = lane; i < row_blocks; i += 32) sum += parts[(first + i + 1) * part_size(c) - 1];
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (lane == 0) static_cast<float*>(g.grad_log_scale)[entry] = static_cast<float>(sum);
}

// A block's share of all rows but the initial token's, 16 bytes a thread.
template <typename T>
__device__ void copy_rows(const CudaAttention& c, const Array4& from, const Array4& to, int columns,
                          int first_key, int block, int blocks) {
  const int chunks = columns / chunk, rows = c.keys - first_key;
  const int count = c.batch * rows * c.key_heads * chunks, step = blocks * threads;
#pragma unroll 4
  for (int i = block * threads + threadIdx.x; i < count; i += step) {
    const int column = i % chunks * chunk, head = i / chunks % c.key_heads;
    const int row = i / chunks / c.key_heads % rows, sample = i / chunks / c.key_heads / rows;
    const Sight s = sight_of(c, sample);
    if (row + first_key == s.span_begin && s.span_begin < s.span_end) continue;
    *reinterpret_cast<uint4*>(written_row_of<T>(to, sample, head, row + first_key) + column) =
        *reinterpret_cast<const uint4*>(row_of<T>(from, sample, head, row) + column);
  }
}

template <typename T>
__global__ void __launch_bounds__(threads)
    write_gradients(const CudaAttention c, const CudaAttentionGradients g, const LastStep last,
                    const float* parts) {
  int block = blockIdx.x;
  if (block < last.row_sum_blocks) {
    write_initial_rows<T>(c, g, last.row_blocks, parts, block);
    return;
  }
  block -= last.row_sum_blocks;
  if (block < last.log_scale_blocks) {
    write_log_scale(c, g, last.row_blocks, parts, (block * threads + threadIdx.x) / 32);
    return;
  }
  block -= last.log_scale_blocks;
  const int blocks = gridDim.x - last.row_sum_blocks - last.log_scale_blocks;
  copy_rows<T>(c, last.part_key, g.grad_key, c.head_size, last.first_key, block, blocks);
  copy_rows<T>(c, last.part_value, g.grad_value, c.value_head_size, last.first_key, block, blocks);
}

int row_blocks_of(const CudaAttention& c) { return (c.queries + block_rows - 1) / block_rows; }

template <typename Launch>
cudaError_t with_lanes(const CudaAttention& c, const Launch& launch) {
  const int size = c.head_size > c.value_head_size ? c.head_size : c.value_head_size;
  if (size <= 8 * chunk) return launch(std::integral_constant<int, 8>());
  if (size <= 16 * chunk) return launch(std::integral_constant<int, 16>());
  return launch(std::integral_constant<int, 32>());
}

template <typename T>
cudaError_t launch_merge(const CudaAttention& c, const Array4& part, const Array4& part_logsumexp,
                         int first_row, cudaStream_t stream) {
  const int row_blocks = row_blocks_of(c);
  return with_lanes(c, [&](auto lanes) {
    merge<T, decltype(lanes)::value><<<row_blocks * c.heads * c.batch, threads, 0, stream>>>(
        c, part, part_logsumexp, first_row, row_blocks);
    return cudaGetLastError();
  });
}

template <typename T>
cudaError_t launch_backward(const CudaAttention& c, const CudaAttentionGradients& g,
                            const StockGradients& stock, cudaStream_t stream) {
  const int row_blocks = row_blocks_of(c);
  float* parts = static_cast<float*>(g.scratch);
  const cudaError_t error = with_lanes(c, [&](auto lanes) {
    backward<T, decltype(lanes)::value><<<row_blocks * c.heads * c.batch, threads, 0, stream>>>(
        c, g, stock.query, stock.first_row, row_blocks, parts);
    return cudaGetLastError();
  });
  if (error != cudaSuccess) return error;
  const int entries = c.log_scale_batch_stride != 0 ? c.batch * c.heads : c.heads;
  const LastStep last{stock.key,
                      stock.value,
                      stock.first_row,
                      row_blocks,
                      c.batch * c.key_heads * column_blocks(c.head_size + c.value_head_size),
                      (entries * 32 + threads - 1) / threads};
  constexpr int thread_chunks = 4, most_copy_blocks = 4096;
  const int64_t chunks = int64_t{c.batch} * c.key_heads * c.keys * c.head_size / chunk;
  const int copy_blocks = static_cast<int>(
      std::clamp<int64_t>(chunks / (threads * thread_chunks), 1, most_copy_blocks));
  write_gradients<T>
      <<<last.row_sum_blocks + last.log_scale_blocks + copy_blocks, threads, 0, stream>>>(
          c, g, last, parts);
  return cudaGetLastError();
}

}  // namespace
}  // namespace initial_token

cudaError_t initial_token_merge(const CudaAttention& c, const Array4& part,
                                const Array4& part_logsumexp, int32_t first_row,
                                cudaStream_t stream) {
  return c.dtype == DType::float16
             ? initial_token::launch_merge<__half>(c, part, part_logsumexp, first_row, stream)
             : initial_token::launch_merge<__nv_bfloat16>(c, part, part_logsumexp, first_row,
                                                          stream);
}

int64_t initial_token_backward_scratch(const CudaAttention& c) {
  return int64_t{c.batch} * c.heads * initial_token::row_blocks_of(c) *
         (c.head_size + c.value_head_size + 1) * static_cast<int64_t>(sizeof(float));
}

cudaError_t initial_token_backward(const CudaAttention& c, const CudaAttentionGradients& g,
                                   const StockGradients& stock, cudaStream_t stream) {
  return c.dtype == DType::float16
             ? initial_token::launch_backward<__half>(c, g, stock, stream)
             : initial_token::launch_backward<__nv_bfloat16>(c, g, stock, stream);
}

}  // namespace zerotuning::attention
