// The initial token's part of attention whose other keys a stock kernel computed: one pass over the
// rows, bound by memory. A row belongs to `lanes` neighbouring lanes of 16 bytes each; k_0 and v_0
// stay in registers while a block goes through its rows.
#include <algorithm>

#include "attention/cuda/row_parts.cuh"
#include "attention/cuda/rows.cuh"
#include "attention/cuda_initial_token.h"

namespace zerotuning::attention {
namespace initial_token {
namespace {

using namespace device;

constexpr int threads = 256;
// On a multiprocessor: with more of them each has registers for fewer loads.
constexpr int blocks_at_once = 2;
// Rows that a block goes through. backward writes sums for each block; merge takes the fewest with
// which all blocks run at once (by `bench attention` on an H100 0.91 of the copy rate at 4 x 1024,
// where 64 rows without the next ones on their way gave 0.73).
constexpr int most_rows = 512, fewest_rows = 64;
// The second key's gradient is taken away as the stock kernel made it: of the output in 16 bits,
// whose rounding then goes with it. Up to this weight the output is not read: what of its rounding
// stays is no more than the second key's own gradient has of it, a sixteenth of it at most.
constexpr float largest_weight_without_output = 1.f / 16;

// What a block works on: rows [begin, end) of one head, and its scaled key.
struct Work {
  int sample, head, key_head, begin, end;
  int key, start, window;  // key == keys: there is none
  float bias;

  __device__ Work(const CudaAttention& c, int row_blocks, int block_rows) {
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
__global__ void __launch_bounds__(threads, blocks_at_once)
    merge(const CudaAttention c, const Strided4<const void> part,
          const Strided4<const void> part_logsumexp, int first_row, int row_blocks,
          int block_rows) {
  constexpr int row_step = threads / lanes, unrolled = 2;
  const Work w(c, row_blocks, block_rows);
  const int lane = threadIdx.x % lanes, row_thread = threadIdx.x / lanes;
  struct Row {
    uint4 query, output;
    float logsumexp;
  };
  const auto load = [&](int row) {
    Row r{};
    r.logsumexp = -INFINITY;
    if (row >= w.end) return r;
    r.query = read<T>(c.query, w.sample, w.head, row, lane, c.head_size);
    if (row < first_row) return r;
    r.output = read<T>(part, w.sample, w.head, row - first_row, lane, c.value_head_size);
    r.logsumexp = *row_of<float>(part_logsumexp, w.sample, w.head, row - first_row);
    return r;
  };
  // As in backward, the next rows are on their way while some are worked on.
  Row next[unrolled];
#pragma unroll
  for (int u = 0; u < unrolled; ++u) next[u] = load(w.begin + row_thread + u * row_step);
  Chunk key{}, value{};
  if (w.key < c.keys) {
    key = unpack<T>(read<T>(c.key, w.sample, w.key_head, w.key, lane, c.head_size));
    value = unpack<T>(read<T>(c.value, w.sample, w.key_head, w.key, lane, c.value_head_size));
  }
  const float scale = static_cast<float>(c.scale);
  for (int row0 = w.begin + row_thread; row0 - row_thread < w.end; row0 += unrolled * row_step) {
    Row rows[unrolled];
#pragma unroll
    for (int u = 0; u < unrolled; ++u) {
      rows[u] = next[u];
      next[u] = load(row0 + (unrolled + u) * row_step);
    }
#pragma unroll
    for (int u = 0; u < unrolled; ++u) {
      const int row = row0 + u * row_step;
      const float product = lane_sum<lanes>(dot(unpack<T>(rows[u].query), key));
      if (row >= w.end) continue;
      const float logit = w.sees(row, c.keys) ? scale * product + w.bias : -INFINITY;
      const float logsumexp = rows[u].logsumexp;
      const float top = fmaxf(logit, logsumexp), zero = top == -INFINITY ? 0 : top;
      const float own = expf(logit - zero), others = expf(logsumexp - zero);
      const float total = own + others, factor = total == 0 ? 0 : 1 / total;
      Chunk merged = unpack<T>(rows[u].output), output_minus_initial_value;
#pragma unroll
      for (int i = 0; i < chunk; ++i) {
        const float other = others == 0 ? 0 : merged.x[i];
        merged.x[i] = (own * value.x[i] + others * other) * factor;
        output_minus_initial_value.x[i] = others * (other - value.x[i]) * factor;
      }
      write<T>(c.output, w.sample, w.head, row, lane, c.value_head_size, merged);
      if (c.output_minus_initial_value.data)
        write<T>(c.output_minus_initial_value, w.sample, w.head, row, lane, c.value_head_size,
                 output_minus_initial_value);
      if (lane == 0 && c.logsumexp.data) {
        *written_row_of<float>(c.logsumexp, w.sample, w.head, row) =
            total == 0 ? -INFINITY : top + logf(total);
      }
    }
  }
}

template <typename T, int lanes>
__global__ void __launch_bounds__(threads, blocks_at_once)
    backward(const CudaAttention c, const CudaAttentionGradients g,
             const TorchKernelGradients stock, const RowParts parts) {
  constexpr int row_step = threads / lanes;
  start_dependent_kernel();
  const Work w(c, parts.of_head, most_rows);
  const int lane = threadIdx.x % lanes, row_thread = threadIdx.x / lanes;
  const bool doubled = stock.initial_key_replaced,
             kept = g.output_minus_initial_value.data != nullptr;
  uint4 key{}, value{}, second_key{}, second_value{};
  Chunk grad_key{}, grad_value{};
  float grad_log_scale = 0;
  if (w.key < c.keys) {
    key = read<T>(c.key, w.sample, w.key_head, w.key, lane, c.head_size);
    value = read<T>(c.value, w.sample, w.key_head, w.key, lane, c.value_head_size);
  }
  if (doubled) {
    second_key = read<T>(c.key, w.sample, w.key_head, 1, lane, c.head_size);
    second_value = read<T>(c.value, w.sample, w.key_head, 1, lane, c.value_head_size);
  }
  const float scale = static_cast<float>(c.scale);
  struct Row {
    uint4 query, grad_output, output /* or the output_minus_initial_value */, part;
    float logsumexp;
  };
  const auto load = [&](int row) {
    Row r{};
    r.logsumexp = -INFINITY;
    if (row >= w.end) return r;
    r.query = read<T>(c.query, w.sample, w.head, row, lane, c.head_size);
    r.grad_output = read<T>(g.grad_output, w.sample, w.head, row, lane, c.value_head_size);
    r.output = read<T>(kept ? g.output_minus_initial_value : g.output, w.sample, w.head, row, lane,
                       c.value_head_size);
    r.logsumexp = *row_of<float>(g.logsumexp, w.sample, w.head, row);
    // Row 0 sees no second key; what a stock kernel says of it may be infinite.
    if (row > 0 || !doubled)
      r.part = read<T>(stock.query, w.sample, w.head, row, lane, c.head_size);
    return r;
  };
  // Each row is on its way while the one before it is worked on (on an H100 4 x 1024 in 73 us, not
  // 79).
  Row next = load(w.begin + row_thread);
  for (int row = w.begin + row_thread; row - row_thread < w.end; row += row_step) {
    const Row r = next;
    next = load(row + row_step);
    const Chunk q = unpack<T>(r.query), d = unpack<T>(r.grad_output);
    // v_0 - o
    const Chunk gap = difference(kept ? Chunk{} : unpack<T>(value), unpack<T>(r.output));
    const float product = lane_sum<lanes>(dot(q, unpack<T>(key)));
    const float change = lane_sum<lanes>(dot(d, gap));
    float second_gradient = 0;
    if (doubled) {
      const float logit = scale * lane_sum<lanes>(dot(q, unpack<T>(second_key)));
      const bool real = row > 0 && row < w.end;
      const float second_weight = real ? expf(logit - r.logsumexp) : 0;
      Chunk o = difference(unpack<T>(value), gap);
      if (kept && second_weight > largest_weight_without_output)
        o = unpack<T>(read<T>(g.output, w.sample, w.head, row, lane, c.value_head_size));
      second_gradient =
          second_weight * lane_sum<lanes>(dot(d, difference(unpack<T>(second_value), o)));
    }
    if (row >= w.end) continue;
    const bool sees = w.sees(row, c.keys) && r.logsumexp != -INFINITY;
    const float weight = sees ? expf(scale * product + w.bias - r.logsumexp) : 0;
    const float gradient = weight * change;
    Chunk grad_query = unpack<T>(r.part);
    const Chunk k = unpack<T>(key), k1 = unpack<T>(second_key);
#pragma unroll
    for (int i = 0; i < chunk; ++i) {
      grad_query.x[i] += scale * (gradient * k.x[i] - second_gradient * k1.x[i]);
      grad_key.x[i] += gradient * q.x[i];
      grad_value.x[i] += weight * d.x[i];
    }
    grad_log_scale += gradient;
    write<T>(g.grad_query, w.sample, w.head, row, lane, c.head_size, grad_query);
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
  float* own = parts.at(0, blockIdx.x);
  for (int i = threadIdx.x; i < parts.size(); i += threads) {
    const int column = i < parts.key_columns ? i
                       : i < parts.columns() ? lanes * chunk + i - parts.key_columns
                                             : 2 * lanes * chunk;
    float sum = 0;
    for (int r = 0; r < row_step; ++r) sum += sums[r][column];
    own[i] = sum;
  }
}

// Rows of keys with row 1 in the place of row 0 as well; 16 bytes a thread.
template <typename T>
__device__ __forceinline__ void copy_doubled(const Strided4<const void>& from,
                                             const Strided4<void>& to, int keys, int heads,
                                             int columns, int64_t i) {
  const int chunks = columns / chunk;
  const int column = static_cast<int>(i % chunks) * chunk;
  i /= chunks;
  const int head = static_cast<int>(i % heads), row = static_cast<int>(i / heads % keys),
            sample = static_cast<int>(i / heads / keys);
  *reinterpret_cast<uint4*>(written_row_of<T>(to, sample, head, row) + column) =
      *reinterpret_cast<const uint4*>(row_of<T>(from, sample, head, max(row, 1)) + column);
}

template <typename T>
__global__ void __launch_bounds__(threads)
    double_rows(const CudaAttention c, const Strided4<void> key, const Strided4<void> value) {
  const int64_t rows = int64_t{c.batch} * c.keys * c.key_heads;
  const int64_t keys = rows * (c.head_size / chunk), values = rows * (c.value_head_size / chunk);
  const int64_t step = int64_t{gridDim.x} * threads;
#pragma unroll 4
  for (int64_t i = int64_t{blockIdx.x} * threads + threadIdx.x; i < keys; i += step)
    copy_doubled<T>(c.key, key, c.keys, c.key_heads, c.head_size, i);
#pragma unroll 4
  for (int64_t i = int64_t{blockIdx.x} * threads + threadIdx.x; i < values; i += step)
    copy_doubled<T>(c.value, value, c.keys, c.key_heads, c.value_head_size, i);
}

int row_blocks_of(const CudaAttention& c, int block_rows) {
  return (c.queries + block_rows - 1) / block_rows;
}

RowParts parts_of(const CudaAttention& c, float* data) {
  return {data, row_blocks_of(c, most_rows), c.head_size, c.value_head_size};
}

template <typename Launch>
cudaError_t with_lanes(const CudaAttention& c, const Launch& launch) {
  const int size = c.head_size > c.value_head_size ? c.head_size : c.value_head_size;
  if (size <= 8 * chunk) return launch(std::integral_constant<int, 8>());
  if (size <= 16 * chunk) return launch(std::integral_constant<int, 16>());
  return launch(std::integral_constant<int, 32>());
}

int merge_rows_of(const CudaAttention& c, const CudaDevice& device) {
  const int64_t rows = int64_t{c.batch} * c.heads * c.queries;
  const int blocks = blocks_at_once * device.multiprocessors;
  const int64_t steps =
      (rows + int64_t{blocks} * fewest_rows - 1) / (int64_t{blocks} * fewest_rows);
  return static_cast<int>(std::clamp<int64_t>(steps * fewest_rows, fewest_rows, most_rows));
}

template <typename T>
cudaError_t launch_merge(const CudaAttention& c, const Strided4<const void>& part,
                         const Strided4<const void>& part_logsumexp, int first_row,
                         const CudaDevice& device, cudaStream_t stream) {
  const int block_rows = merge_rows_of(c, device), row_blocks = row_blocks_of(c, block_rows);
  return with_lanes(c, [&](auto lanes) {
    merge<T, decltype(lanes)::value><<<row_blocks * c.heads * c.batch, threads, 0, stream>>>(
        c, part, part_logsumexp, first_row, row_blocks, block_rows);
    return cudaGetLastError();
  });
}

template <typename T>
cudaError_t launch_backward(const CudaAttention& c, const CudaAttentionGradients& g,
                            const TorchKernelGradients& stock, bool early, cudaStream_t stream) {
  const RowParts parts = parts_of(c, static_cast<float*>(g.scratch));
  const cudaError_t error = with_lanes(c, [&](auto lanes) {
    backward<T, decltype(lanes)::value>
        <<<parts.of_head * c.heads * c.batch, threads, 0, stream>>>(c, g, stock, parts);
    return cudaGetLastError();
  });
  return error == cudaSuccess ? launch_add_row_parts<T>(c, g, parts, early, stream) : error;
}

template <typename T>
cudaError_t launch_doubling(const CudaAttention& c, const Strided4<void>& key,
                            const Strided4<void>& value, cudaStream_t stream) {
  constexpr int thread_chunks = 4, most_blocks = 4096;
  const int64_t chunks = int64_t{c.batch} * c.key_heads * c.keys * c.head_size / chunk;
  const int blocks =
      static_cast<int>(std::clamp<int64_t>(chunks / (threads * thread_chunks), 1, most_blocks));
  double_rows<T><<<blocks, threads, 0, stream>>>(c, key, value);
  return cudaGetLastError();
}

}  // namespace
}  // namespace initial_token

cudaError_t initial_token_merge(const CudaAttention& c, const Strided4<const void>& part,
                                const Strided4<const void>& part_logsumexp, int32_t first_row,
                                const CudaDevice& device, cudaStream_t stream) {
  return c.dtype == DType::float16 ? initial_token::launch_merge<__half>(c, part, part_logsumexp,
                                                                         first_row, device, stream)
                                   : initial_token::launch_merge<__nv_bfloat16>(
                                         c, part, part_logsumexp, first_row, device, stream);
}

int64_t initial_token_backward_scratch(const CudaAttention& c) {
  return initial_token::parts_of(c, nullptr).bytes(c);
}

cudaError_t initial_token_backward(const CudaAttention& c, const CudaAttentionGradients& g,
                                   const TorchKernelGradients& stock, const CudaDevice& device,
                                   cudaStream_t stream) {
  const bool early = device.supports_dependent_launch();
  return c.dtype == DType::float16
             ? initial_token::launch_backward<__half>(c, g, stock, early, stream)
             : initial_token::launch_backward<__nv_bfloat16>(c, g, stock, early, stream);
}

cudaError_t replace_initial_key(const CudaAttention& c, const Strided4<void>& key,
                                const Strided4<void>& value, cudaStream_t stream) {
  return c.dtype == DType::float16
             ? initial_token::launch_doubling<__half>(c, key, value, stream)
             : initial_token::launch_doubling<__nv_bfloat16>(c, key, value, stream);
}

}  // namespace zerotuning::attention
