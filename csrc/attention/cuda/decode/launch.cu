// Decode attention: few queries against many keys. The kernels and their launches.
//
// Bound: memory, one read of K and V. A block reads a split of one key head's keys for a group of
// rows: the queries of all heads that share the key head, packed into the 16-row tiles of the
// tensor cores. Each warp streams tiles of 16 keys through a ring in shared memory of its own, with
// a softmax and sums of its own, so that no barrier of the block interrupts the stream. At the end
// the block merges its warps. The splits of a key head are merged by the key head's last block, or
// by a second kernel, which is already waiting when the first kernel ends.
//
// Blocks count themselves with counters that are zero before and after a call. Calls that may run
// at the same time need different counters. A captured graph uses no counters, since it may be
// replayed on any stream.
//
// The grid depends on the length of the cache. The device divides the splits among the keys that
// are visible to the sample's queries. hopper/decode.cu reads caches much larger than level 2.
#include <algorithm>
#include <type_traits>

#include "attention/cuda/decode/merge.cuh"
#include "attention/cuda/decode/plan.cuh"
#include "attention/cuda_decode.h"

namespace zerotuning::attention {
namespace {

using namespace decoding;

__device__ uint32_t counter_sets[decode_counter_sets * counters_per_set];  // zeros

// A warp's ring of tiles of K and V in shared memory.
template <int size>
struct Ring {
  // The lanes that copy a row together, and the rows that a warp copies at once.
  static constexpr int row_lanes = Tile<size>::chunks & -Tile<size>::chunks;
  static constexpr int copy_rows = 32 / row_lanes;
  // Two blocks of four warps fill Hopper's shared memory; with the largest heads one block does.
  static constexpr int stages = size <= 64 ? 6 : size <= 96 ? 4 : size <= 128 || size > 192 ? 3 : 2;
  static constexpr int bytes = stages * 2 * Tile<size>::bytes;
};

// A warp's tiles: tile t begins at key first + t * step.
struct WarpTiles {
  int first, step, count;
};

// A block's tiles are contiguous, and its warps process them in turn: the block reads one stream.
__device__ __forceinline__ WarpTiles warp_tiles(const Arguments& args, const VisibleRange& v,
                                                int split) {
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t tiles = v.begin < v.end ? (v.end - v.begin + tile_keys - 1) / tile_keys : 0;
  const int first = static_cast<int>(tiles * split / args.splits) + warp;
  const int last = static_cast<int>(tiles * (split + 1) / args.splits);
  return {v.begin + first * tile_keys, warps * tile_keys,
          first < last ? (last - first + warps - 1) / warps : 0};
}

// One head's K or V in global memory.
struct Source {
  const uint16_t* base;
  int64_t row_stride;
  int columns, end;  // columns and keys beyond these are not read and become zeros
};

// Copies 16 keys; a lane copies rows lane / row_lanes + i * copy_rows.
template <int size>
__device__ __forceinline__ void copy_tile(uint32_t to, const Source& source, int first_key,
                                          uint64_t policy) {
  using Shape = Ring<size>;
  const int lane = threadIdx.x % 32, lane_row = lane / Shape::row_lanes;
  const int lane_chunk = lane % Shape::row_lanes;
  const uint16_t* from = source.base + (first_key + lane_row) * source.row_stride + lane_chunk * 8;
  to += lane_row * Tile<size>::row_bytes + lane_chunk * 16;
#pragma unroll
  for (int row = 0; row < tile_keys; row += Shape::copy_rows) {
    const bool row_exists = first_key + lane_row + row < source.end;
#pragma unroll
    for (int chunk = 0; chunk < Tile<size>::chunks; chunk += Shape::row_lanes) {
      const bool exists = row_exists && (lane_chunk + chunk) * 8 < source.columns;
      copy_chunk(to + row * Tile<size>::row_bytes + chunk * 16,
                 exists ? from + row * source.row_stride + chunk * 8 : source.base, exists, policy);
    }
  }
}

// Grid: splits * row_groups, key heads, samples. The row groups of a split are side by side: they
// read the same keys, which are then in the level-2 cache.
template <typename T, int size, int row_tiles>
__global__ void __launch_bounds__(max_warps * 32) attend(const __grid_constant__ Arguments args) {
  // Long: one software pipeline whose stages share registers.
  using Shape = Ring<size>;
  constexpr int rows = row_tiles * tile_rows, stages = Shape::stages;
  static_assert(sizeof(WarpSums<size, rows>) <= Shape::bytes);
  extern __shared__ __align__(16) char memory[];
  allow_dependent_launch();
  const int key_head = blockIdx.y, batch = blockIdx.z;
  const int split = blockIdx.x / args.row_groups, first_row = blockIdx.x % args.row_groups * rows;
  const uint64_t policy = cache_policy(args.evict_first);
  copy_query<size, rows>(args, batch, key_head, first_row, shared_address(memory), policy);
  commit_copies();

  const VisibleRange visible = visible_range(args, batch);
  const WarpTiles tiles = warp_tiles(args, visible, split);
  const Source key{row_of<uint16_t>(args.key, batch, key_head, 0), args.key.row_stride,
                   args.head_size, visible.end};
  const Source value{row_of<uint16_t>(args.value, batch, key_head, 0), args.value.row_stride,
                     args.value_head_size, visible.end};
  char* rings = memory + rows * Tile<size>::row_bytes;
  char* ring = rings + threadIdx.x / 32 * Shape::bytes;
  // A tile's keys and values are one group of copies; a group is committed even if no tile is
  // left.
  const auto copy = [&](int t) {
    if (t < tiles.count) {
      const uint32_t to = shared_address(ring) + t % stages * (2 * Tile<size>::bytes);
      copy_tile<size>(to, key, tiles.first + t * tiles.step, policy);
      copy_tile<size>(to + Tile<size>::bytes, value, tiles.first + t * tiles.step, policy);
    }
    commit_copies();
  };
#pragma unroll
  for (int t = 0; t < stages - 1; ++t) copy(t);
  const LaneRows<row_tiles> query_rows = lane_rows<row_tiles>(args, batch, key_head, first_row);
  PaddingMask padding;
  wait_copies<stages - 1>();
  __syncthreads();
  const LaneAddresses lane = lane_addresses<size>();
  Queries<size, row_tiles> queries;
  queries.load(shared_address(memory) + lane.left);

  Accumulators<size, row_tiles> sums;
  sums.clear();
  for (int t = 0; t < tiles.count; ++t) {
    const int first = tiles.first + t * tiles.step;
    if (visible.key_mask && t % PaddingMask::tiles == 0)
      padding.read(visible, first, tiles.step, tiles.count - t);
    const uint32_t padding_bits = padding.padding_bits(t);
    wait_copies<stages - 2>();
    // The tile is complete, and all lanes have read the previous tile, whose stage the next copy
    // fills.
    __syncwarp();
    copy(t + stages - 1);
    const uint32_t keys = shared_address(ring) + t % stages * (2 * Tile<size>::bytes);
    const uint32_t values = keys + Tile<size>::bytes;
    Logits<row_tiles> logits[1];
    multiply_keys<T>(
        queries, [&](int k) { return keys + lane.right + k * 32; }, logits[0]);
    apply_scale_and_mask<row_tiles>(args, visible, query_rows, first, padding_bits, logits[0]);
    softmax_step(logits, sums);
    add_values<T>(
        logits[0], [&](int n) { return values + lane.left + n * 32; }, sums);
  }
  wait_copies<0>();
  __syncwarp();
  store_sums(sums, *reinterpret_cast<WarpSums<size, rows>*>(ring));
  __syncthreads();
  merge_and_write<T, size, rows>(args, split, first_row, blockDim.x / 32, rings, Shape::bytes);
}

// Merges the splits of a row in a block: a thread merges four columns of every slices-th split.
// With dependent launch this kernel starts while `attend` runs. Then it executes a rehearsal of the
// merge on some bytes of the query, so that its code is in the caches when the splits are complete
// (1 x 1024 keys on an H100 in 11.8 us, not 13.1).
template <typename T>
__global__ void __launch_bounds__(merge_threads)
    merge_splits(const __grid_constant__ Arguments args) {
  __shared__ PartialRow partial_rows[merge_threads];
  const int columns = args.value_head_size / 4, slices = merge_threads / columns;
  const int slice = threadIdx.x / columns, column = threadIdx.x % columns * 4;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * args.splits;
#pragma unroll 1
  for (int turn = has_dependent_launch ? 0 : 1; turn < 2; ++turn) {
    const bool is_rehearsal = turn == 0;
    if (!is_rehearsal) wait_for_previous_kernel();
    RowSplits splits = splits_of_row(args, first, column);
    if (is_rehearsal) {
      splits.output = splits.logsumexp = static_cast<const float*>(args.query.data);
      splits.last_row = 0;
    }
    PartialRow result = empty_row();
    if (slice < slices) result = splits.merged(slice, slices);
    partial_rows[threadIdx.x] = result;
    __syncthreads();
    if (slice == 0) {
      for (int i = 1; i < slices; ++i) merge(result, partial_rows[i * columns + threadIdx.x]);
      if (!is_rehearsal) {
        const int query = blockIdx.x % args.queries, row_head = blockIdx.x / args.queries;
        write_result<T>(args, row_head / args.heads, row_head % args.heads, query, column, result);
      }
    }
    __syncthreads();
  }
}

Arguments arguments_of(const CudaAttention& call, const Plan& plan, void* scratch,
                       uint32_t* counters) {
  Arguments args{};
  args.query = call.query;
  args.key = call.key;
  args.value = call.value;
  args.geometry = call.geometry;
  args.log_scale = static_cast<const float*>(call.log_scale);
  args.log_scale_batch_stride = call.log_scale_batch_stride;
  args.log_scale_head_stride = call.log_scale_head_stride;
  args.output = call.output;
  args.logsumexp = call.logsumexp;
  args.split_output = static_cast<float*>(scratch);
  args.split_logsumexp = args.split_output + split_rows(call, plan) * call.value_head_size;
  args.arrivals = last_block_merges(call, plan) ? counters : nullptr;
  args.heads = call.heads;
  args.group = call.heads / call.key_heads;
  args.queries = call.queries;
  args.keys = call.keys;
  args.head_size = call.head_size;
  args.value_head_size = call.value_head_size;
  args.rows = args.group * call.queries;
  args.row_groups = plan.row_groups;
  args.splits = plan.splits;
  args.scale_log2 = static_cast<float>(call.scale * 1.4426950408889634);
  return args;
}

template <typename T, int size, int row_tiles>
cudaError_t launch(const Arguments& args, const dim3& grid, const CudaDevice& device,
                   cudaStream_t stream) {
  constexpr int query_bytes = row_tiles * tile_rows * Tile<size>::row_bytes;
  constexpr int ring_bytes = Ring<size>::bytes;
  const int warps =
      std::min(max_warps, (device.max_shared_bytes_per_block - query_bytes) / ring_bytes);
  const int bytes = query_bytes + warps * ring_bytes;
  constexpr auto kernel = attend<T, size, row_tiles>;
  const cudaError_t error = allow_shared_bytes<kernel>(bytes, device);
  if (error != cudaSuccess) return error;
  kernel<<<grid, warps * 32, bytes, stream>>>(args);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_for_size(const Arguments& args, const Plan& plan, const dim3& grid,
                            const CudaDevice& device, cudaStream_t stream) {
  const auto launch_for = [&](auto size) {
    if constexpr (row_tiles_of(size, 2 * tile_rows) == 2) {
      if (plan.row_tiles == 2) return launch<T, size, 2>(args, grid, device, stream);
    }
    return launch<T, size, 1>(args, grid, device, stream);
  };
  switch (plan.size) {
    case 64:
      return launch_for(std::integral_constant<int, 64>());
    case 96:
      return launch_for(std::integral_constant<int, 96>());
    case 128:
      return launch_for(std::integral_constant<int, 128>());
    case 192:
      return launch_for(std::integral_constant<int, 192>());
    default:
      return launch_for(std::integral_constant<int, 256>());
  }
}

template <typename T>
cudaError_t launch_decode(const CudaAttention& call, void* scratch, uint32_t* counters,
                          const CudaDevice& device, DecodeRoute route, cudaStream_t stream) {
  const Plan plan = plan_of(call, device.multiprocessors);
  Arguments args = arguments_of(call, plan, scratch, counters);
  args.evict_first = !exceeds_level2(call.batch, call.key_heads, keys_in_window(call),
                                     call.head_size, call.value_head_size, device.l2_bytes);
  const dim3 grid(plan.splits * plan.row_groups, call.key_heads, call.batch);
  const cudaError_t error =
      route == DecodeRoute::bulk
          ? launch_bulk_kernel(call, args, plan.row_tiles, grid, device, stream)
          : launch_for_size<T>(args, plan, grid, device, stream);
  if (error != cudaSuccess || plan.splits == 1 || args.arrivals) return error;
  const auto rows = static_cast<unsigned>(call.batch * call.heads * call.queries);
  return launch_kernel(merge_splits<T>, rows, merge_threads, 0, device.supports_dependent_launch(),
                       stream, args);
}

}  // namespace

int64_t decode_scratch(const CudaAttention& call, int32_t multiprocessors) {
  const Plan plan = plan_of(call, multiprocessors);
  return split_rows(call, plan) * (call.value_head_size + 1) * static_cast<int64_t>(sizeof(float));
}

cudaError_t decode_counters(int32_t set, uint32_t*& first) {
  void* address = nullptr;
  const cudaError_t error = cudaGetSymbolAddress(&address, counter_sets);
  first = static_cast<uint32_t*>(address) + int64_t{set} * counters_per_set;
  return error;
}

cudaError_t decode(const CudaAttention& call, void* scratch, uint32_t* counters,
                   const CudaDevice& device, cudaStream_t stream, DecodeRoute route) {
  return call.dtype == DType::float16
             ? launch_decode<__half>(call, scratch, counters, device, route, stream)
             : launch_decode<__nv_bfloat16>(call, scratch, counters, device, route, stream);
}

}  // namespace zerotuning::attention
