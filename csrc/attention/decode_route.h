// How the decode kernels copy K and V into shared memory (cuda_decode.h). This file includes no
// CUDA header, so that tests of the choice (ops/cuda_routes.h) need no GPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace zerotuning::attention {

enum class DecodeRoute : int64_t {
  automatic = 0,  // ops/cuda_routes.h chooses
  rings = 1,      // each warp copies tiles into a ring of its own
  bulk = 2,     // Hopper's bulk copy engine copies for the whole block: sm_90a, head size 64 or 128
  forward = 3,  // no decode kernel supports the call: a forward kernel computes it
};

// The number of keys that the queries of a sample can attend to; window: 0 = all keys.
constexpr int64_t visible_keys(int64_t queries, int64_t keys, int64_t window) {
  return window > 0 ? std::min(window + queries - 1, keys) : keys;
}

// Whether 16-bit K and V are so much larger than the level-2 cache that their eviction policy does
// not matter. Smaller K and V are loaded as the first lines to evict. This policy changes the time,
// on an H100 whose cache is full of written lines, to 0.85 with 1 x 8192 and 16 x 1024 keys, and to
// 1.03 with 16 x 8192 keys, ten times the cache.
constexpr bool exceeds_level2(int64_t batch, int64_t key_heads, int64_t visible_keys,
                              int64_t head_size, int64_t value_head_size, int64_t l2_bytes) {
  constexpr int64_t bytes = 2, times = 4;
  return bytes * batch * key_heads * visible_keys * (head_size + value_head_size) >
         times * l2_bytes;
}

}  // namespace zerotuning::attention
