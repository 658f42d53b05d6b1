// The encoding of a key mask with positions, int64 [batch, 1, header + words, 1], that the mask
// function of a patched model returns for a decode step. zerotuning/attention/mask_encoding.py
// decodes this encoding.
#pragma once

#include <cstdint>

namespace zerotuning::attention {

struct KeyMaskLayout {
  // Position of the first query among the keys; the scaled keys [first, end).
  static constexpr int64_t query_start = 0, first_scaled_key = 1, end_of_scaled_keys = 2;
  static constexpr int64_t header = 3;
  // After the header the key mask, one byte a key, padded with zeros to whole words.
  static constexpr int64_t keys_per_word = 8;

  static constexpr int64_t words(int64_t keys) {
    return (keys + keys_per_word - 1) / keys_per_word;
  }
};

}  // namespace zerotuning::attention
