// Backward attention on Hopper: its kernels and their launches.
//
// Three kernels: compute_statistics (logsumexp and Δ = do·o of each query row), differentiate (all
// gradients but two) and reduce_partial_gradients (sums over query rows for the first scaled key
// and log_scale). differentiate has two kinds of work items:
//   128 keys of a key head, past which the queries of its heads are streamed: dK, dV
//   128 queries of a head, past which the keys are streamed: dQ
// So P and dS never leave the registers, no gradient is added by atomics, and the heads of a group
// are summed in registers. The price is that P and dS are computed twice.
//
// Bound: the tensor cores, with 7 products of 64 x 64 x head size per pair of tiles (4 for an item
// of keys, 3 for an item of queries) where a kernel with atomics needs 5. Two threads of a producer
// warpgroup load tiles through the bulk copy engine, a third stores results, and two consumer
// warpgroups compute.
#include <algorithm>
#include <cmath>

#include "attention/cuda/hopper/backward/mathematics.cuh"
#include "attention/cuda/row_chunks.cuh"
#include "attention/cuda_backward.h"

namespace zerotuning::attention {
namespace hopper::backward {
namespace {

constexpr int statistics_threads = 256;

template <typename T, int size>
__global__ void __launch_bounds__(threads, 1)
    differentiate(const __grid_constant__ Arguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  // Aligned by the declaration: after alignment by arithmetic the compiler could not infer that the
  // address is in shared memory.
  extern __shared__ __align__(1024) char memory[];
  auto& s = *reinterpret_cast<Shared<size>*>(memory);
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&args.query, &args.key, &args.value, &args.grad_output,
                                   &args.grad_query, &args.grad_key, &args.grad_value}) {
      prefetch_map(map);
    }
    s.init_barriers();
  }
  allow_dependent_launch();
  wait_for_previous_kernel();
  __syncthreads();
  if (threadIdx.x < warpgroup) {
    release_registers<24>();
    if (threadIdx.x == 0) load_stationary(args, s);
    if (threadIdx.x == 32) load_streamed(args, s);
    if (threadIdx.x == 64) store_gradients(args, s);
  } else {
    acquire_registers<240>();
    compute_items<T>(args, s);
  }
#endif
}

// A block computes the statistics of 64 query rows of a head, with `lanes` neighbouring lanes for a
// row. The kernel also resets the counter of claimed items.
template <typename T, int lanes>
__global__ void __launch_bounds__(statistics_threads)
    compute_statistics(const CudaAttention call, const CudaAttentionGradients gradients,
                       int row_tiles, RowStatistics* statistics, uint32_t* claimed_items) {
  constexpr int row_step = statistics_threads / lanes, unrolled = tile_rows / row_step;
  const int head = blockIdx.x % call.heads, tile = blockIdx.x / call.heads % row_tiles;
  const int sample = blockIdx.x / call.heads / row_tiles, lane = threadIdx.x % lanes;
  allow_dependent_launch();
  if (blockIdx.x == 0 && threadIdx.x == 0) *claimed_items = 0;
  RowStatistics& result =
      statistics[(static_cast<int64_t>(sample) * call.heads + head) * row_tiles + tile];
  uint4 output[unrolled], grad_output[unrolled];
  float logsumexp[unrolled];
#pragma unroll
  for (int u = 0; u < unrolled; ++u) {
    const int row = tile * tile_rows + threadIdx.x / lanes + u * row_step;
    output[u] = grad_output[u] = uint4{0, 0, 0, 0};
    logsumexp[u] = -INFINITY;
    if (row >= call.queries) continue;
    output[u] = read_chunk<T>(gradients.output, sample, head, row, lane, call.value_head_size);
    grad_output[u] =
        read_chunk<T>(gradients.grad_output, sample, head, row, lane, call.value_head_size);
    logsumexp[u] = *device::row_of<float>(gradients.logsumexp, sample, head, row);
  }
#pragma unroll
  for (int u = 0; u < unrolled; ++u) {
    const int row = threadIdx.x / lanes + u * row_step;
    const float delta =
        lane_sum<lanes>(dot(unpack_chunk<T>(output[u]), unpack_chunk<T>(grad_output[u])));
    if (lane > 0) continue;
    result.logsumexp[row] = logsumexp[u] == -INFINITY ? INFINITY : logsumexp[u] * log2_e;
    result.delta[row] = delta;
  }
}

int item_tiles(int rows) { return (rows + item_rows - 1) / item_rows; }

int64_t sequences_of(const CudaAttention& call) { return int64_t{call.batch} * call.heads; }

// The parts of the scratch memory.
struct Scratch {
  RowStatistics* statistics;
  PartialGradients partial;
  uint32_t* claimed_items;
  int64_t bytes;

  Scratch(const CudaAttention& call, void* memory) {
    const int row_tiles = item_tiles(call.queries) * consumers;
    const int64_t statistics_bytes =
        sequences_of(call) * row_tiles * static_cast<int64_t>(sizeof(RowStatistics));
    char* start = static_cast<char*>(memory);
    statistics = reinterpret_cast<RowStatistics*>(start);
    partial = {reinterpret_cast<float*>(start + statistics_bytes), row_tiles, call.head_size, 0};
    claimed_items = reinterpret_cast<uint32_t*>(start + statistics_bytes + partial.bytes(call));
    bytes = statistics_bytes + partial.bytes(call) + static_cast<int64_t>(sizeof(uint32_t));
  }
};

// The number of sequences (a multiple of `multiple`) for which `rows` rows each of two arrays fill
// half of the level-2 cache.
int section_of(const CudaAttention& call, int64_t rows, int64_t sequences, int multiple) {
  constexpr int64_t cache_bytes = 24 << 20;
  const int64_t bytes = rows * (call.head_size + call.value_head_size) * 2;
  const int64_t fitting = std::max<int64_t>(1, cache_bytes / bytes) * multiple;
  return static_cast<int>(std::min(fitting, sequences));
}

cudaError_t make_tensor_maps(const CudaAttention& call, const CudaAttentionGradients& gradients,
                             Arguments& args) {
  struct Tensor {
    CUtensorMap* map;
    Strided4<const void> array;
    int heads, rows, columns;
  };
  const int size = call.head_size, value_size = call.value_head_size;
  const Tensor tensors[] = {
      {&args.query, call.query, call.heads, call.queries, size},
      {&args.key, call.key, call.key_heads, call.keys, size},
      {&args.value, call.value, call.key_heads, call.keys, value_size},
      {&args.grad_output, gradients.grad_output, call.heads, call.queries, value_size},
      {&args.grad_query, gradients.grad_query, call.heads, call.queries, size},
      {&args.grad_key, gradients.grad_key, call.key_heads, call.keys, size},
      {&args.grad_value, gradients.grad_value, call.key_heads, call.keys, value_size}};
  for (const Tensor& t : tensors) {
    const cudaError_t error = make_tensor_map(t.map, call.dtype, t.array, call.batch, t.heads,
                                              t.rows, t.columns, tile_rows);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

void set_arguments(const CudaAttention& call, const CudaAttentionGradients& gradients,
                   Arguments& args) {
  const Scratch scratch(call, gradients.scratch);
  args.geometry = call.geometry;
  args.log_scale = static_cast<const float*>(call.log_scale);
  args.log_scale_batch_stride = call.log_scale_batch_stride;
  args.log_scale_head_stride = call.log_scale_head_stride;
  args.key_rows = call.key;
  args.statistics = scratch.statistics;
  args.partial = scratch.partial;
  args.claimed_items = scratch.claimed_items;
  args.batch = call.batch;
  args.heads = call.heads;
  args.key_heads = call.key_heads;
  args.group = call.heads / call.key_heads;
  args.queries = call.queries;
  args.keys = call.keys;
  args.scale = static_cast<float>(call.scale);
  args.scale_log2 = args.scale * log2_e;
  const int64_t key_sequences = int64_t{call.batch} * call.key_heads;
  args.key_order = {static_cast<int>(key_sequences), item_tiles(call.keys),
                    section_of(call, int64_t{call.queries} * args.group, key_sequences, 1)};
  args.query_order = {static_cast<int>(sequences_of(call)), item_tiles(call.queries),
                      section_of(call, call.keys, sequences_of(call), args.group)};
}

template <typename T>
cudaError_t launch_statistics(const CudaAttention& call, const CudaAttentionGradients& gradients,
                              cudaStream_t stream) {
  const int row_tiles = item_tiles(call.queries) * consumers;
  const unsigned blocks = static_cast<unsigned>(sequences_of(call) * row_tiles);
  const Scratch scratch(call, gradients.scratch);
  const auto kernel =
      call.value_head_size <= 8 * chunk_size ? compute_statistics<T, 8> : compute_statistics<T, 16>;
  kernel<<<blocks, statistics_threads, 0, stream>>>(call, gradients, row_tiles, scratch.statistics,
                                                    scratch.claimed_items);
  return cudaGetLastError();
}

template <typename T, int size>
cudaError_t launch_differentiate(const CudaAttention& call, const CudaAttentionGradients& gradients,
                                 int multiprocessors, cudaStream_t stream) {
  Arguments args{};
  cudaError_t error = make_tensor_maps(call, gradients, args);
  if (error != cudaSuccess) return error;
  set_arguments(call, gradients, args);
  const auto kernel = differentiate<T, size>;
  constexpr int bytes = sizeof(Shared<size>), max_bytes = 227 * 1024;
  static_assert(bytes <= max_bytes);
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const int all_items = args.key_order.sequences * args.key_order.tiles +
                        args.query_order.sequences * args.query_order.tiles;
  return launch_kernel(kernel, std::min(all_items, multiprocessors), threads, bytes, true, stream,
                       args);
}

template <typename T>
cudaError_t launch(const CudaAttention& call, const CudaAttentionGradients& gradients,
                   int multiprocessors, cudaStream_t stream) {
  cudaError_t error = launch_statistics<T>(call, gradients, stream);
  if (error != cudaSuccess) return error;
  error = std::max(call.head_size, call.value_head_size) <= 64
              ? launch_differentiate<T, 64>(call, gradients, multiprocessors, stream)
              : launch_differentiate<T, 128>(call, gradients, multiprocessors, stream);
  if (error != cudaSuccess) return error;
  return launch_reduction<T>(call, gradients, Scratch(call, gradients.scratch).partial, true,
                             stream);
}

}  // namespace
}  // namespace hopper::backward

int64_t attention_backward_hopper_scratch(const CudaAttention& call) {
  return hopper::backward::Scratch(call, nullptr).bytes;
}

cudaError_t attention_backward_hopper(const CudaAttention& call,
                                      const CudaAttentionGradients& gradients,
                                      int32_t multiprocessors, cudaStream_t stream) {
  return call.dtype == DType::float16
             ? hopper::backward::launch<__half>(call, gradients, multiprocessors, stream)
             : hopper::backward::launch<__nv_bfloat16>(call, gradients, multiprocessors, stream);
}

}  // namespace zerotuning::attention
