// Decode attention on Hopper for caches much larger than the level-2 cache.
//
// Bound: memory, as in decode/launch.cu. One thread of a fifth warp has the bulk copy engine fill a
// ring of units, and the four other warps compute, each on its share of every unit. A unit is one
// contiguous run of memory: all columns of some keys, or of their values. Units of K and V
// alternate, each with a stage and barriers of its own. So three stages hold runs of 32 KiB (at
// head size 128), and each is free again once half of a pair is read. Long runs are read
// faster: on an H100 16 x 8192 keys take 0.992 of the time of a ring of three pairs, 16 KiB of K
// and of V at once.
//
// decode/launch.cu computes all other calls, small caches included: in its kernel each warp starts
// its own copies, which begin sooner.
#include "attention/cuda/decode/merge.cuh"
#include "attention/cuda/hopper/tiles.cuh"
#include "attention/cuda_decode.h"

namespace zerotuning::attention {
namespace {

using namespace decoding;

constexpr int consumer_warps = 4;
constexpr int threads = (consumer_warps + 1) * 32;

struct BulkArguments {
  CUtensorMap key, value;
  Arguments call;
};

// Units of K and V in shared memory, each [key][64-column block][128 bytes], swizzled. Two blocks
// fit on a multiprocessor, so that one begins while another ends.
template <int size, int row_tiles>
struct Units {
  static constexpr int tiles = row_tiles == 1 ? 2 : 1;     // of a warp in a unit: registers' limit
  static constexpr int step = consumer_warps * tile_keys;  // from a warp's tile to its next tile
  static constexpr int keys = tiles * step;
  static constexpr int row_bytes = size * 2, bytes = keys * row_bytes;
  static constexpr int count = 96 * 1024 / bytes;
};

template <int size, int row_tiles>
struct SharedMemory {
  static constexpr int query_bytes = row_tiles * tile_rows * Tile<size>::row_bytes;
  static constexpr int alignment = 1024;  // of the swizzle
  static constexpr int bytes =
      alignment + Units<size, row_tiles>::count * (Units<size, row_tiles>::bytes + 16) +
      query_bytes;
};

// The tensor map of an array [batch, heads, rows, columns]; a box is all columns of `box_rows`
// rows.
cudaError_t make_row_map(CUtensorMap* map, DType dtype, const Strided4<const void>& array,
                         int batch, int heads, int rows, int columns, int box_rows) {
  const int blocks = columns / hopper::block_columns;
  const cuuint64_t sizes[5] = {hopper::block_columns, static_cast<cuuint64_t>(blocks),
                               static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(heads),
                               static_cast<cuuint64_t>(batch)};
  const cuuint64_t strides[4] = {
      hopper::block_columns * 2, hopper::map_stride(array.row_stride, rows),
      hopper::map_stride(array.head_stride, heads), hopper::map_stride(array.batch_stride, batch)};
  const cuuint32_t box[5] = {hopper::block_columns, static_cast<cuuint32_t>(blocks),
                             static_cast<cuuint32_t>(box_rows), 1, 1};
  return hopper::encode_tensor_map<5>(map, dtype, array.data, sizes, strides, box);
}

// A block's ring of units, and the pairs that go through the ring. A pair is a unit of keys,
// followed in the ring by the unit of their values.
template <int size, int row_tiles>
struct UnitRing {
  using Shape = Units<size, row_tiles>;
  char* memory;
  char* query_memory;
  uint64_t *full, *empty;
  int first_key, pairs;

  __device__ __forceinline__ UnitRing(const Arguments& args, const VisibleRange& visible, int split,
                                      char* unaligned) {
    constexpr int alignment = SharedMemory<size, row_tiles>::alignment;
    memory = unaligned + (-shared_address(unaligned) & (alignment - 1));
    query_memory = memory + Shape::count * Shape::bytes;
    full = reinterpret_cast<uint64_t*>(query_memory + SharedMemory<size, row_tiles>::query_bytes);
    empty = full + Shape::count;
    const int64_t all_pairs = visible.begin < visible.end
                                  ? (visible.end - visible.begin + Shape::keys - 1) / Shape::keys
                                  : 0;
    const int first_pair = static_cast<int>(all_pairs * split / args.splits);
    pairs = static_cast<int>(all_pairs * (split + 1) / args.splits) - first_pair;
    first_key = visible.begin + first_pair * Shape::keys;
  }

  __device__ __forceinline__ void init_barriers() const {
    for (int i = 0; i < Shape::count; ++i) {
      hopper::init_barrier(&full[i], 1);
      hopper::init_barrier(&empty[i], consumer_warps);
    }
    hopper::fence_barrier_init();
  }

  // Starts the copy of unit u: even units are keys, odd units values.
  __device__ __forceinline__ void copy(const BulkArguments& b, int u, int key_head,
                                       int batch) const {
    uint64_t* barrier = &full[u % Shape::count];
    hopper::expect_bytes(barrier, Shape::bytes);
    hopper::load_rows(memory + u % Shape::count * Shape::bytes, u % 2 ? &b.value : &b.key, barrier,
                      first_key + u / 2 * Shape::keys, key_head, batch);
  }
};

// Zeros the values of a warp's tile beyond the last visible key. These values may be NaN, and NaN
// times a weight of 0 is NaN.
template <int size>
__device__ __forceinline__ void clear_hidden_values(char* tile_memory, int visible_keys) {
  constexpr int chunks = Tile<size>::chunks;
  uint4* tile = reinterpret_cast<uint4*>(tile_memory);
  for (int j = max(visible_keys, 0) * chunks + static_cast<int>(threadIdx.x % 32);
       j < tile_keys * chunks; j += 32) {
    tile[j] = uint4{};
  }
  __syncwarp();
}

// A consumer warp: attends to its tiles of every pair of units.
template <typename T, int size, int row_tiles>
__device__ __forceinline__ void attend_to_pairs(const Arguments& args, const VisibleRange& visible,
                                                const UnitRing<size, row_tiles>& units,
                                                int first_row,
                                                Accumulators<size, row_tiles>& sums) {
  // Long: one software pipeline whose stages share registers.
  using Shape = Units<size, row_tiles>;
  constexpr int blocks = size / hopper::block_columns;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, matrix = lane / 8;
  const LaneRows<row_tiles> query_rows =
      lane_rows<row_tiles>(args, blockIdx.z, blockIdx.y, first_row);
  PaddingMask padding;
  Queries<size, row_tiles> queries;
  queries.load(shared_address(units.query_memory) + lane_addresses<size>().left);
  // Swizzle: chunk c of block b of row r lies at c ^ (r * blocks + b) % 8. So the address at which
  // a lane reads columns 16 k to 16 k + 15 is that of columns 0 to 15 with some bits inverted.
  const auto lane_address = [&](int row, int half) {
    return shared_address(units.memory) + (warp * tile_keys + row) * Shape::row_bytes +
           (half ^ (row * blocks % 8)) * 16;
  };
  const auto swizzled = [](uint32_t address, int k) {
    return address ^ (k / 4 * (128 + 16) + k % 4 * 32);
  };
  const uint32_t key_lane = lane_address(lane % 8 + matrix / 2 * 8, matrix % 2);
  const uint32_t value_lane = lane_address(lane % 8 + matrix % 2 * 8, matrix / 2);
  hopper::PipelineState<Shape::count> ring;
  const auto tile_offset = [&](int i) {
    return ring.stage() * Shape::bytes + i * Shape::step * Shape::row_bytes;
  };
  for (int pair = 0; pair < units.pairs; ++pair) {
    const int warp_first = units.first_key + pair * Shape::keys + warp * tile_keys;
    const int first_tile = pair * Shape::tiles;  // among the warp's tiles
    if (visible.key_mask && first_tile % PaddingMask::tiles == 0)
      padding.read(visible, warp_first, Shape::step, units.pairs * Shape::tiles - first_tile);
    hopper::wait(&units.full[ring.stage()], ring.parity());
    Logits<row_tiles> logits[Shape::tiles];
#pragma unroll
    for (int i = 0; i < Shape::tiles; ++i) {
      const uint32_t keys = key_lane + tile_offset(i);
      multiply_keys<T>(
          queries, [&](int k) { return swizzled(keys, k); }, logits[i]);
      apply_scale_and_mask<row_tiles>(args, visible, query_rows, warp_first + i * Shape::step,
                                      padding.padding_bits(first_tile + i), logits[i]);
    }
    hopper::arrive_warp(&units.empty[ring.stage()]);
    ++ring.count;
    softmax_step(logits, sums);
    hopper::wait(&units.full[ring.stage()], ring.parity());
#pragma unroll
    for (int i = 0; i < Shape::tiles; ++i) {
      const int first = warp_first + i * Shape::step;
      if (first + tile_keys > visible.end) {
        clear_hidden_values<size>(
            units.memory + tile_offset(i) + warp * tile_keys * Shape::row_bytes,
            visible.end - first);
      }
      const uint32_t values = value_lane + tile_offset(i);
      add_values<T>(
          logits[i], [&](int n) { return swizzled(values, n); }, sums);
    }
    hopper::arrive_warp(&units.empty[ring.stage()]);
    ++ring.count;
  }
}

template <typename T, int size, int row_tiles>
__global__ void __launch_bounds__(threads, 2) attend(const __grid_constant__ BulkArguments b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shape = Units<size, row_tiles>;
  constexpr int rows = row_tiles * tile_rows;
  constexpr int sums_pitch = Shape::bytes * Shape::count / consumer_warps;
  static_assert(sizeof(WarpSums<size, rows>) <= sums_pitch && sums_pitch % 16 == 0);
  const Arguments& args = b.call;
  extern __shared__ char unaligned[];
  const int warp = threadIdx.x / 32;
  const bool is_producer = threadIdx.x == consumer_warps * 32;
  allow_dependent_launch();

  const int key_head = blockIdx.y, batch = blockIdx.z;
  const int split = blockIdx.x / args.row_groups, first_row = blockIdx.x % args.row_groups * rows;
  const VisibleRange visible = visible_range(args, batch);
  const UnitRing<size, row_tiles> units(args, visible, split, unaligned);
  if (is_producer) {
    units.init_barriers();
    for (int u = 0; u < min(Shape::count, 2 * units.pairs); ++u) units.copy(b, u, key_head, batch);
  }
  copy_query<size, rows>(args, batch, key_head, first_row, shared_address(units.query_memory),
                         cache_policy(false));
  commit_copies();
  wait_copies<0>();
  __syncthreads();

  Accumulators<size, row_tiles> sums;
  sums.clear();
  if (warp == consumer_warps) {
    if (is_producer) {
      for (int u = Shape::count; u < 2 * units.pairs; ++u) {
        hopper::wait(&units.empty[u % Shape::count], (u / Shape::count - 1) & 1);
        units.copy(b, u, key_head, batch);
      }
    }
    __syncwarp();
  } else {
    attend_to_pairs<T>(args, visible, units, first_row, sums);
  }
  __syncthreads();  // All units are read: sums overwrite the units.
  if (warp < consumer_warps)
    store_sums(sums, *reinterpret_cast<WarpSums<size, rows>*>(units.memory + warp * sums_pitch));
  __syncthreads();
  merge_and_write<T, size, rows>(args, split, first_row, consumer_warps, units.memory, sums_pitch);
#endif
}

template <typename T, int size, int row_tiles>
cudaError_t launch(const CudaAttention& call, const Arguments& args, const dim3& grid,
                   const CudaDevice& device, cudaStream_t stream) {
  constexpr int unit_keys = Units<size, row_tiles>::keys;
  BulkArguments b{};
  cudaError_t error = make_row_map(&b.key, call.dtype, call.key, call.batch, call.key_heads,
                                   call.keys, size, unit_keys);
  if (error != cudaSuccess) return error;
  error = make_row_map(&b.value, call.dtype, call.value, call.batch, call.key_heads, call.keys,
                       size, unit_keys);
  if (error != cudaSuccess) return error;
  b.call = args;
  constexpr auto kernel = attend<T, size, row_tiles>;
  constexpr int bytes = SharedMemory<size, row_tiles>::bytes;
  error = allow_shared_bytes<kernel>(bytes, device);
  if (error != cudaSuccess) return error;
  kernel<<<grid, threads, bytes, stream>>>(b);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_for_size(const CudaAttention& call, const Arguments& args, int row_tiles,
                            const dim3& grid, const CudaDevice& device, cudaStream_t stream) {
  if (call.head_size == 64) {
    return row_tiles == 1 ? launch<T, 64, 1>(call, args, grid, device, stream)
                          : launch<T, 64, 2>(call, args, grid, device, stream);
  }
  return row_tiles == 1 ? launch<T, 128, 1>(call, args, grid, device, stream)
                        : launch<T, 128, 2>(call, args, grid, device, stream);
}

}  // namespace

cudaError_t decoding::launch_bulk_kernel(const CudaAttention& call, const Arguments& args,
                                         int row_tiles, const dim3& grid, const CudaDevice& device,
                                         cudaStream_t stream) {
  return call.dtype == DType::float16
             ? launch_for_size<__half>(call, args, row_tiles, grid, device, stream)
             : launch_for_size<__nv_bfloat16>(call, args, row_tiles, grid, device, stream);
}

}  // namespace zerotuning::attention
