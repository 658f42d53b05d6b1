// Attention of few queries to many keys: what it costs is one reading of K and V.
//
// A block takes a share of one key head's keys and a group of rows: the queries of all heads that
// share the key head, packed into the 16-row tiles of the tensor cores. Each of its warps streams
// tiles of 16 keys of its own through a ring in shared memory of its own, with a softmax and sums
// of its own, so that no barrier of the block stands in the stream. The block's warps are merged at
// its end, the shares of a key head's keys ("splits") by a second kernel that is already waiting
// when the first one ends; both in a fixed order, so that results repeat bit by bit. Counters, by
// which the last block could merge, would have to be cleared by a launch as well.
//
// The grid depends on the cache's length; the shares are cut on the device out of the keys that the
// sample's queries really see.
//
// Of a 16 x 8 tile, a thread holds rows lane/4 and lane/4 + 8, columns 2 (lane % 4) + {0, 1}, at
// [2 (row half) + column].
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "attention/cuda_device.cuh"

namespace zerotuning::attention {
namespace {

using namespace device;

constexpr int tile_keys = 16;
constexpr int tile_rows = 16;
constexpr int most_queries = 16;
constexpr int most_warps = 4;
constexpr int most_splits = 128;
constexpr int merge_threads = 256;
constexpr int most_grid = 65535;  // of its second and third dimension

struct Arguments {
  const uint16_t *query, *key, *value;
  int64_t query_batch_stride, query_head_stride, query_row_stride;
  int64_t key_batch_stride, key_head_stride, key_row_stride;
  int64_t value_batch_stride, value_head_stride, value_row_stride;
  CudaGeometry geometry;
  const float* log_scale;
  int64_t log_scale_batch_stride, log_scale_head_stride;
  uint16_t* output;
  int64_t output_batch_stride, output_head_stride, output_row_stride;
  float* logsumexp;  // or null
  int64_t logsumexp_batch_stride, logsumexp_head_stride, logsumexp_row_stride;
  float* split_output;     // [batch, heads, queries, splits, value_head_size], if splits > 1
  float* split_logsumexp;  // [batch, heads, queries, splits], base 2
  int heads, group, queries, keys, head_size, value_head_size;
  int rows;  // of a key head: group * queries, queries innermost
  int row_groups, splits;
  float scale_log2;
};

// A warp's tile of K or of V in shared memory.
template <int size>
struct Tile {
  static constexpr int chunks = size / 8;  // of 16 bytes
  // An odd number of chunks: ldmatrix then finds eight rows in eight different groups of banks.
  static constexpr int row_bytes = (chunks + 1) * 16;
  static constexpr int bytes = tile_keys * row_bytes;
  // A copy of the warp takes this many lanes for a row, and so many rows.
  static constexpr int row_lanes = chunks & -chunks;
  static constexpr int copy_rows = 32 / row_lanes;
  // Two blocks of four warps fill Hopper's shared memory; one of the widest heads.
  static constexpr int stages = size <= 64 ? 6 : size <= 96 ? 4 : size <= 128 || size > 192 ? 3 : 2;
  static constexpr int ring_bytes = stages * 2 * bytes;
};

constexpr int row_tiles_of(int size, int rows) { return size <= 128 && rows > tile_rows ? 2 : 1; }

// 16 bytes, or zeros.
__device__ __forceinline__ void copy_chunk(uint32_t to, const void* from, bool real) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(real ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int pending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8 x 8 matrices, of which lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&m)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}

#define ZT_MULTIPLY_ADD(type)                                                         \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
               : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1))
// d += left right: 16 x 16 by 16 x 8.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&left)[4],
                                             uint32_t right0, uint32_t right1) {
  if constexpr (std::is_same_v<T, __half>) {
    ZT_MULTIPLY_ADD("f16");
  } else {
    ZT_MULTIPLY_ADD("bf16");
  }
}
#undef ZT_MULTIPLY_ADD

// What weights are relative to: the largest logit, if there is one.
__device__ __forceinline__ float reference_of(float top) { return top == -INFINITY ? 0 : top; }

// Which keys a sample's queries see, and which of them are scaled.
struct RangeSight : SampleGeometry {
  int begin, end;  // no query sees keys outside
};

__device__ __forceinline__ RangeSight sight_of(const Arguments& a, int batch) {
  const SampleGeometry s = sample_geometry(a.geometry, batch, a.queries, a.keys);
  const int window = a.geometry.window;
  return {s, window ? max(s.first_key, s.start - window + 1) : s.first_key,
          min(s.start + a.queries, a.keys)};
}

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
__device__ __forceinline__ void copy_tile(uint32_t to, const Source& source, int first_key) {
  using Shape = Tile<size>;
  const int lane = threadIdx.x % 32, lane_row = lane / Shape::row_lanes;
  const int lane_chunk = lane % Shape::row_lanes;
  const uint16_t* from = source.base + (first_key + lane_row) * source.row_stride + lane_chunk * 8;
  to += lane_row * Shape::row_bytes + lane_chunk * 16;
#pragma unroll
  for (int row = 0; row < tile_keys; row += Shape::copy_rows) {
    const bool real_row = first_key + lane_row + row < source.end;
#pragma unroll
    for (int chunk = 0; chunk < Shape::chunks; chunk += Shape::row_lanes) {
      const bool real = real_row && (lane_chunk + chunk) * 8 < source.columns;
      copy_chunk(to + row * Shape::row_bytes + chunk * 16,
                 real ? from + row * source.row_stride + chunk * 8 : source.base, real);
    }
  }
}

// The block's rows of queries; rows and columns beyond are zero.
template <int size, int rows>
__device__ __forceinline__ void copy_query(const Arguments& a, int batch, int key_head,
                                           int first_row, uint32_t to) {
  const uint16_t* base = a.query + batch * a.query_batch_stride;
  for (int i = threadIdx.x; i < rows * Tile<size>::chunks; i += blockDim.x) {
    const int tile_row = i / Tile<size>::chunks, chunk = i % Tile<size>::chunks;
    const int row = first_row + tile_row;
    const bool real = row < a.rows && chunk * 8 < a.head_size;
    const int64_t head = key_head * a.group + row / a.queries, query = row % a.queries;
    copy_chunk(
        to + tile_row * Tile<size>::row_bytes + chunk * 16,
        real ? base + head * a.query_head_stride + query * a.query_row_stride + chunk * 8 : base,
        real);
  }
}

// The rows that a thread holds parts of, two in each tile of rows.
template <int row_tiles>
struct Rows {
  int query[row_tiles][2];
  float bias[row_tiles][2];  // log_scale, base 2
};

template <int row_tiles>
__device__ __forceinline__ Rows<row_tiles> rows_of(const Arguments& a, int batch, int key_head,
                                                   int first_row) {
  Rows<row_tiles> rows;
#pragma unroll
  for (int tile = 0; tile < row_tiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int lane_row = static_cast<int>(threadIdx.x % 32 / 4) + half * 8;
      const int row = min(first_row + tile * tile_rows + lane_row, a.rows - 1);
      const int64_t head = key_head * a.group + row / a.queries;
      rows.query[tile][half] = row % a.queries;
      rows.bias[tile][half] =
          a.log_scale[batch * a.log_scale_batch_stride + head * a.log_scale_head_stride] *
          1.44269504f;
    }
  }
  return rows;
}

// A lane's key of the 16 from `first` on: whether it is real. Lanes 16 and up repeat the others.
__device__ __forceinline__ bool read_mask(const RangeSight& s, int first) {
  const int key = first + static_cast<int>(threadIdx.x % tile_keys);
  return s.key_mask && key < s.end && s.key_mask[key];
}

// A warp's sums over the keys that it has seen.
template <int size, int row_tiles>
struct Sums {
  float output[row_tiles][size / 8][4];
  float top[row_tiles][2];    // the largest logit, base 2
  float total[row_tiles][2];  // of the weights in the thread's own columns

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int tile = 0; tile < row_tiles; ++tile) {
#pragma unroll
      for (int i = 0; i < size / 2; ++i) output[tile][i / 4][i % 4] = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        top[tile][half] = -INFINITY;
        total[tile][half] = 0;
      }
    }
  }
};

template <int row_tiles>
using Logits = float[row_tiles][2][4];  // of 16 keys: two 16 x 8 tiles side by side

// Scales the logits to base 2, adds log_scale to those of scaled keys, hides keys out of sight.
template <int row_tiles>
__device__ __forceinline__ void look(const Arguments& a, const RangeSight& s,
                                     const Rows<row_tiles>& rows, int first, uint32_t real_keys,
                                     Logits<row_tiles>& logits) {
  const int window = a.geometry.window;
  const bool scaled = first < s.span_end && first + tile_keys > s.span_begin;
  const bool edge =
      first + tile_keys - 1 > s.start || (window && first <= s.start + a.queries - 1 - window);
#pragma unroll
  for (int tile = 0; tile < row_tiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 8; ++i) logits[tile][i / 4][i % 4] *= a.scale_log2;
  }
  if (!scaled && !edge && !s.key_mask) return;
#pragma unroll
  for (int tile = 0; tile < row_tiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& logit = logits[tile][i / 4][i % 4];
      const int offset = i / 4 * 8 + static_cast<int>(threadIdx.x % 4) * 2 + i % 2;
      const int key = first + offset, half = i % 4 / 2;
      const int position = s.start + rows.query[tile][half];
      if (key >= s.span_begin && key < s.span_end) logit += rows.bias[tile][half];
      const bool seen = key <= position && key < s.end && !(window && key <= position - window) &&
                        (!s.key_mask || (real_keys >> offset & 1));
      if (!seen) logit = -INFINITY;
    }
  }
}

// One step of the softmax of 16 rows: logits become weights, earlier sums are rescaled.
template <int size>
__device__ __forceinline__ void weigh(float (&logits)[2][4], float (&output)[size / 8][4],
                                      float (&top)[2], float (&total)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float& a = logits[0][2 * half];
    float& b = logits[0][2 * half + 1];
    float& c = logits[1][2 * half];
    float& d = logits[1][2 * half + 1];
    const float larger = fmaxf(top[half], quad_max(fmaxf(fmaxf(a, b), fmaxf(c, d))));
    const float reference = reference_of(larger);
    const float rescale = exp2_fast(top[half] - reference);
    top[half] = larger;
    a = exp2_fast(a - reference);
    b = exp2_fast(b - reference);
    c = exp2_fast(c - reference);
    d = exp2_fast(d - reference);
    total[half] = total[half] * rescale + ((a + b) + (c + d));
#pragma unroll
    for (int i = 0; i < size / 8; ++i) {
      output[i][2 * half] *= rescale;
      output[i][2 * half + 1] *= rescale;
    }
  }
}

// Shared-memory addresses at which a lane reads matrices: see load_matrices.
struct LaneAddresses {
  uint32_t left;   // of the left operand, and of a right one that is transposed in loading
  uint32_t right;  // of a right operand stored by its columns
};

template <int size>
__device__ __forceinline__ LaneAddresses lane_addresses() {
  const uint32_t lane = threadIdx.x % 32, row = lane % 8, matrix = lane / 8;
  return {(row + matrix % 2 * 8) * Tile<size>::row_bytes + matrix / 2 * 16,
          (row + matrix / 2 * 8) * Tile<size>::row_bytes + matrix % 2 * 16};
}

// The queries as left operands: in registers if they leave room for the sums, else in shared
// memory, from where each step loads them again.
template <int size, int row_tiles>
struct Queries {
  static constexpr bool in_registers = size * row_tiles <= 128;
  uint32_t address;
  uint32_t kept[in_registers ? size / 16 : 1][row_tiles][4];

  __device__ __forceinline__ void load(uint32_t lane_address) {
    address = lane_address;
    if constexpr (in_registers) {
#pragma unroll
      for (int k = 0; k < size / 16; ++k) {
#pragma unroll
        for (int tile = 0; tile < row_tiles; ++tile) read(kept[k][tile], k, tile);
      }
    }
  }
  __device__ __forceinline__ void read(uint32_t (&left)[4], int k, int tile) const {
    load_matrices(left, address + tile * tile_rows * Tile<size>::row_bytes + k * 32);
  }
};

template <typename T, int size, int row_tiles>
__device__ __forceinline__ void multiply_keys(const Queries<size, row_tiles>& queries,
                                              uint32_t address, Logits<row_tiles>& logits) {
#pragma unroll
  for (int i = 0; i < row_tiles * 8; ++i) logits[i / 8][i / 4 % 2][i % 4] = 0;
#pragma unroll
  for (int k = 0; k < size / 16; ++k) {
    uint32_t keys[4];
    load_matrices(keys, address + k * 32);
#pragma unroll
    for (int tile = 0; tile < row_tiles; ++tile) {
      if constexpr (Queries<size, row_tiles>::in_registers) {
        multiply_add<T>(logits[tile][0], queries.kept[k][tile], keys[0], keys[1]);
        multiply_add<T>(logits[tile][1], queries.kept[k][tile], keys[2], keys[3]);
      } else {
        uint32_t left[4];
        queries.read(left, k, tile);
        multiply_add<T>(logits[tile][0], left, keys[0], keys[1]);
        multiply_add<T>(logits[tile][1], left, keys[2], keys[3]);
      }
    }
  }
}

template <typename T, int size, int row_tiles>
__device__ __forceinline__ void add_values(const Logits<row_tiles>& weights, uint32_t address,
                                           Sums<size, row_tiles>& sums) {
  uint32_t left[row_tiles][4];
#pragma unroll
  for (int i = 0; i < row_tiles * 4; ++i) {
    const float(&pair)[4] = weights[i / 4][i % 4 / 2];
    left[i / 4][i % 4] = pack<T>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
  }
#pragma unroll
  for (int n = 0; n < size / 16; ++n) {
    uint32_t values[4];
    load_matrices_transposed(values, address + n * 32);
#pragma unroll
    for (int tile = 0; tile < row_tiles; ++tile) {
      multiply_add<T>(sums.output[tile][2 * n], left[tile], values[0], values[1]);
      multiply_add<T>(sums.output[tile][2 * n + 1], left[tile], values[2], values[3]);
    }
  }
}

// Four columns of a row of attention over some of the keys; weights are relative to `top`.
struct Part {
  float4 output;
  float total, top;
};

__device__ __forceinline__ void merge(Part& to, const Part& from) {
  const float top = fmaxf(to.top, from.top), reference = reference_of(top);
  const float a = exp2_fast(to.top - reference), b = exp2_fast(from.top - reference);
  to.output = {to.output.x * a + from.output.x * b, to.output.y * a + from.output.y * b,
               to.output.z * a + from.output.z * b, to.output.w * a + from.output.w * b};
  to.total = to.total * a + from.total * b;
  to.top = top;
}

__device__ __forceinline__ Part no_part() { return {{0, 0, 0, 0}, 0, -INFINITY}; }

// Divides by the total; 0 where no key was seen. Returns logsumexp, base 2.
__device__ __forceinline__ float normalize(Part& part) {
  const float factor = part.total == 0 ? 0 : 1 / part.total;
  part.output.x *= factor;
  part.output.y *= factor;
  part.output.z *= factor;
  part.output.w *= factor;
  return part.top + log2f(part.total);
}

// A warp's sums in shared memory, where its ring was.
template <int size, int rows>
struct WarpSums {
  // Padded: the lanes of a half warp then write to different banks.
  float output[rows][size + 8];
  float top[rows], total[rows];

  __device__ __forceinline__ Part part(int row, int column) const {
    return {*reinterpret_cast<const float4*>(&output[row][column]), total[row], top[row]};
  }
};

template <int size, int row_tiles>
__device__ __forceinline__ void store(const Sums<size, row_tiles>& sums,
                                      WarpSums<size, row_tiles * tile_rows>& to) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < row_tiles * 2; ++i) {
    const int tile = i / 2, half = i % 2, row = tile * tile_rows + lane / 4 + half * 8;
#pragma unroll
    for (int n = 0; n < size / 8; ++n) {
      *reinterpret_cast<float2*>(&to.output[row][n * 8 + lane % 4 * 2]) = {
          sums.output[tile][n][2 * half], sums.output[tile][n][2 * half + 1]};
    }
    const float total = quad_sum(sums.total[tile][half]);
    if (lane % 4 == 0) {
      to.top[row] = sums.top[tile][half];
      to.total[row] = total;
    }
  }
}

template <typename T>
__device__ __forceinline__ void write_result(const Arguments& a, int64_t batch, int64_t head,
                                             int64_t query, int column, Part part) {
  const float logsumexp = normalize(part);
  uint16_t* output = a.output + batch * a.output_batch_stride + head * a.output_head_stride +
                     query * a.output_row_stride + column;
  *reinterpret_cast<uint2*>(output) = {pack<T>(part.output.x, part.output.y),
                                       pack<T>(part.output.z, part.output.w)};
  if (a.logsumexp && column == 0) {
    a.logsumexp[batch * a.logsumexp_batch_stride + head * a.logsumexp_head_stride +
                query * a.logsumexp_row_stride] = logsumexp * 0.693147181f;
  }
}

// Merges the block's warps into the result or, if the keys are split, into scratch.
template <typename T, int size, int rows>
__device__ __forceinline__ void finish(const Arguments& a, int split, int first_row,
                                       const char* rings) {
  const int key_head = blockIdx.y, batch = blockIdx.z, warps = blockDim.x / 32;
  const int columns = a.value_head_size / 4, count = min(rows, a.rows - first_row) * columns;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int tile_row = i / columns, column = i % columns * 4, row = first_row + tile_row;
    Part part = no_part();
    for (int warp = 0; warp < warps; ++warp) {
      merge(part,
            reinterpret_cast<const WarpSums<size, rows>*>(rings + warp * Tile<size>::ring_bytes)
                ->part(tile_row, column));
    }
    const int head = key_head * a.group + row / a.queries, query = row % a.queries;
    if (a.splits == 1) {
      write_result<T>(a, batch, head, query, column, part);
      continue;
    }
    const float logsumexp = normalize(part);
    const int64_t place =
        ((static_cast<int64_t>(batch) * a.heads + head) * a.queries + query) * a.splits + split;
    *reinterpret_cast<float4*>(a.split_output + place * a.value_head_size + column) = part.output;
    if (column == 0) a.split_logsumexp[place] = logsumexp;
  }
}

// The merging kernel may be started, and waits until this one has ended.
__device__ __forceinline__ void start_dependent_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Grid: splits * row_groups (those of the same keys side by side: they meet in the level-2 cache),
// key heads, samples.
template <typename T, int size, int row_tiles>
__global__ void __launch_bounds__(most_warps * 32) attend(const __grid_constant__ Arguments a) {
  using Shape = Tile<size>;
  constexpr int rows = row_tiles * tile_rows, stages = Shape::stages;
  static_assert(sizeof(WarpSums<size, rows>) <= Shape::ring_bytes);
  extern __shared__ __align__(16) char memory[];
  start_dependent_kernel();
  const int key_head = blockIdx.y, batch = blockIdx.z;
  const int split = blockIdx.x / a.row_groups, first_row = blockIdx.x % a.row_groups * rows;
  copy_query<size, rows>(a, batch, key_head, first_row, shared_address(memory));
  commit_copies();

  const RangeSight sight = sight_of(a, batch);
  const Share share = share_of(a, sight, split);
  const Source key{a.key + batch * a.key_batch_stride + key_head * a.key_head_stride,
                   a.key_row_stride, a.head_size, sight.end};
  const Source value{a.value + batch * a.value_batch_stride + key_head * a.value_head_stride,
                     a.value_row_stride, a.value_head_size, sight.end};
  char* rings = memory + rows * Shape::row_bytes;
  char* ring = rings + threadIdx.x / 32 * Shape::ring_bytes;
  // A tile's keys and values are one group of copies; there is a group also where there is no tile.
  const auto copy = [&](int t) {
    if (t < share.count) {
      const uint32_t to = shared_address(ring) + t % stages * (2 * Shape::bytes);
      copy_tile<size>(to, key, share.first + t * share.step);
      copy_tile<size>(to + Shape::bytes, value, share.first + t * share.step);
    }
    commit_copies();
  };
#pragma unroll
  for (int t = 0; t < stages - 1; ++t) copy(t);
  const Rows<row_tiles> lane_rows = rows_of<row_tiles>(a, batch, key_head, first_row);
  bool real = share.count > 0 && read_mask(sight, share.first);
  wait_copies<stages - 1>();
  __syncthreads();
  const LaneAddresses lane = lane_addresses<size>();
  Queries<size, row_tiles> queries;
  queries.load(shared_address(memory) + lane.left);

  Sums<size, row_tiles> sums;
  sums.clear();
  for (int t = 0; t < share.count; ++t) {
    const int first = share.first + t * share.step;
    const uint32_t real_keys = __ballot_sync(~0u, real);
    if (t + 1 < share.count) real = read_mask(sight, first + share.step);
    wait_copies<stages - 2>();
    // The tile is complete, and all lanes are through with the one before it, whose place the
    // next copy takes.
    __syncwarp();
    copy(t + stages - 1);
    const uint32_t tile = shared_address(ring) + t % stages * (2 * Shape::bytes);
    Logits<row_tiles> logits;
    multiply_keys<T>(queries, tile + lane.right, logits);
    look<row_tiles>(a, sight, lane_rows, first, real_keys, logits);
#pragma unroll
    for (int i = 0; i < row_tiles; ++i) {
      weigh<size>(logits[i], sums.output[i], sums.top[i], sums.total[i]);
    }
    add_values<T>(logits, tile + Shape::bytes + lane.left, sums);
  }
  wait_copies<0>();
  __syncwarp();
  store(sums, *reinterpret_cast<WarpSums<size, rows>*>(ring));
  __syncthreads();
  finish<T, size, rows>(a, split, first_row, rings);
}

// A block for each row: its threads take four columns each, and the splits by turns.
template <typename T>
__global__ void __launch_bounds__(merge_threads) merge_splits(const __grid_constant__ Arguments a) {
  __shared__ Part parts[merge_threads];
  const int columns = a.value_head_size / 4, slices = merge_threads / columns;
  const int slice = threadIdx.x / columns, column = threadIdx.x % columns * 4;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * a.splits;
  wait_for_previous_kernel();
  Part part = no_part();
  if (slice < slices) {
#pragma unroll 4
    for (int split = slice; split < a.splits; split += slices) {
      const float4 output = *reinterpret_cast<const float4*>(
          a.split_output + (first + split) * a.value_head_size + column);
      merge(part, {output, 1, a.split_logsumexp[first + split]});
    }
  }
  parts[threadIdx.x] = part;
  __syncthreads();
  if (slice > 0) return;
  for (int i = 1; i < slices; ++i) merge(part, parts[i * columns + threadIdx.x]);
  const int query = blockIdx.x % a.queries, row_head = blockIdx.x / a.queries;
  write_result<T>(a, row_head / a.heads, row_head % a.heads, query, column, part);
}

// How a call is cut: a function of its sizes alone, so that scratch and launch agree.
struct Cut {
  int size, row_tiles, row_groups, splits;
};

// The fewest splits that fill whole rounds of blocks well, and leave each warp a tile at least.
int splits_of(const CudaAttention& c, int64_t sequences, int64_t slots) {
  const int reach =
      c.geometry.window ? std::min(c.geometry.window + c.queries - 1, c.keys) : c.keys;
  const int most = std::clamp(reach / (tile_keys * most_warps), 1, most_splits);
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

int64_t split_rows(const CudaAttention& c, const Cut& cut) {
  return cut.splits > 1 ? int64_t{c.batch} * c.heads * c.queries * cut.splits : 0;
}

Arguments arguments_of(const CudaAttention& c, const Cut& cut, void* scratch) {
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
  a.output = static_cast<uint16_t*>(const_cast<void*>(c.output.data));
  a.output_batch_stride = c.output.batch_stride;
  a.output_head_stride = c.output.head_stride;
  a.output_row_stride = c.output.row_stride;
  a.logsumexp = static_cast<float*>(const_cast<void*>(c.logsumexp.data));
  a.logsumexp_batch_stride = c.logsumexp.batch_stride;
  a.logsumexp_head_stride = c.logsumexp.head_stride;
  a.logsumexp_row_stride = c.logsumexp.row_stride;
  a.split_output = static_cast<float*>(scratch);
  a.split_logsumexp = a.split_output + split_rows(c, cut) * c.value_head_size;
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

struct DeviceLimits {
  int block_bytes;  // of shared memory
  bool dependent_launches;
};

cudaError_t read_limits(DeviceLimits* limits) {
  int device, major;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error =
      cudaDeviceGetAttribute(&limits->block_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  limits->dependent_launches = major >= 9;
  return error;
}

template <typename T>
cudaError_t launch_merge(const CudaAttention& c, const Arguments& a, bool dependent,
                         cudaStream_t stream) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(c.batch * c.heads * c.queries);
  config.blockDim = merge_threads;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  return cudaLaunchKernelEx(&config, merge_splits<T>, a);
}

template <typename T, int size, int row_tiles>
cudaError_t launch(const CudaAttention& c, const Cut& cut, void* scratch, cudaStream_t stream) {
  DeviceLimits limits;
  cudaError_t error = read_limits(&limits);
  if (error != cudaSuccess) return error;
  constexpr int query_bytes = row_tiles * tile_rows * Tile<size>::row_bytes;
  constexpr int ring_bytes = Tile<size>::ring_bytes;
  const int warps = std::min(most_warps, (limits.block_bytes - query_bytes) / ring_bytes);
  const int bytes = query_bytes + warps * ring_bytes;
  const auto kernel = attend<T, size, row_tiles>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const Arguments a = arguments_of(c, cut, scratch);
  const dim3 grid(cut.splits * cut.row_groups, c.key_heads, c.batch);
  kernel<<<grid, warps * 32, bytes, stream>>>(a);
  if (cut.splits > 1) {
    error = launch_merge<T>(c, a, limits.dependent_launches, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaGetLastError();
}

template <typename T, int size>
cudaError_t launch_for_rows(const CudaAttention& c, const Cut& cut, void* scratch,
                            cudaStream_t stream) {
  if constexpr (row_tiles_of(size, 2 * tile_rows) == 2) {
    if (cut.row_tiles == 2) return launch<T, size, 2>(c, cut, scratch, stream);
  }
  return launch<T, size, 1>(c, cut, scratch, stream);
}

template <typename T>
cudaError_t launch_for_size(const CudaAttention& c, const Cut& cut, void* scratch,
                            cudaStream_t stream) {
  switch (cut.size) {
    case 64:
      return launch_for_rows<T, 64>(c, cut, scratch, stream);
    case 96:
      return launch_for_rows<T, 96>(c, cut, scratch, stream);
    case 128:
      return launch_for_rows<T, 128>(c, cut, scratch, stream);
    case 192:
      return launch_for_rows<T, 192>(c, cut, scratch, stream);
    default:
      return launch_for_rows<T, 256>(c, cut, scratch, stream);
  }
}

// Rows that begin at multiples of 16 bytes.
bool aligned(const Array4& array, int batch, int heads, int rows) {
  const auto fits = [](int64_t stride, int size) { return size == 1 || stride % 8 == 0; };
  return reinterpret_cast<uintptr_t>(array.data) % 16 == 0 && fits(array.batch_stride, batch) &&
         fits(array.head_stride, heads) && fits(array.row_stride, rows);
}

}  // namespace

bool decode_takes(const CudaAttention& c) {
  const auto takes_size = [](int size) { return size > 0 && size % 8 == 0 && size <= 256; };
  return (c.dtype == DType::bfloat16 || c.dtype == DType::float16) && takes_size(c.head_size) &&
         takes_size(c.value_head_size) && c.queries >= 1 && c.queries <= most_queries &&
         c.batch <= most_grid && c.key_heads <= most_grid &&
         aligned(c.query, c.batch, c.heads, c.queries) &&
         aligned(c.key, c.batch, c.key_heads, c.keys) &&
         aligned(c.value, c.batch, c.key_heads, c.keys) &&
         aligned(c.output, c.batch, c.heads, c.queries);
}

int64_t decode_scratch(const CudaAttention& c, int32_t multiprocessors) {
  const Cut cut = cut_of(c, multiprocessors);
  return split_rows(c, cut) * (c.value_head_size + 1) * static_cast<int64_t>(sizeof(float));
}

cudaError_t decode(const CudaAttention& c, void* scratch, int32_t multiprocessors,
                   cudaStream_t stream) {
  const Cut cut = cut_of(c, multiprocessors);
  return c.dtype == DType::float16 ? launch_for_size<__half>(c, cut, scratch, stream)
                                   : launch_for_size<__nv_bfloat16>(c, cut, scratch, stream);
}

}  // namespace zerotuning::attention
