// What the two kernels of decode attention share: its arguments, products of the tensor cores, the
// softmax, and how sums are merged.
//
// Of a 16 x 8 tile, a thread holds rows lane/4 and lane/4 + 8, columns 2 (lane % 4) + {0, 1}, at
// [2 (row half) + column].
#pragma once

#include <cmath>
#include <type_traits>

#include "attention/cuda/device.cuh"

namespace zerotuning::attention::decoding {

using namespace device;

constexpr int tile_keys = 16;
constexpr int tile_rows = 16;
constexpr int merge_threads = 256;  // a row's splits are merged as so many threads would

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
  uint32_t* arrivals;      // [batch, key heads, row_groups], zeros; or null: merge_splits follows
  int heads, group, queries, keys, head_size, value_head_size;
  int rows;  // of a key head: group * queries, queries innermost
  int row_groups, splits;
  float scale_log2;
  bool read_once;  // K and V are the first to leave the level-2 cache
};

// 16 rows of queries, keys or values in shared memory.
template <int size>
struct Tile {
  static constexpr int chunks = size / 8;  // of 16 bytes
  // An odd number of chunks: ldmatrix then finds eight rows in eight different groups of banks.
  static constexpr int row_bytes = (chunks + 1) * 16;
  static constexpr int bytes = tile_keys * row_bytes;
};

// How the level-2 cache treats what is read.
__device__ __forceinline__ uint64_t cache_policy(bool read_once) {
  uint64_t policy;
  if (read_once) {
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
  } else {
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0;" : "=l"(policy));
  }
  return policy;
}

// 16 bytes, or zeros.
__device__ __forceinline__ void copy_chunk(uint32_t to, const void* from, bool real,
                                           uint64_t policy) {
  asm volatile(
      "cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(to),
      "l"(from), "r"(real ? 16 : 0), "l"(policy)
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

// The block's rows of queries; rows and columns beyond are zero.
template <int size, int rows>
__device__ __forceinline__ void copy_query(const Arguments& a, int batch, int key_head,
                                           int first_row, uint32_t to, uint64_t policy) {
  const uint16_t* base = a.query + batch * a.query_batch_stride;
  for (int i = threadIdx.x; i < rows * Tile<size>::chunks; i += blockDim.x) {
    const int tile_row = i / Tile<size>::chunks, chunk = i % Tile<size>::chunks;
    const int row = first_row + tile_row;
    const bool real = row < a.rows && chunk * 8 < a.head_size;
    const int64_t head = key_head * a.group + row / a.queries, query = row % a.queries;
    copy_chunk(
        to + tile_row * Tile<size>::row_bytes + chunk * 16,
        real ? base + head * a.query_head_stride + query * a.query_row_stride + chunk * 8 : base,
        real, policy);
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

// Which of the 16 keys from `first` on padding hides, a bit each.
__device__ __forceinline__ uint32_t hidden_keys_of_tile(const RangeSight& s, int first) {
  const bool* mask = s.key_mask + first;
  uint32_t real = 0;
  if (first + tile_keys <= s.end && reinterpret_cast<uintptr_t>(mask) % 8 == 0) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // The product gathers eight bytes of 0 or 1 as the bits of its highest byte.
      const uint64_t bytes = reinterpret_cast<const uint64_t*>(mask)[half];
      real |= static_cast<uint32_t>(bytes * 0x0102040810204080 >> 56) << half * 8;
    }
  } else {
#pragma unroll
    for (int i = 0; i < tile_keys; ++i) {
      real |= static_cast<uint32_t>(first + i >= s.end || mask[i]) << i;
    }
  }
  return real ^ 0xffff;
}

// Padding as a warp goes through its tiles, the keys of one `step` behind those of the one before.
// It is read for 32 tiles at once, one a lane, since each reading is waited for (on an H100 1 x
// 32768 keys with a mask whose rows are aligned in 60 us, not 65).
struct Padding {
  static constexpr int tiles = 32;
  uint32_t lane_tile = 0;

  // Of a tile and those behind it, `left` in all.
  __device__ __forceinline__ void read(const RangeSight& s, int first, int step, int left) {
    const int lane = threadIdx.x % 32;
    lane_tile = lane < left ? hidden_keys_of_tile(s, first + lane * step) : 0;
  }
  __device__ __forceinline__ uint32_t hidden_keys(int tile) const {
    return __shfl_sync(~0u, lane_tile, tile % tiles);
  }
};

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
                                     const Rows<row_tiles>& rows, int first, uint32_t hidden_keys,
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
  if (!scaled && !edge && !hidden_keys) return;
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
                        !(hidden_keys >> offset & 1);
      if (!seen) logit = -INFINITY;
    }
  }
}

// One step of the softmax, over `tiles` tiles of keys: logits become weights, earlier sums are
// rescaled.
template <int size, int row_tiles, int tiles>
__device__ __forceinline__ void weigh(Logits<row_tiles> (&logits)[tiles],
                                      Sums<size, row_tiles>& sums) {
#pragma unroll
  for (int row_tile = 0; row_tile < row_tiles; ++row_tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto logit = [&](int tile, int i) -> float& {
        return logits[tile][row_tile][i / 2][2 * half + i % 2];
      };
      const auto largest = [&](int tile) {
        return fmaxf(fmaxf(logit(tile, 0), logit(tile, 1)), fmaxf(logit(tile, 2), logit(tile, 3)));
      };
      float larger = largest(0);
#pragma unroll
      for (int tile = 1; tile < tiles; ++tile) larger = fmaxf(larger, largest(tile));
      float& top = sums.top[row_tile][half];
      float& total = sums.total[row_tile][half];
      larger = fmaxf(top, quad_max(larger));
      const float reference = reference_of(larger);
      const float rescale = exp2_fast(top - reference);
      top = larger;
      total *= rescale;
#pragma unroll
      for (int tile = 0; tile < tiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) logit(tile, i) = exp2_fast(logit(tile, i) - reference);
        total += (logit(tile, 0) + logit(tile, 1)) + (logit(tile, 2) + logit(tile, 3));
      }
#pragma unroll
      for (int n = 0; n < size / 8; ++n) {
        sums.output[row_tile][n][2 * half] *= rescale;
        sums.output[row_tile][n][2 * half + 1] *= rescale;
      }
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

// Logits of 16 keys; `address(k)`: where the lane reads columns 16 k to 16 k + 15 of them.
template <typename T, int size, int row_tiles, typename Address>
__device__ __forceinline__ void multiply_keys(const Queries<size, row_tiles>& queries,
                                              const Address& address, Logits<row_tiles>& logits) {
#pragma unroll
  for (int i = 0; i < row_tiles * 8; ++i) logits[i / 8][i / 4 % 2][i % 4] = 0;
#pragma unroll
  for (int k = 0; k < size / 16; ++k) {
    uint32_t keys[4];
    load_matrices(keys, address(k));
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

// Adds 16 weighted values; `address(n)`: where the lane reads columns 16 n to 16 n + 15 of them.
template <typename T, int size, int row_tiles, typename Address>
__device__ __forceinline__ void add_values(const Logits<row_tiles>& weights, const Address& address,
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
    load_matrices_transposed(values, address(n));
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

// A warp's sums in shared memory, where its tiles were.
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

// The parts that the splits of a row left of four columns.
struct Splits {
  const float *output, *logsumexp;
  int count, last_row, columns;

  // Those of splits first, first + step, ... The rehearsal of merge_splits reads row 0 each time.
  __device__ __forceinline__ Part merged(int first, int step) const {
    Part part = no_part();
#pragma unroll 4
    for (int split = first; split < count; split += step) {
      const int row = min(split, last_row);
      const float4 columns_of_row = *reinterpret_cast<const float4*>(output + row * columns);
      merge(part, {columns_of_row, 1, logsumexp[row]});
    }
    return part;
  }
};

// Where those of a row begin in scratch.
__device__ __forceinline__ int64_t first_split_of(const Arguments& a, int64_t batch, int head,
                                                  int query) {
  return ((batch * a.heads + head) * a.queries + query) * a.splits;
}

__device__ __forceinline__ Splits splits_of_row(const Arguments& a, int64_t first, int column) {
  return {a.split_output + first * a.value_head_size + column, a.split_logsumexp + first, a.splits,
          a.splits - 1, a.value_head_size};
}

// Whether the block is the last of those that share its rows, whose splits it can then read.
__device__ __forceinline__ bool arrives_last(const Arguments& a) {
  __threadfence();
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    const int group = blockIdx.x % a.row_groups;
    uint32_t* arrivals =
        a.arrivals + (int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * a.row_groups + group;
    last = atomicAdd(arrivals, 1) == a.splits - 1;
    if (last) *arrivals = 0;
  }
  last = __syncthreads_or(last);
  __threadfence();
  return last;
}

// Merges the block's warps, whose sums lie `sums_pitch` bytes apart, into the result or, if the
// keys are split, into scratch.
template <typename T, int size, int rows>
__device__ __forceinline__ void finish(const Arguments& a, int split, int first_row, int warps,
                                       const char* sums, int sums_pitch) {
  const int key_head = blockIdx.y, batch = blockIdx.z;
  const int columns = a.value_head_size / 4, count = min(rows, a.rows - first_row) * columns;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int tile_row = i / columns, column = i % columns * 4, row = first_row + tile_row;
    Part part = no_part();
    for (int warp = 0; warp < warps; ++warp) {
      merge(part, reinterpret_cast<const WarpSums<size, rows>*>(sums + warp * sums_pitch)
                      ->part(tile_row, column));
    }
    const int head = key_head * a.group + row / a.queries, query = row % a.queries;
    if (a.splits == 1) {
      write_result<T>(a, batch, head, query, column, part);
      continue;
    }
    const float logsumexp = normalize(part);
    const int64_t place = first_split_of(a, batch, head, query) + split;
    *reinterpret_cast<float4*>(a.split_output + place * a.value_head_size + column) = part.output;
    if (column == 0) a.split_logsumexp[place] = logsumexp;
  }
  if (a.splits == 1 || !a.arrivals || !arrives_last(a)) return;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int column = i % columns * 4, row = first_row + i / columns;
    const int head = key_head * a.group + row / a.queries, query = row % a.queries;
    const Splits splits = splits_of_row(a, first_split_of(a, batch, head, query), column);
    const int slices = merge_threads / columns;
    Part part = splits.merged(0, slices);
    for (int slice = 1; slice < slices; ++slice) merge(part, splits.merged(slice, slices));
    write_result<T>(a, batch, head, query, column, part);
  }
}

// The kernel of decode_hopper_cuda.cu; row_tiles is 1 or 2.
cudaError_t attend_in_bulk(const CudaAttention& c, const Arguments& a, int row_tiles,
                           const dim3& grid, const CudaDevice& device, cudaStream_t stream);

}  // namespace zerotuning::attention::decoding
