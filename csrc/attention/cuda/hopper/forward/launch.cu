// Forward attention on Hopper: the kernel and its launch.
//
// Bound: the tensor cores, except for short sequences, which are bound by copying. Blocks are
// persistent. One thread of a producer warpgroup copies tiles of Q, K and V through the bulk copy
// engine into rings in shared memory; consumer warpgroups compute 64 query rows each. Two consumers
// of a block alternate: one consumer multiplies while the other computes its softmax. For short
// sequences two smaller blocks with one consumer share a multiprocessor, and each runs while the
// other waits for copies. Scaled keys cost one addition in the tile that holds these keys.
#include <algorithm>
#include <cmath>

#include "attention/cuda/hopper/forward/mathematics.cuh"
#include "attention/cuda_forward.h"

namespace zerotuning::attention {
namespace hopper::forward {
namespace {

template <typename T, typename C>
__global__ void __launch_bounds__(C::threads, C::blocks)
    attend(const __grid_constant__ Arguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char memory[];
  auto& s = *reinterpret_cast<Shared<C>*>((reinterpret_cast<uintptr_t>(memory) + 1023) &
                                          ~static_cast<uintptr_t>(1023));
  if (threadIdx.x == 0) {
    prefetch_map(&args.query);
    prefetch_map(&args.key);
    prefetch_map(&args.value);
    prefetch_map(&args.output);
    s.init_barriers();
  }
  __syncthreads();
  if (threadIdx.x < warpgroup) {
    release_registers<C::producer_registers>();
    if (threadIdx.x == 0) load_tiles(args, s);
  } else {
    acquire_registers<C::consumer_registers>();
    compute_tiles<T>(args, s);
  }
#endif
}

// The number of heads (whole groups) whose K and V fill half of the level-2 cache.
int section_heads_of(const CudaAttention& call) {
  constexpr int64_t cache_bytes = 24 << 20;
  const int64_t bytes = int64_t{call.keys} * (call.head_size + call.value_head_size) * 2;
  const int group = call.heads / call.key_heads;
  const int64_t groups = std::max<int64_t>(1, cache_bytes / bytes);
  return static_cast<int>(std::min<int64_t>(groups * group, int64_t{call.batch} * call.heads));
}

template <typename C>
cudaError_t make_tensor_maps(const CudaAttention& call, Arguments& args) {
  struct Tensor {
    CUtensorMap* map;
    Strided4<const void> array;
    int heads, rows, columns, box_rows;
  };
  const int value_size = call.value_head_size;
  const Tensor tensors[] = {
      {&args.query, call.query, call.heads, call.queries, call.head_size, C::tile_rows},
      {&args.key, call.key, call.key_heads, call.keys, call.head_size, C::tile_keys},
      {&args.value, call.value, call.key_heads, call.keys, value_size, C::tile_keys},
      {&args.output, call.output, call.heads, call.queries, value_size, warpgroup_rows},
      {&args.output_minus_initial_value, call.output_minus_initial_value, call.heads, call.queries,
       value_size, warpgroup_rows}};
  for (const Tensor& t : tensors) {
    if (!t.array.data && t.map == &args.output_minus_initial_value) continue;
    const cudaError_t error = make_tensor_map(t.map, call.dtype, t.array, call.batch, t.heads,
                                              t.rows, t.columns, t.box_rows);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <typename T, typename C>
cudaError_t launch(const CudaAttention& call, int multiprocessors, cudaStream_t stream) {
  Arguments args{};
  cudaError_t error = make_tensor_maps<C>(call, args);
  if (error != cudaSuccess) return error;
  if (call.output_minus_initial_value.data) {
    args.value_rows = call.value;
    args.value_columns = call.value_head_size;
  }
  args.geometry = call.geometry;
  args.log_scale = static_cast<const float*>(call.log_scale);
  args.log_scale_batch_stride = call.log_scale_batch_stride;
  args.log_scale_head_stride = call.log_scale_head_stride;
  args.logsumexp = call.logsumexp;
  args.heads = call.heads;
  args.group = call.heads / call.key_heads;
  args.queries = call.queries;
  args.keys = call.keys;
  args.row_tiles = (call.queries + C::tile_rows - 1) / C::tile_rows;
  args.tiles = args.row_tiles * call.batch * call.heads;
  args.section_heads = section_heads_of(call);
  args.scale = static_cast<float>(call.scale);
  const auto kernel = attend<T, C>;
  constexpr int bytes = sizeof(Shared<C>) + 1024;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<std::min(args.tiles, multiprocessors * C::blocks), C::threads, bytes, stream>>>(args);
  return cudaGetLastError();
}

// Up to this many keys two blocks with one consumer each share a multiprocessor: as fast at
// 1 x 1024, slower from 4 x 1024 on.
constexpr int max_keys_of_small_blocks = 512;

template <typename T>
cudaError_t launch_for_size(const CudaAttention& call, int multiprocessors, cudaStream_t stream) {
  const bool small = call.keys <= max_keys_of_small_blocks;
  if (call.head_size <= 64 && call.value_head_size <= 64) {
    return small ? launch<T, Configuration<64, 64, 64, 1>>(call, multiprocessors, stream)
                 : launch<T, Configuration<64, 64, 128>>(call, multiprocessors, stream);
  }
  if (call.head_size <= 128 && call.value_head_size <= 128) {
    return small ? launch<T, Configuration<128, 128, 64, 1>>(call, multiprocessors, stream)
                 : launch<T, Configuration<128, 128, 128>>(call, multiprocessors, stream);
  }
  if (call.head_size <= 192 && call.value_head_size <= 128)
    return launch<T, Configuration<192, 128, 64>>(call, multiprocessors, stream);
  return launch<T, Configuration<256, 256, 64>>(call, multiprocessors, stream);
}

}  // namespace
}  // namespace hopper::forward

cudaError_t attention_hopper(const CudaAttention& call, int32_t multiprocessors,
                             cudaStream_t stream) {
  return call.dtype == DType::float16
             ? hopper::forward::launch_for_size<__half>(call, multiprocessors, stream)
             : hopper::forward::launch_for_size<__nv_bfloat16>(call, multiprocessors, stream);
}

}  // namespace zerotuning::attention
