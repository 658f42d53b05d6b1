// Attention of few queries to many keys: what it costs is one reading of K and V.
//
// A block takes a share of one key head's keys and a group of rows: the queries of all heads that
// share the key head, packed into the 16-row tiles of the tensor cores. Each of its warps streams
// tiles of 16 keys of its own through a ring in shared memory of its own, with a softmax and sums
// of its own, so that no barrier of the block stands in the stream. The block's warps are merged at
// its end, the shares of a key head's keys ("splits") by the last block of a key head's to arrive,
// which then finds all of them in scratch, or by a second kernel that is already waiting when the
// first one ends; all in one fixed order, so that results repeat bit by bit. The counters by which
// a block knows that it is the last are zeros before a call and after it: calls that may run at the
// same time need counters of their own, and a captured graph, which may be replayed anywhere, has
// none.
//
// Caches that are much larger than the level-2 cache are read by Hopper's bulk copy engine:
// decode_hopper_cuda.cu.
//
// The grid depends on the cache's length; the shares are cut on the device out of the keys that the
// sample's queries really see.
#include <algorithm>

#include "attention/cuda/decode.cuh"
#include "attention/cuda_decode.h"

namespace zerotuning::attention {
namespace {

using namespace decoding;

constexpr int most_warps = 4;
constexpr int most_splits = 128;
constexpr int counters_of_set = 2048;

__device__ uint32_t counter_sets[decode_counter_sets * counters_of_set];  // zeros

// A warp's tiles of K and V in shared memory.
template <int size>
struct Ring {
  // A copy of the warp takes this many lanes for a row, and so many rows.
  static constexpr int row_lanes = Tile<size>::chunks & -Tile<size>::chunks;
  static constexpr int copy_rows = 32 / row_lanes;
  // Two blocks of four warps fill Hopper's shared memory; one of the widest heads.
  static constexpr int stages = size <= 64 ? 6 : size <= 96 ? 4 : size <= 128 || size > 192 ? 3 : 2;
  static constexpr int bytes = stages * 2 * Tile<size>::bytes;
};

constexpr int row_tiles_of(int size, int rows) { return size <= 128 && rows > tile_rows ? 2 : 1; }

// A warp's tiles: number t has the keys from first + t * step on.
struct Share {
  int first, step, count;
};

// The block's tiles lie side by side, and its warps take turns, so that it reads one stream.
__device__ __forceinline__ Share share_of(const Arguments& a, const RangeSight& s, int split) {
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t tiles = s.begin < s.end ? (s.end - s.begin + tile_keys - 1) / tile_keys : 0;
  const int first = static_cast<int>(tiles * split / a.splits) + warp;
  const int last = static_cast<int>(tiles * (split + 1) / a.splits);
  return {s.begin + first * tile_keys, warps * tile_keys,
          first < last ? (last - first + warps - 1) / warps : 0};
}

// The part of K or V that a lane copies: rows lane / row_lanes + i * copy_rows of each tile.
struct Source {
  const uint16_t* base;  // of the head
  int64_t row_stride;
  int columns, end;  // what is beyond is zero, and not read
};

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
    const bool real_row = first_key + lane_row + row < source.end;
#pragma unroll
    for (int chunk = 0; chunk < Tile<size>::chunks; chunk += Shape::row_lanes) {
      const bool real = real_row && (lane_chunk + chunk) * 8 < source.columns;
      copy_chunk(to + row * Tile<size>::row_bytes + chunk * 16,
                 real ? from + row * source.row_stride + chunk * 8 : source.base, real, policy);
    }
  }
}

// Grid: splits * row_groups (those of the same keys side by side: they meet in the level-2 cache),
// key heads, samples.
template <typename T, int size, int row_tiles>
__global__ void __launch_bounds__(most_warps * 32) attend(const __grid_constant__ Arguments a) {
  using Shape = Ring<size>;
  constexpr int rows = row_tiles * tile_rows, stages = Shape::stages;
  static_assert(sizeof(WarpSums<size, rows>) <= Shape::bytes);
  extern __shared__ __align__(16) char memory[];
  start_dependent_kernel();
  const int key_head = blockIdx.y, batch = blockIdx.z;
  const int split = blockIdx.x / a.row_groups, first_row = blockIdx.x % a.row_groups * rows;
  const uint64_t policy = cache_policy(a.read_once);
  copy_query<size, rows>(a, batch, key_head, first_row, shared_address(memory), policy);
  commit_copies();

  const RangeSight sight = sight_of(a, batch);
  const Share share = share_of(a, sight, split);
  const Source key{a.key + batch * a.key_batch_stride + key_head * a.key_head_stride,
                   a.key_row_stride, a.head_size, sight.end};
  const Source value{a.value + batch * a.value_batch_stride + key_head * a.value_head_stride,
                     a.value_row_stride, a.value_head_size, sight.end};
  char* rings = memory + rows * Tile<size>::row_bytes;
  char* ring = rings + threadIdx.x / 32 * Shape::bytes;
  // A tile's keys and values are one group of copies; there is a group also where there is no tile.
  const auto copy = [&](int t) {
    if (t < share.count) {
      const uint32_t to = shared_address(ring) + t % stages * (2 * Tile<size>::bytes);
      copy_tile<size>(to, key, share.first + t * share.step, policy);
      copy_tile<size>(to + Tile<size>::bytes, value, share.first + t * share.step, policy);
    }
    commit_copies();
  };
#pragma unroll
  for (int t = 0; t < stages - 1; ++t) copy(t);
  const Rows<row_tiles> lane_rows = rows_of<row_tiles>(a, batch, key_head, first_row);
  Padding padding;
  wait_copies<stages - 1>();
  __syncthreads();
  const LaneAddresses lane = lane_addresses<size>();
  Queries<size, row_tiles> queries;
  queries.load(shared_address(memory) + lane.left);

  Sums<size, row_tiles> sums;
  sums.clear();
  for (int t = 0; t < share.count; ++t) {
    const int first = share.first + t * share.step;
    if (sight.key_mask && t % Padding::tiles == 0)
      padding.read(sight, first, share.step, share.count - t);
    const uint32_t hidden_keys = padding.hidden_keys(t);
    wait_copies<stages - 2>();
    // The tile is complete, and all lanes are through with the one before it, whose place the
    // next copy takes.
    __syncwarp();
    copy(t + stages - 1);
    const uint32_t keys = shared_address(ring) + t % stages * (2 * Tile<size>::bytes);
    const uint32_t values = keys + Tile<size>::bytes;
    Logits<row_tiles> logits[1];
    multiply_keys<T>(
        queries, [&](int k) { return keys + lane.right + k * 32; }, logits[0]);
    look<row_tiles>(a, sight, lane_rows, first, hidden_keys, logits[0]);
    weigh(logits, sums);
    add_values<T>(
        logits[0], [&](int n) { return values + lane.left + n * 32; }, sums);
  }
  wait_copies<0>();
  __syncwarp();
  store(sums, *reinterpret_cast<WarpSums<size, rows>*>(ring));
  __syncthreads();
  finish<T, size, rows>(a, split, first_row, blockDim.x / 32, rings, Shape::bytes);
}

// A block for each row: its threads take four columns each, and the splits by turns. Where it
// starts while the kernel before it runs, it first rehearses on some bytes of the query, so that
// its code is in the caches when the splits are there (1 x 1024 keys on an H100 in 11.8 us,
// not 13.1).
template <typename T>
__global__ void __launch_bounds__(merge_threads) merge_splits(const __grid_constant__ Arguments a) {
  __shared__ Part parts[merge_threads];
  const int columns = a.value_head_size / 4, slices = merge_threads / columns;
  const int slice = threadIdx.x / columns, column = threadIdx.x % columns * 4;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * a.splits;
#pragma unroll 1
  for (int turn = starts_early ? 0 : 1; turn < 2; ++turn) {
    const bool rehearsal = turn == 0;
    if (!rehearsal) wait_for_previous_kernel();
    Splits splits = splits_of_row(a, first, column);
    if (rehearsal) {
      splits.output = splits.logsumexp = reinterpret_cast<const float*>(a.query);
      splits.last_row = 0;
    }
    Part part = no_part();
    if (slice < slices) part = splits.merged(slice, slices);
    parts[threadIdx.x] = part;
    __syncthreads();
    if (slice == 0) {
      for (int i = 1; i < slices; ++i) merge(part, parts[i * columns + threadIdx.x]);
      if (!rehearsal) {
        const int query = blockIdx.x % a.queries, row_head = blockIdx.x / a.queries;
        write_result<T>(a, row_head / a.heads, row_head % a.heads, query, column, part);
      }
    }
    __syncthreads();
  }
}

// How a call is cut: a function of its sizes alone, so that scratch and launch agree.
struct Cut {
  int size, row_tiles, row_groups, splits;
};

// The number of keys that a sample's queries can attend to.
int reach_of(const CudaAttention& c) {
  return static_cast<int>(visible_keys(c.queries, c.keys, c.geometry.window));
}

// The fewest splits that fill whole rounds of blocks well, and leave each warp a tile at least.
int splits_of(const CudaAttention& c, int64_t sequences, int64_t slots) {
  const int most = std::clamp(reach_of(c) / (tile_keys * most_warps), 1, most_splits);
  int best = 1;
  double best_use = 0;
  for (int splits = 1; splits <= most && best_use < 0.95; ++splits) {
    const int64_t blocks = sequences * splits, rounds = (blocks + slots - 1) / slots;
    const double use = static_cast<double>(blocks) / static_cast<double>(rounds * slots);
    if (use > best_use) {
      best_use = use;
      best = splits;
    }
  }
  return best;
}

Cut cut_of(const CudaAttention& c, int multiprocessors) {
  const int largest = std::max(c.head_size, c.value_head_size);
  const int rows = c.heads / c.key_heads * c.queries;
  Cut cut;
  cut.size = largest <= 64    ? 64
             : largest <= 96  ? 96
             : largest <= 128 ? 128
             : largest <= 192 ? 192
                              : 256;
  cut.row_tiles = row_tiles_of(cut.size, rows);
  const int block_rows = cut.row_tiles * tile_rows;
  cut.row_groups = (rows + block_rows - 1) / block_rows;
  // One block a multiprocessor: fewer, longer streams are read faster than two a multiprocessor
  // (on an H100 16 x 1024 keys in 27 us against 30, 16 x 8192 in 184 against 193).
  cut.splits = splits_of(c, int64_t{c.batch} * c.key_heads * cut.row_groups,
                         int64_t{std::max(multiprocessors, 1)});
  return cut;
}

// Whether a block is through with the splits of its rows, four columns a thread, sooner than a
// kernel for them is launched.
bool merges_itself(const CudaAttention& c, const Cut& cut) {
  constexpr int most_steps = 64, threads = most_warps * 32;
  const int rows = std::min(cut.row_tiles * tile_rows, c.heads / c.key_heads * c.queries);
  const int columns = c.value_head_size / 4, turns = (rows * columns + threads - 1) / threads;
  return cut.splits > 1 && std::max(cut.splits, merge_threads / columns) * turns <= most_steps &&
         int64_t{c.batch} * c.key_heads * cut.row_groups <= counters_of_set;
}

int64_t split_rows(const CudaAttention& c, const Cut& cut) {
  return cut.splits > 1 ? int64_t{c.batch} * c.heads * c.queries * cut.splits : 0;
}

Arguments arguments_of(const CudaAttention& c, const Cut& cut, void* scratch, uint32_t* counters) {
  Arguments a{};
  a.query = static_cast<const uint16_t*>(c.query.data);
  a.query_batch_stride = c.query.batch_stride;
  a.query_head_stride = c.query.head_stride;
  a.query_row_stride = c.query.row_stride;
  a.key = static_cast<const uint16_t*>(c.key.data);
  a.key_batch_stride = c.key.batch_stride;
  a.key_head_stride = c.key.head_stride;
  a.key_row_stride = c.key.row_stride;
  a.value = static_cast<const uint16_t*>(c.value.data);
  a.value_batch_stride = c.value.batch_stride;
  a.value_head_stride = c.value.head_stride;
  a.value_row_stride = c.value.row_stride;
  a.geometry = c.geometry;
  a.log_scale = static_cast<const float*>(c.log_scale);
  a.log_scale_batch_stride = c.log_scale_batch_stride;
  a.log_scale_head_stride = c.log_scale_head_stride;
  a.output = static_cast<uint16_t*>(c.output.data);
  a.output_batch_stride = c.output.batch_stride;
  a.output_head_stride = c.output.head_stride;
  a.output_row_stride = c.output.row_stride;
  a.logsumexp = static_cast<float*>(c.logsumexp.data);
  a.logsumexp_batch_stride = c.logsumexp.batch_stride;
  a.logsumexp_head_stride = c.logsumexp.head_stride;
  a.logsumexp_row_stride = c.logsumexp.row_stride;
  a.split_output = static_cast<float*>(scratch);
  a.split_logsumexp = a.split_output + split_rows(c, cut) * c.value_head_size;
  a.arrivals = merges_itself(c, cut) ? counters : nullptr;
  a.heads = c.heads;
  a.group = c.heads / c.key_heads;
  a.queries = c.queries;
  a.keys = c.keys;
  a.head_size = c.head_size;
  a.value_head_size = c.value_head_size;
  a.rows = a.group * c.queries;
  a.row_groups = cut.row_groups;
  a.splits = cut.splits;
  a.scale_log2 = static_cast<float>(c.scale * 1.4426950408889634);
  return a;
}

template <typename T>
cudaError_t launch_merge(const CudaAttention& c, const Arguments& a, bool dependent,
                         cudaStream_t stream) {
  return launch_kernel(merge_splits<T>, static_cast<unsigned>(c.batch * c.heads * c.queries),
                       merge_threads, 0, dependent, stream, a);
}

template <typename T, int size, int row_tiles>
cudaError_t launch(const Arguments& a, const dim3& grid, const CudaDevice& device,
                   cudaStream_t stream) {
  constexpr int query_bytes = row_tiles * tile_rows * Tile<size>::row_bytes;
  constexpr int ring_bytes = Ring<size>::bytes;
  const int warps =
      std::min(most_warps, (device.max_shared_bytes_per_block - query_bytes) / ring_bytes);
  const int bytes = query_bytes + warps * ring_bytes;
  constexpr auto kernel = attend<T, size, row_tiles>;
  const cudaError_t error = allow_shared_bytes<kernel>(bytes, device);
  if (error != cudaSuccess) return error;
  kernel<<<grid, warps * 32, bytes, stream>>>(a);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_for_size(const Arguments& a, const Cut& cut, const dim3& grid,
                            const CudaDevice& device, cudaStream_t stream) {
  const auto launch_for = [&](auto size) {
    if constexpr (row_tiles_of(size, 2 * tile_rows) == 2) {
      if (cut.row_tiles == 2) return launch<T, size, 2>(a, grid, device, stream);
    }
    return launch<T, size, 1>(a, grid, device, stream);
  };
  switch (cut.size) {
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
cudaError_t decode_as(const CudaAttention& c, void* scratch, uint32_t* counters,
                      const CudaDevice& device, DecodeRoute route, cudaStream_t stream) {
  const Cut cut = cut_of(c, device.multiprocessors);
  Arguments a = arguments_of(c, cut, scratch, counters);
  a.read_once = !exceeds_level2(c.batch, c.key_heads, reach_of(c), c.head_size, c.value_head_size,
                                device.l2_bytes);
  const dim3 grid(cut.splits * cut.row_groups, c.key_heads, c.batch);
  const cudaError_t error = route == DecodeRoute::bulk
                                ? attend_in_bulk(c, a, cut.row_tiles, grid, device, stream)
                                : launch_for_size<T>(a, cut, grid, device, stream);
  if (error != cudaSuccess || cut.splits == 1 || a.arrivals) return error;
  return launch_merge<T>(c, a, device.supports_dependent_launch(), stream);
}

}  // namespace

int64_t decode_scratch(const CudaAttention& c, int32_t multiprocessors) {
  const Cut cut = cut_of(c, multiprocessors);
  return split_rows(c, cut) * (c.value_head_size + 1) * static_cast<int64_t>(sizeof(float));
}

cudaError_t decode_counters(int32_t set, uint32_t*& first) {
  void* address = nullptr;
  const cudaError_t error = cudaGetSymbolAddress(&address, counter_sets);
  first = static_cast<uint32_t*>(address) + int64_t{set} * counters_of_set;
  return error;
}

cudaError_t decode(const CudaAttention& c, void* scratch, uint32_t* counters,
                   const CudaDevice& device, cudaStream_t stream, DecodeRoute route) {
  return c.dtype == DType::float16
             ? decode_as<__half>(c, scratch, counters, device, route, stream)
             : decode_as<__nv_bfloat16>(c, scratch, counters, device, route, stream);
}

}  // namespace zerotuning::attention
