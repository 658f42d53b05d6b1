// The initial token's share of attention whose other keys a kernel of torch computes.
//
// Bound: memory, one pass over the rows. A row belongs to `lanes` neighbouring lanes of 16 bytes
// each; k_0 and v_0 stay in registers while a block processes its rows. The formulas are beside
// the declarations, in cuda_initial_token.h.
#include <algorithm>

#include "attention/cuda/partial_gradients.cuh"
#include "attention/cuda/row_chunks.cuh"
#include "attention/cuda_initial_token.h"

namespace zerotuning::attention {
namespace initial_token {
namespace {

using namespace device;

constexpr int threads = 256;
// Blocks per multiprocessor: with more blocks each block has registers for fewer loads.
constexpr int blocks_per_multiprocessor = 2;
// Rows of a block. `backward` writes partial gradients for each block; `merge` uses the smallest
// blocks with which all blocks run at once (by `bench attention` on an H100 0.91 of the copy rate
// at 4 x 1024, where 64 rows without prefetching gave 0.73).
constexpr int max_block_rows = 512, min_block_rows = 64;
// Key 1's duplicate contribution is subtracted as torch computed it: with Δ from the output in 16
// bits, so that the rounding of the output cancels. If output_minus_initial_value is given, the
// 16-bit output is read only if key 1's weight is above this bound. Below the bound at most a
// sixteenth of the rounding remains, no more than in the gradient of key 1 itself.
constexpr float max_weight_without_output = 1.f / 16;

// A block's work: rows [begin, end) of one head, and the scaled key.
struct BlockWork {
  int sample, head, key_head, begin, end;
  int key;  // `keys` if no key is scaled
  int start, window;
  float log_scale;

  __device__ BlockWork(const CudaAttention& call, int row_blocks, int block_rows) {
    const int sequence = blockIdx.x / row_blocks;
    sample = sequence / call.heads;
    head = sequence % call.heads;
    key_head = head / (call.heads / call.key_heads);
    begin = static_cast<int>(blockIdx.x % row_blocks) * block_rows;
    end = min(begin + block_rows, call.queries);
    const Visibility visibility = visibility_of(call, sample);
    key = visibility.span_begin < visibility.span_end ? visibility.span_begin : call.keys;
    start = visibility.start;
    window = visibility.window;
    log_scale = log_scale_of<float>(call, sample, head);
  }
  // Whether the scaled key is visible to a query row.
  __device__ __forceinline__ bool is_visible(int row, int keys) const {
    const int position = start + row;
    return key < keys && key <= position && (!window || key > position - window);
  }
};

template <typename T, int lanes>
__global__ void __launch_bounds__(threads, blocks_per_multiprocessor)
    merge(const CudaAttention call, const Strided4<const void> partial,
          const Strided4<const void> partial_logsumexp, int first_row, int row_blocks,
          int block_rows) {
  // Long: one loop whose loads run ahead of its arithmetic in registers.
  constexpr int row_step = threads / lanes, unrolled = 2;
  const BlockWork work(call, row_blocks, block_rows);
  const int lane = threadIdx.x % lanes, row_thread = threadIdx.x / lanes;
  struct Row {
    uint4 query, output;
    float logsumexp;
  };
  const auto load = [&](int row) {
    Row r{};
    r.logsumexp = -INFINITY;
    if (row >= work.end) return r;
    r.query = read_chunk<T>(call.query, work.sample, work.head, row, lane, call.head_size);
    if (row < first_row) return r;
    r.output =
        read_chunk<T>(partial, work.sample, work.head, row - first_row, lane, call.value_head_size);
    r.logsumexp = *row_of<float>(partial_logsumexp, work.sample, work.head, row - first_row);
    return r;
  };
  // As in `backward`, the next rows are loaded while the current rows are computed.
  Row next[unrolled];
#pragma unroll
  for (int u = 0; u < unrolled; ++u) next[u] = load(work.begin + row_thread + u * row_step);
  Chunk key{}, value{};
  if (work.key < call.keys) {
    key = unpack_chunk<T>(
        read_chunk<T>(call.key, work.sample, work.key_head, work.key, lane, call.head_size));
    value = unpack_chunk<T>(read_chunk<T>(call.value, work.sample, work.key_head, work.key, lane,
                                          call.value_head_size));
  }
  const float scale = static_cast<float>(call.scale);
  for (int row0 = work.begin + row_thread; row0 - row_thread < work.end;
       row0 += unrolled * row_step) {
    Row rows[unrolled];
#pragma unroll
    for (int u = 0; u < unrolled; ++u) {
      rows[u] = next[u];
      next[u] = load(row0 + (unrolled + u) * row_step);
    }
#pragma unroll
    for (int u = 0; u < unrolled; ++u) {
      const int row = row0 + u * row_step;
      const float product = lane_sum<lanes>(dot(unpack_chunk<T>(rows[u].query), key));
      if (row >= work.end) continue;
      const float logit =
          work.is_visible(row, call.keys) ? scale * product + work.log_scale : -INFINITY;
      const float logsumexp = rows[u].logsumexp;
      const float row_max = fmaxf(logit, logsumexp), offset = softmax_offset(row_max);
      const float initial = expf(logit - offset), others = expf(logsumexp - offset);
      const float row_sum = initial + others, factor = row_sum == 0 ? 0 : 1 / row_sum;
      Chunk merged = unpack_chunk<T>(rows[u].output), output_minus_initial_value;
#pragma unroll
      for (int i = 0; i < chunk_size; ++i) {
        const float other = others == 0 ? 0 : merged.x[i];
        merged.x[i] = (initial * value.x[i] + others * other) * factor;
        output_minus_initial_value.x[i] = others * (other - value.x[i]) * factor;
      }
      write_chunk<T>(call.output, work.sample, work.head, row, lane, call.value_head_size, merged);
      if (call.output_minus_initial_value.data) {
        write_chunk<T>(call.output_minus_initial_value, work.sample, work.head, row, lane,
                       call.value_head_size, output_minus_initial_value);
      }
      if (lane == 0 && call.logsumexp.data) {
        *written_row_of<float>(call.logsumexp, work.sample, work.head, row) =
            row_sum == 0 ? -INFINITY : row_max + logf(row_sum);
      }
    }
  }
}

template <typename T, int lanes>
__global__ void __launch_bounds__(threads, blocks_per_multiprocessor)
    backward(const CudaAttention call, const CudaAttentionGradients gradients,
             const TorchKernelGradients torch, const PartialGradients partial) {
  // Long: one loop whose loads run ahead of its arithmetic in registers.
  constexpr int row_step = threads / lanes;
  allow_dependent_launch();
  const BlockWork work(call, partial.per_head, max_block_rows);
  const int lane = threadIdx.x % lanes, row_thread = threadIdx.x / lanes;
  const bool has_duplicate = torch.initial_key_replaced;  // of key 1's contribution
  const bool has_difference = gradients.output_minus_initial_value.data != nullptr;
  uint4 key{}, value{}, second_key{}, second_value{};
  Chunk grad_key{}, grad_value{};
  float grad_log_scale = 0;
  if (work.key < call.keys) {
    key = read_chunk<T>(call.key, work.sample, work.key_head, work.key, lane, call.head_size);
    value =
        read_chunk<T>(call.value, work.sample, work.key_head, work.key, lane, call.value_head_size);
  }
  if (has_duplicate) {
    second_key = read_chunk<T>(call.key, work.sample, work.key_head, 1, lane, call.head_size);
    second_value =
        read_chunk<T>(call.value, work.sample, work.key_head, 1, lane, call.value_head_size);
  }
  const float scale = static_cast<float>(call.scale);
  struct Row {
    uint4 query, grad_output, output /* or output_minus_initial_value */, grad_query;
    float logsumexp;
  };
  const auto load = [&](int row) {
    Row r{};
    r.logsumexp = -INFINITY;
    if (row >= work.end) return r;
    r.query = read_chunk<T>(call.query, work.sample, work.head, row, lane, call.head_size);
    r.grad_output = read_chunk<T>(gradients.grad_output, work.sample, work.head, row, lane,
                                  call.value_head_size);
    r.output =
        read_chunk<T>(has_difference ? gradients.output_minus_initial_value : gradients.output,
                      work.sample, work.head, row, lane, call.value_head_size);
    r.logsumexp = *row_of<float>(gradients.logsumexp, work.sample, work.head, row);
    // Key 1 is not visible to row 0: torch's gradient of that row may be infinite.
    if (row > 0 || !has_duplicate)
      r.grad_query = read_chunk<T>(torch.query, work.sample, work.head, row, lane, call.head_size);
    return r;
  };
  // Each row is loaded while the previous row is computed (on an H100 4 x 1024 in 73 us, not 79).
  Row next = load(work.begin + row_thread);
  for (int row = work.begin + row_thread; row - row_thread < work.end; row += row_step) {
    const Row r = next;
    next = load(row + row_step);
    const Chunk q = unpack_chunk<T>(r.query), d = unpack_chunk<T>(r.grad_output);
    // v_0 - o
    const Chunk value_minus_output =
        difference(has_difference ? Chunk{} : unpack_chunk<T>(value), unpack_chunk<T>(r.output));
    const float product = lane_sum<lanes>(dot(q, unpack_chunk<T>(key)));
    const float grad_weight = lane_sum<lanes>(dot(d, value_minus_output));
    float second_grad_logit = 0;
    if (has_duplicate) {
      const float logit = scale * lane_sum<lanes>(dot(q, unpack_chunk<T>(second_key)));
      const bool is_visible = row > 0 && row < work.end;
      const float second_weight = is_visible ? expf(logit - r.logsumexp) : 0;
      Chunk o = difference(unpack_chunk<T>(value), value_minus_output);
      if (has_difference && second_weight > max_weight_without_output) {
        o = unpack_chunk<T>(read_chunk<T>(gradients.output, work.sample, work.head, row, lane,
                                          call.value_head_size));
      }
      second_grad_logit =
          second_weight * lane_sum<lanes>(dot(d, difference(unpack_chunk<T>(second_value), o)));
    }
    if (row >= work.end) continue;
    const bool is_visible = work.is_visible(row, call.keys) && r.logsumexp != -INFINITY;
    const float weight = is_visible ? expf(scale * product + work.log_scale - r.logsumexp) : 0;
    const float grad_logit = weight * grad_weight;
    Chunk grad_query = unpack_chunk<T>(r.grad_query);
    const Chunk k = unpack_chunk<T>(key), k1 = unpack_chunk<T>(second_key);
#pragma unroll
    for (int i = 0; i < chunk_size; ++i) {
      grad_query.x[i] += scale * (grad_logit * k.x[i] - second_grad_logit * k1.x[i]);
      grad_key.x[i] += grad_logit * q.x[i];
      grad_value.x[i] += weight * d.x[i];
    }
    grad_log_scale += grad_logit;
    write_chunk<T>(gradients.grad_query, work.sample, work.head, row, lane, call.head_size,
                   grad_query);
  }
  // The sums of the block's row threads are added in order.
  __shared__ float sums[row_step][2 * lanes * chunk_size + 1];
#pragma unroll
  for (int i = 0; i < chunk_size; ++i) {
    sums[row_thread][lane * chunk_size + i] = grad_key.x[i];
    sums[row_thread][(lanes + lane) * chunk_size + i] = grad_value.x[i];
  }
  if (lane == 0) sums[row_thread][2 * lanes * chunk_size] = grad_log_scale;
  __syncthreads();
  float* block_sums = partial.at(0, blockIdx.x);
  for (int i = threadIdx.x; i < partial.size(); i += threads) {
    const int column = i < partial.key_columns ? i
                       : i < partial.columns() ? lanes * chunk_size + i - partial.key_columns
                                               : 2 * lanes * chunk_size;
    float sum = 0;
    for (int r = 0; r < row_step; ++r) sum += sums[r][column];
    block_sums[i] = sum;
  }
}

// Copies chunk number i of an array of key rows, with row 0 replaced by row 1.
template <typename T>
__device__ __forceinline__ void copy_chunk_of_row(const Strided4<const void>& from,
                                                  const Strided4<void>& to, int keys, int heads,
                                                  int columns, int64_t i) {
  const int chunks = columns / chunk_size;
  const int column = static_cast<int>(i % chunks) * chunk_size;
  i /= chunks;
  const int head = static_cast<int>(i % heads), row = static_cast<int>(i / heads % keys),
            sample = static_cast<int>(i / heads / keys);
  *reinterpret_cast<uint4*>(written_row_of<T>(to, sample, head, row) + column) =
      *reinterpret_cast<const uint4*>(row_of<T>(from, sample, head, max(row, 1)) + column);
}

template <typename T>
__global__ void __launch_bounds__(threads)
    copy_without_initial_key(const CudaAttention call, const Strided4<void> key,
                             const Strided4<void> value) {
  const int64_t rows = int64_t{call.batch} * call.keys * call.key_heads;
  const int64_t keys = rows * (call.head_size / chunk_size),
                values = rows * (call.value_head_size / chunk_size);
  const int64_t step = int64_t{gridDim.x} * threads;
#pragma unroll 4
  for (int64_t i = int64_t{blockIdx.x} * threads + threadIdx.x; i < keys; i += step)
    copy_chunk_of_row<T>(call.key, key, call.keys, call.key_heads, call.head_size, i);
#pragma unroll 4
  for (int64_t i = int64_t{blockIdx.x} * threads + threadIdx.x; i < values; i += step)
    copy_chunk_of_row<T>(call.value, value, call.keys, call.key_heads, call.value_head_size, i);
}

int row_blocks_of(const CudaAttention& call, int block_rows) {
  return (call.queries + block_rows - 1) / block_rows;
}

PartialGradients partial_gradients(const CudaAttention& call, float* data) {
  return {data, row_blocks_of(call, max_block_rows), call.head_size, call.value_head_size};
}

// Calls launch with the number of lanes of a row.
template <typename Launch>
cudaError_t with_lanes(const CudaAttention& call, const Launch& launch) {
  const int size = std::max(call.head_size, call.value_head_size);
  if (size <= 8 * chunk_size) return launch(std::integral_constant<int, 8>());
  if (size <= 16 * chunk_size) return launch(std::integral_constant<int, 16>());
  return launch(std::integral_constant<int, 32>());
}

// The smallest blocks with which all blocks of `merge` run at once.
int merge_block_rows(const CudaAttention& call, const CudaDevice& device) {
  const int64_t rows = int64_t{call.batch} * call.heads * call.queries;
  const int blocks = blocks_per_multiprocessor * device.multiprocessors;
  const int64_t steps =
      (rows + int64_t{blocks} * min_block_rows - 1) / (int64_t{blocks} * min_block_rows);
  return static_cast<int>(
      std::clamp<int64_t>(steps * min_block_rows, min_block_rows, max_block_rows));
}

template <typename T>
cudaError_t launch_merge(const CudaAttention& call, const Strided4<const void>& partial,
                         const Strided4<const void>& partial_logsumexp, int first_row,
                         const CudaDevice& device, cudaStream_t stream) {
  const int block_rows = merge_block_rows(call, device);
  const int row_blocks = row_blocks_of(call, block_rows);
  return with_lanes(call, [&](auto lanes) {
    merge<T, decltype(lanes)::value><<<row_blocks * call.heads * call.batch, threads, 0, stream>>>(
        call, partial, partial_logsumexp, first_row, row_blocks, block_rows);
    return cudaGetLastError();
  });
}

template <typename T>
cudaError_t launch_backward(const CudaAttention& call, const CudaAttentionGradients& gradients,
                            const TorchKernelGradients& torch, bool dependent,
                            cudaStream_t stream) {
  const PartialGradients partial = partial_gradients(call, static_cast<float*>(gradients.scratch));
  const cudaError_t error = with_lanes(call, [&](auto lanes) {
    backward<T, decltype(lanes)::value>
        <<<partial.per_head * call.heads * call.batch, threads, 0, stream>>>(call, gradients, torch,
                                                                             partial);
    return cudaGetLastError();
  });
  if (error != cudaSuccess) return error;
  return launch_reduction<T>(call, gradients, partial, dependent, stream);
}

template <typename T>
cudaError_t launch_copy(const CudaAttention& call, const Strided4<void>& key,
                        const Strided4<void>& value, cudaStream_t stream) {
  constexpr int thread_chunks = 4, max_blocks = 4096;
  const int64_t chunks =
      int64_t{call.batch} * call.key_heads * call.keys * call.head_size / chunk_size;
  const int blocks =
      static_cast<int>(std::clamp<int64_t>(chunks / (threads * thread_chunks), 1, max_blocks));
  copy_without_initial_key<T><<<blocks, threads, 0, stream>>>(call, key, value);
  return cudaGetLastError();
}

}  // namespace
}  // namespace initial_token

cudaError_t initial_token_merge(const CudaAttention& call, const Strided4<const void>& partial,
                                const Strided4<const void>& partial_logsumexp, int32_t first_row,
                                const CudaDevice& device, cudaStream_t stream) {
  using namespace initial_token;
  return call.dtype == DType::float16
             ? launch_merge<__half>(call, partial, partial_logsumexp, first_row, device, stream)
             : launch_merge<__nv_bfloat16>(call, partial, partial_logsumexp, first_row, device,
                                           stream);
}

int64_t initial_token_backward_scratch(const CudaAttention& call) {
  return initial_token::partial_gradients(call, nullptr).bytes(call);
}

cudaError_t initial_token_backward(const CudaAttention& call,
                                   const CudaAttentionGradients& gradients,
                                   const TorchKernelGradients& torch, const CudaDevice& device,
                                   cudaStream_t stream) {
  using namespace initial_token;
  const bool dependent = device.supports_dependent_launch();
  return call.dtype == DType::float16
             ? launch_backward<__half>(call, gradients, torch, dependent, stream)
             : launch_backward<__nv_bfloat16>(call, gradients, torch, dependent, stream);
}

cudaError_t replace_initial_key(const CudaAttention& call, const Strided4<void>& key,
                                const Strided4<void>& value, cudaStream_t stream) {
  return call.dtype == DType::float16
             ? initial_token::launch_copy<__half>(call, key, value, stream)
             : initial_token::launch_copy<__nv_bfloat16>(call, key, value, stream);
}

}  // namespace zerotuning::attention
