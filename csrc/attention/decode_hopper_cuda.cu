// Decode attention of caches that are much larger than the level-2 cache, on Hopper: one warp has
// the bulk copy engine fetch tiles of 64 keys and their values, whole rows of memory in a run, for
// the four others, which share each tile. decode_cuda.cu does the rest, small caches included:
// there the copies that each warp makes for itself start sooner.
#include "attention/decode.cuh"
#include "attention/hopper_tiles.cuh"

namespace zerotuning::attention {
namespace {

using namespace decoding;

constexpr int readers = 4;  // warps
constexpr int threads = (readers + 1) * 32;

struct BulkArguments {
  CUtensorMap key, value;
  Arguments rest;
};

// Stages of K and V in shared memory, each [key][64-column block][128 bytes], swizzled. Two blocks
// fit a multiprocessor, so that one begins while the one before it ends.
template <int size>
struct Stages {
  static constexpr int keys = readers * tile_keys;
  static constexpr int row_bytes = size * 2;
  static constexpr int half_bytes = keys * row_bytes, bytes = 2 * half_bytes;
  static constexpr int count = size <= 64 ? 6 : 3;
};

template <int size, int row_tiles>
struct SharedMemory {
  static constexpr int query_bytes = row_tiles * tile_rows * Tile<size>::row_bytes;
  static constexpr int alignment = 1024;  // of the swizzle
  static constexpr int bytes =
      alignment + Stages<size>::count * (Stages<size>::bytes + 16) + query_bytes;
};

// [batch, heads, rows, columns] in boxes of all columns of `box_rows` rows.
cudaError_t make_row_map(CUtensorMap* map, DType dtype, const Array4& array, int batch, int heads,
                         int rows, int columns, int box_rows) {
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
  using Shape = Stages<size>;
  constexpr int rows = row_tiles * tile_rows, stages = Shape::count;
  constexpr int blocks = size / hopper::block_columns;
  constexpr int sums_pitch = Shape::bytes * stages / readers;
  static_assert(sizeof(WarpSums<size, rows>) <= sums_pitch && sums_pitch % 16 == 0);
  const Arguments& a = b.rest;
  extern __shared__ char unaligned[];
  char* memory =
      unaligned + (-shared_address(unaligned) & (SharedMemory<size, row_tiles>::alignment - 1));
  char* query_memory = memory + stages * Shape::bytes;
  uint64_t* full =
      reinterpret_cast<uint64_t*>(query_memory + SharedMemory<size, row_tiles>::query_bytes);
  uint64_t* empty = full + stages;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool copies = threadIdx.x == readers * 32;
  start_dependent_kernel();

  const int key_head = blockIdx.y, batch = blockIdx.z;
  const int split = blockIdx.x / a.row_groups, first_row = blockIdx.x % a.row_groups * rows;
  const RangeSight sight = sight_of(a, batch);
  const int64_t tiles =
      sight.begin < sight.end ? (sight.end - sight.begin + Shape::keys - 1) / Shape::keys : 0;
  const int first_tile = static_cast<int>(tiles * split / a.splits);
  const int count = static_cast<int>(tiles * (split + 1) / a.splits) - first_tile;
  const int first_key = sight.begin + first_tile * Shape::keys;
  const auto copy = [&](int t) {
    char* to = memory + t % stages * Shape::bytes;
    uint64_t* barrier = &full[t % stages];
    hopper::expect_bytes(barrier, Shape::bytes);
    hopper::load_rows(to, &b.key, barrier, first_key + t * Shape::keys, key_head, batch);
    hopper::load_rows(to + Shape::half_bytes, &b.value, barrier, first_key + t * Shape::keys,
                      key_head, batch);
  };
  if (copies) {
    for (int i = 0; i < stages; ++i) {
      hopper::init(&full[i], 1);
      hopper::init(&empty[i], readers);
    }
    hopper::publish_barriers();
    for (int t = 0; t < min(stages, count); ++t) copy(t);
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
      for (int t = stages; t < count; ++t) {
        hopper::wait(&empty[t % stages], (t / stages - 1) & 1);
        copy(t);
      }
    }
    __syncwarp();
  } else {
    const Rows<row_tiles> lane_rows = rows_of<row_tiles>(a, batch, key_head, first_row);
    Queries<size, row_tiles> queries;
    queries.load(shared_address(query_memory) + lane_addresses<size>().left);
    // Where a lane reads its matrices of the 16 keys or values at `tile`, of columns 16 k on: chunk
    // c of block b of row r lies at c ^ (r * blocks + b) % 8.
    const auto address = [&](uint32_t tile, int row, int half, int k) {
      const uint32_t chunk = (k % 4 * 2 + half) ^ ((row * blocks + k / 4) % 8);
      return tile + row * Shape::row_bytes + k / 4 * 128 + chunk * 16;
    };
    const int matrix = lane / 8;
    const int key_row = lane % 8 + matrix / 2 * 8, value_row = lane % 8 + matrix % 2 * 8;
    for (int t = 0; t < count; ++t) {
      const int first = first_key + t * Shape::keys + warp * tile_keys;
      const bool real = read_mask(sight, first);
      hopper::wait(&full[t % stages], t / stages & 1);
      const uint32_t real_keys = __ballot_sync(~0u, real);
      if (first < sight.end) {
        char* keys = memory + t % stages * Shape::bytes + warp * tile_keys * Shape::row_bytes;
        char* values = keys + Shape::half_bytes;
        // What lies beyond the end may be anything, and a weight of 0 does not make it 0.
        if (first + tile_keys > sight.end) {
          constexpr int chunks = Tile<size>::chunks;
          for (int i = (sight.end - first) * chunks + lane; i < tile_keys * chunks; i += 32) {
            reinterpret_cast<uint4*>(values)[i] = uint4{};
          }
          __syncwarp();
        }
        const uint32_t key_tile = shared_address(keys), value_tile = shared_address(values);
        Logits<row_tiles> logits;
        multiply_keys<T>(
            queries, [&](int k) { return address(key_tile, key_row, matrix % 2, k); }, logits);
        look<row_tiles>(a, sight, lane_rows, first, real_keys, logits);
#pragma unroll
        for (int tile = 0; tile < row_tiles; ++tile) {
          weigh<size>(logits[tile], sums.output[tile], sums.top[tile], sums.total[tile]);
        }
        add_values<T>(
            logits, [&](int n) { return address(value_tile, value_row, matrix / 2, n); }, sums);
      }
      hopper::arrive_warp(&empty[t % stages]);
    }
  }
  __syncthreads();  // All tiles are read: sums take their place.
  if (warp < readers) {
    store(sums, *reinterpret_cast<WarpSums<size, rows>*>(memory + warp * sums_pitch));
  }
  __syncthreads();
  finish<T, size, rows>(a, split, first_row, readers, memory, sums_pitch);
#endif
}

template <typename T, int size, int row_tiles>
cudaError_t launch(const CudaAttention& c, const Arguments& a, const dim3& grid,
                   cudaStream_t stream) {
  BulkArguments b{};
  cudaError_t error =
      make_row_map(&b.key, c.dtype, c.key, c.batch, c.key_heads, c.keys, size, Stages<size>::keys);
  if (error != cudaSuccess) return error;
  error = make_row_map(&b.value, c.dtype, c.value, c.batch, c.key_heads, c.keys, size,
                       Stages<size>::keys);
  if (error != cudaSuccess) return error;
  b.rest = a;
  const auto kernel = attend<T, size, row_tiles>;
  constexpr int bytes = SharedMemory<size, row_tiles>::bytes;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<grid, threads, bytes, stream>>>(b);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_for_size(const CudaAttention& c, const Arguments& a, int row_tiles,
                            const dim3& grid, cudaStream_t stream) {
  if (c.head_size == 64) {
    return row_tiles == 1 ? launch<T, 64, 1>(c, a, grid, stream)
                          : launch<T, 64, 2>(c, a, grid, stream);
  }
  return row_tiles == 1 ? launch<T, 128, 1>(c, a, grid, stream)
                        : launch<T, 128, 2>(c, a, grid, stream);
}

}  // namespace

bool decode_bulk_takes(const CudaAttention& c) {
  return decode_takes(c) && has_16_byte_rows(c) && c.head_size == c.value_head_size &&
         (c.head_size == 64 || c.head_size == 128);
}

cudaError_t decoding::attend_in_bulk(const CudaAttention& c, const Arguments& a, int row_tiles,
                                     const dim3& grid, cudaStream_t stream) {
  return c.dtype == DType::float16 ? launch_for_size<__half>(c, a, row_tiles, grid, stream)
                                   : launch_for_size<__nv_bfloat16>(c, a, row_tiles, grid, stream);
}

}  // namespace zerotuning::attention
