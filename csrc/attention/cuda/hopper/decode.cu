// Decode attention of caches that are much larger than the level-2 cache, on Hopper: one warp has
// the bulk copy engine fill a ring of units for the four others, which share each unit. A unit is
// one run of memory: all columns of some keys, or of their values. Units of K and of V come by
// turns, each with a place and barriers of its own, so that three places hold runs of 32 KiB (at
// head size 128) and each is free again once its half of a pair is read. Memory likes long runs: on
// an H100 16 x 8192 keys take 0.992 of the time of a ring of three pairs, 16 KiB of K and of V at
// once.
// decode_cuda.cu does the rest, small caches included: there the copies that each warp makes for
// itself start sooner.
#include "attention/cuda/decode.cuh"
#include "attention/cuda/hopper/tiles.cuh"
#include "attention/cuda_decode.h"

namespace zerotuning::attention {
namespace {

using namespace decoding;

constexpr int readers = 4;  // warps
constexpr int threads = (readers + 1) * 32;

struct BulkArguments {
  CUtensorMap key, value;
  Arguments rest;
};

// Units of K and V in shared memory, each [key][64-column block][128 bytes], swizzled. Two blocks
// fit a multiprocessor, so that one begins while the one before it ends.
template <int size, int row_tiles>
struct Units {
  static constexpr int tiles = row_tiles == 1 ? 2 : 1;  // of a warp: as many as registers hold
  static constexpr int step = readers * tile_keys;      // from one of them to the next
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

// [batch, heads, rows, columns] in boxes of all columns of `box_rows` rows.
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
  return hopper::encode_map<5>(map, dtype, array.data, sizes, strides, box);
}

template <typename T, int size, int row_tiles>
__global__ void __launch_bounds__(threads, 2) attend(const __grid_constant__ BulkArguments b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shape = Units<size, row_tiles>;
  constexpr int rows = row_tiles * tile_rows, blocks = size / hopper::block_columns;
  constexpr int sums_pitch = Shape::bytes * Shape::count / readers;
  static_assert(sizeof(WarpSums<size, rows>) <= sums_pitch && sums_pitch % 16 == 0);
  const Arguments& a = b.rest;
  extern __shared__ char unaligned[];
  char* memory =
      unaligned + (-shared_address(unaligned) & (SharedMemory<size, row_tiles>::alignment - 1));
  char* query_memory = memory + Shape::count * Shape::bytes;
  uint64_t* full =
      reinterpret_cast<uint64_t*>(query_memory + SharedMemory<size, row_tiles>::query_bytes);
  uint64_t* empty = full + Shape::count;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool copies = threadIdx.x == readers * 32;
  start_dependent_kernel();

  const int key_head = blockIdx.y, batch = blockIdx.z;
  const int split = blockIdx.x / a.row_groups, first_row = blockIdx.x % a.row_groups * rows;
  const RangeSight sight = sight_of(a, batch);
  // A pair is a unit of keys and the one of their values, next to it in the ring.
  const int64_t all_pairs =
      sight.begin < sight.end ? (sight.end - sight.begin + Shape::keys - 1) / Shape::keys : 0;
  const int first_pair = static_cast<int>(all_pairs * split / a.splits);
  const int pairs = static_cast<int>(all_pairs * (split + 1) / a.splits) - first_pair;
  const int first_key = sight.begin + first_pair * Shape::keys;
  const auto copy = [&](int u) {
    uint64_t* barrier = &full[u % Shape::count];
    hopper::expect_bytes(barrier, Shape::bytes);
    hopper::load_rows(memory + u % Shape::count * Shape::bytes, u % 2 ? &b.value : &b.key, barrier,
                      first_key + u / 2 * Shape::keys, key_head, batch);
  };
  if (copies) {
    for (int i = 0; i < Shape::count; ++i) {
      hopper::init(&full[i], 1);
      hopper::init(&empty[i], readers);
    }
    hopper::publish_barriers();
    for (int u = 0; u < min(Shape::count, 2 * pairs); ++u) copy(u);
  }
  copy_query<size, rows>(a, batch, key_head, first_row, shared_address(query_memory),
                         cache_policy(false));
  commit_copies();
  wait_copies<0>();
  __syncthreads();

  Sums<size, row_tiles> sums;
  sums.clear();
  if (warp == readers) {
    if (copies) {
      for (int u = Shape::count; u < 2 * pairs; ++u) {
        hopper::wait(&empty[u % Shape::count], (u / Shape::count - 1) & 1);
        copy(u);
      }
    }
    __syncwarp();
  } else {
    const Rows<row_tiles> lane_rows = rows_of<row_tiles>(a, batch, key_head, first_row);
    Padding padding;
    Queries<size, row_tiles> queries;
    queries.load(shared_address(query_memory) + lane_addresses<size>().left);
    // Chunk c of block k of row r lies at c ^ (r * blocks + k) % 8. So k turns bits of the address
    // over at which a lane reads row r, half h of its matrices of columns 16 k on.
    const auto lane_address = [&](int row, int half) {
      return shared_address(memory) + (warp * tile_keys + row) * Shape::row_bytes +
             (half ^ (row * blocks % 8)) * 16;
    };
    const auto turned = [](uint32_t address, int k) {
      return address ^ (k / 4 * (128 + 16) + k % 4 * 32);
    };
    const int matrix = lane / 8;
    const uint32_t key_lane = lane_address(lane % 8 + matrix / 2 * 8, matrix % 2);
    const uint32_t value_lane = lane_address(lane % 8 + matrix % 2 * 8, matrix / 2);
    hopper::Ring<Shape::count> ring;
    const auto tile_offset = [&](int i) {
      return ring.stage() * Shape::bytes + i * Shape::step * Shape::row_bytes;
    };
    for (int pair = 0; pair < pairs; ++pair) {
      const int warp_first = first_key + pair * Shape::keys + warp * tile_keys;
      const int first_tile = pair * Shape::tiles;  // of the warp's
      if (sight.key_mask && first_tile % Padding::tiles == 0) {
        padding.read(sight, warp_first, Shape::step, pairs * Shape::tiles - first_tile);
      }
      hopper::wait(&full[ring.stage()], ring.parity());
      Logits<row_tiles> logits[Shape::tiles];
#pragma unroll
      for (int i = 0; i < Shape::tiles; ++i) {
        const int first = warp_first + i * Shape::step;
        const uint32_t keys = key_lane + tile_offset(i);
        multiply_keys<T>(
            queries, [&](int k) { return turned(keys, k); }, logits[i]);
        look<row_tiles>(a, sight, lane_rows, first, padding.hidden_keys(first_tile + i), logits[i]);
      }
      hopper::arrive_warp(&empty[ring.stage()]);
      ++ring.count;
      weigh(logits, sums);
      hopper::wait(&full[ring.stage()], ring.parity());
#pragma unroll
      for (int i = 0; i < Shape::tiles; ++i) {
        const int first = warp_first + i * Shape::step;
        // What lies beyond the end may be anything, and a weight of 0 does not make it 0.
        if (first + tile_keys > sight.end) {
          constexpr int chunks = Tile<size>::chunks;
          uint4* tile = reinterpret_cast<uint4*>(memory + tile_offset(i) +
                                                 warp * tile_keys * Shape::row_bytes);
          for (int j = max(sight.end - first, 0) * chunks + lane; j < tile_keys * chunks; j += 32) {
            tile[j] = uint4{};
          }
          __syncwarp();
        }
        const uint32_t values = value_lane + tile_offset(i);
        add_values<T>(
            logits[i], [&](int n) { return turned(values, n); }, sums);
      }
      hopper::arrive_warp(&empty[ring.stage()]);
      ++ring.count;
    }
  }
  __syncthreads();  // All units are read: sums take their place.
  if (warp < readers) {
    store(sums, *reinterpret_cast<WarpSums<size, rows>*>(memory + warp * sums_pitch));
  }
  __syncthreads();
  finish<T, size, rows>(a, split, first_row, readers, memory, sums_pitch);
#endif
}

template <typename T, int size, int row_tiles>
cudaError_t launch(const CudaAttention& c, const Arguments& a, const dim3& grid,
                   const CudaDevice& device, cudaStream_t stream) {
  constexpr int unit_keys = Units<size, row_tiles>::keys;
  BulkArguments b{};
  cudaError_t error =
      make_row_map(&b.key, c.dtype, c.key, c.batch, c.key_heads, c.keys, size, unit_keys);
  if (error != cudaSuccess) return error;
  error = make_row_map(&b.value, c.dtype, c.value, c.batch, c.key_heads, c.keys, size, unit_keys);
  if (error != cudaSuccess) return error;
  b.rest = a;
  constexpr auto kernel = attend<T, size, row_tiles>;
  constexpr int bytes = SharedMemory<size, row_tiles>::bytes;
  error = allow_shared_bytes<kernel>(bytes, device);
  if (error != cudaSuccess) return error;
  kernel<<<grid, threads, bytes, stream>>>(b);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_for_size(const CudaAttention& c, const Arguments& a, int row_tiles,
                            const dim3& grid, const CudaDevice& device, cudaStream_t stream) {
  if (c.head_size == 64) {
    return row_tiles == 1 ? launch<T, 64, 1>(c, a, grid, device, stream)
                          : launch<T, 64, 2>(c, a, grid, device, stream);
  }
  return row_tiles == 1 ? launch<T, 128, 1>(c, a, grid, device, stream)
                        : launch<T, 128, 2>(c, a, grid, device, stream);
}

}  // namespace

cudaError_t decoding::attend_in_bulk(const CudaAttention& c, const Arguments& a, int row_tiles,
                                     const dim3& grid, const CudaDevice& device,
                                     cudaStream_t stream) {
  return c.dtype == DType::float16
             ? launch_for_size<__half>(c, a, row_tiles, grid, device, stream)
             : launch_for_size<__nv_bfloat16>(c, a, row_tiles, grid, device, stream);
}

}  // namespace zerotuning::attention
