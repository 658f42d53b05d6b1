// How the decode kernels copy K and V into shared memory (cuda_decode.h). No CUDA header, so that
// the choice is tested where there is no GPU (ops/cuda_routes.h).
#pragma once

#include <algorithm>
#include <cstdint>

namespace zerotuning::attention {

enum class DecodeRoute : int64_t {
  automatic = 0,  // ops/cuda_routes.h chooses
  rings = 1,      // each warp copies its own tiles into a ring of its own
  bulk = 2,     // Hopper's bulk copy engine copies for the whole block: sm_90a, head size 64 or 128
  forward = 3,  // no decode kernel supports the call: a forward kernel computes it
};

// The number of keys that the queries of a sample can attend to; window: 0 = all keys.
constexpr int64_t visible_keys(int64_t queries, int64_t keys, int64_t window) {
  return window > 0 ? std::min(window + queries - 1, keys) : keys;
}

// Whether 16-bit K and V are so much larger than the level-2 cache that it does not matter what
// they evict. Smaller ones should be evicted first themselves: on an H100 whose cache is full of
// written lines, 1 x 8192 and 16 x 1024 keys then take 0.85 of the time; 16 x 8192, ten times the
// cache, 1.03.
constexpr bool exceeds_level2(int64_t batch, int64_t key_heads, int64_t visible_keys,
                              int64_t head_size, int64_t value_head_size, int64_t l2_bytes) {
  constexpr int64_t bytes = 2, times = 4;
  return bytes * batch * key_heads * visible_keys * (head_size + value_head_size) >
         times * l2_bytes;
}

}  // namespace zerotuning::attention
