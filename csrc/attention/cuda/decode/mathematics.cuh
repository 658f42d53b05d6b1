// Mathematics of the decode kernels: products, log_scale, the mask, the online softmax of a warp.
//
// For a tile of 16 keys, with the running row_max m, row_sum l and output O of a row:
//   S = scale Q K^T + log_scale for scaled keys, -inf for keys that are not visible  (in base 2)
//   m' = max(m, max S);  r = 2^(m - m');  P = 2^(S - m');  l = r l + Σ P;  O = r O + P V
// Of a 16 x 8 result of the tensor cores, a thread holds columns 2 (lane % 4) + {0, 1} of the rows
// lane / 4 and lane / 4 + 8, at [2 (row half) + column].
#pragma once

#include <cmath>
#include <type_traits>

#include "attention/cuda/addresses.cuh"
#include "attention/cuda/decode/copies.cuh"
#include "attention/cuda/numbers.cuh"

namespace zerotuning::attention::decoding {

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

// The geometry of a sample, and the range of keys that any of its queries may attend to.
struct VisibleRange : SampleGeometry {
  int begin, end;
};

__device__ __forceinline__ VisibleRange visible_range(const Arguments& args, int batch) {
  const SampleGeometry s = sample_geometry(args.geometry, batch, args.queries, args.keys);
  const int window = args.geometry.window;
  return {s, window ? max(s.first_key, s.start - window + 1) : s.first_key,
          min(s.start + args.queries, args.keys)};
}

// The rows of which a thread holds numbers, two in each tile of rows.
template <int row_tiles>
struct LaneRows {
  int query[row_tiles][2];
  float log_scale[row_tiles][2];  // base 2
};

template <int row_tiles>
__device__ __forceinline__ LaneRows<row_tiles> lane_rows(const Arguments& args, int batch,
                                                         int key_head, int first_row) {
  LaneRows<row_tiles> rows;
#pragma unroll
  for (int tile = 0; tile < row_tiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int lane_row = static_cast<int>(threadIdx.x % 32 / 4) + half * 8;
      const int row = min(first_row + tile * tile_rows + lane_row, args.rows - 1);
      const int64_t head = key_head * args.group + row / args.queries;
      rows.query[tile][half] = row % args.queries;
      rows.log_scale[tile][half] = log_scale_of<float>(args, batch, head) * log2_e;
    }
  }
  return rows;
}

// Bit j is set if key first + j of a tile is padding.
__device__ __forceinline__ uint32_t padding_bits_of_tile(const VisibleRange& v, int first) {
  const bool* mask = v.key_mask + first;
  uint32_t real = 0;
  if (first + tile_keys <= v.end && reinterpret_cast<uintptr_t>(mask) % 8 == 0) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // The product gathers eight bytes of 0 or 1 as the bits of its highest byte.
      const uint64_t bytes = reinterpret_cast<const uint64_t*>(mask)[half];
      real |= static_cast<uint32_t>(bytes * 0x0102040810204080 >> 56) << half * 8;
    }
  } else {
#pragma unroll
    for (int i = 0; i < tile_keys; ++i) {
      real |= static_cast<uint32_t>(first + i >= v.end || mask[i]) << i;
    }
  }
  return real ^ 0xffff;
}

// The padding of a warp's tiles. The mask is read for 32 tiles at once, one tile a lane, since the
// warp waits for each read (on an H100 1 x 32768 keys with a mask whose rows are aligned in 60 us,
// not 65).
struct PaddingMask {
  static constexpr int tiles = 32;
  uint32_t lane_tile = 0;

  // Reads the mask of `count` tiles (at most 32 are used), whose first keys are `step` keys apart.
  __device__ __forceinline__ void read(const VisibleRange& v, int first, int step, int count) {
    const int lane = threadIdx.x % 32;
    lane_tile = lane < count ? padding_bits_of_tile(v, first + lane * step) : 0;
  }
  __device__ __forceinline__ uint32_t padding_bits(int tile) const {
    return __shfl_sync(~0u, lane_tile, tile % tiles);
  }
};

// A warp's sums over the keys of its tiles so far.
template <int size, int row_tiles>
struct Accumulators {
  float output[row_tiles][size / 8][4];
  float row_max[row_tiles][2];  // of the logits, base 2
  float row_sum[row_tiles][2];  // of the weights in the thread's own columns

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int tile = 0; tile < row_tiles; ++tile) {
#pragma unroll
      for (int i = 0; i < size / 2; ++i) output[tile][i / 4][i % 4] = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        row_max[tile][half] = -INFINITY;
        row_sum[tile][half] = 0;
      }
    }
  }
};

template <int row_tiles>
using Logits = float[row_tiles][2][4];  // of 16 keys: two 16 x 8 results side by side

// Multiplies the products Q K^T by scale (in base 2), adds log_scale to the logits of scaled keys,
// and replaces the logits of keys that are not visible by -inf.
template <int row_tiles>
__device__ __forceinline__ void apply_scale_and_mask(const Arguments& args, const VisibleRange& v,
                                                     const LaneRows<row_tiles>& rows, int first,
                                                     uint32_t padding_bits,
                                                     Logits<row_tiles>& logits) {
  const int window = args.geometry.window;
  const bool has_scaled = first < v.span_end && first + tile_keys > v.span_begin;
  const bool has_edge =
      first + tile_keys - 1 > v.start || (window && first <= v.start + args.queries - 1 - window);
#pragma unroll
  for (int tile = 0; tile < row_tiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 8; ++i) logits[tile][i / 4][i % 4] *= args.scale_log2;
  }
  if (!has_scaled && !has_edge && !padding_bits) return;
#pragma unroll
  for (int tile = 0; tile < row_tiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& logit = logits[tile][i / 4][i % 4];
      const int offset = i / 4 * 8 + static_cast<int>(threadIdx.x % 4) * 2 + i % 2;
      const int key = first + offset, half = i % 4 / 2;
      const int position = v.start + rows.query[tile][half];
      if (key >= v.span_begin && key < v.span_end) logit += rows.log_scale[tile][half];
      const bool is_visible = key <= position && key < v.end &&
                              !(window && key <= position - window) &&
                              !(padding_bits >> offset & 1);
      if (!is_visible) logit = -INFINITY;
    }
  }
}

// One step of the online softmax over `tiles` tiles of keys: logits become weights, earlier sums
// are rescaled.
template <int size, int row_tiles, int tiles>
__device__ __forceinline__ void softmax_step(Logits<row_tiles> (&logits)[tiles],
                                             Accumulators<size, row_tiles>& sums) {
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
      float new_max = largest(0);
#pragma unroll
      for (int tile = 1; tile < tiles; ++tile) new_max = fmaxf(new_max, largest(tile));
      float& row_max = sums.row_max[row_tile][half];
      float& row_sum = sums.row_sum[row_tile][half];
      new_max = fmaxf(row_max, quad_max(new_max));
      const float offset = softmax_offset(new_max);
      const float rescale = exp2_fast(row_max - offset);
      row_max = new_max;
      row_sum *= rescale;
#pragma unroll
      for (int tile = 0; tile < tiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) logit(tile, i) = exp2_fast(logit(tile, i) - offset);
        row_sum += (logit(tile, 0) + logit(tile, 1)) + (logit(tile, 2) + logit(tile, 3));
      }
#pragma unroll
      for (int n = 0; n < size / 8; ++n) {
        sums.output[row_tile][n][2 * half] *= rescale;
        sums.output[row_tile][n][2 * half + 1] *= rescale;
      }
    }
  }
}

// The queries as left operands. The queries stay in registers if there are enough registers for the
// sums too. Otherwise each step loads the queries from shared memory again.
template <int size, int row_tiles>
struct Queries {
  static constexpr bool in_registers = size * row_tiles <= 128;
  uint32_t address;
  uint32_t operands[in_registers ? size / 16 : 1][row_tiles][4];

  __device__ __forceinline__ void load(uint32_t lane_address) {
    address = lane_address;
    if constexpr (in_registers) {
#pragma unroll
      for (int k = 0; k < size / 16; ++k) {
#pragma unroll
        for (int tile = 0; tile < row_tiles; ++tile) read(operands[k][tile], k, tile);
      }
    }
  }
  __device__ __forceinline__ void read(uint32_t (&left)[4], int k, int tile) const {
    load_matrices(left, address + tile * tile_rows * Tile<size>::row_bytes + k * 32);
  }
};

// Q K^T of 16 keys. `address(k)` is where the lane reads columns 16 k to 16 k + 15 of the keys.
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
        multiply_add<T>(logits[tile][0], queries.operands[k][tile], keys[0], keys[1]);
        multiply_add<T>(logits[tile][1], queries.operands[k][tile], keys[2], keys[3]);
      } else {
        uint32_t left[4];
        queries.read(left, k, tile);
        multiply_add<T>(logits[tile][0], left, keys[0], keys[1]);
        multiply_add<T>(logits[tile][1], left, keys[2], keys[3]);
      }
    }
  }
}

// O += P V of 16 keys. `address(n)` is where the lane reads columns 16 n to 16 n + 15 of the
// values.
template <typename T, int size, int row_tiles, typename Address>
__device__ __forceinline__ void add_values(const Logits<row_tiles>& weights, const Address& address,
                                           Accumulators<size, row_tiles>& sums) {
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

}  // namespace zerotuning::attention::decoding
