// Writes the encoded key mask on the host (encode_key_mask.h).
#include "ops/cpu/encode_key_mask.h"

#include <algorithm>

#include "attention/key_mask_layout.h"

namespace zerotuning::ops {

Tensor encode_key_mask_cpu(const Tensor& key_mask, int64_t keys, int64_t query_start) {
  using Layout = attention::KeyMaskLayout;
  check_key_mask_to_encode(key_mask, keys);
  const Tensor mask = aten::contiguous(key_mask);
  const int64_t batch = mask.size(0), length = std::min(mask.size(1), keys);
  const int64_t width = Layout::header + Layout::words(keys);
  const Tensor result = aten::empty(mask, Sizes{batch, 1, width, 1}, ScalarType::Long);
  for (int64_t b = 0; b < batch; ++b) {
    const bool* real = static_cast<const bool*>(mask.const_data_ptr()) + b * mask.size(1);
    int64_t* encoded = result.mutable_data_ptr<int64_t>() + b * width;
    bool* key_bytes = reinterpret_cast<bool*>(encoded + Layout::header);
    std::fill(std::copy_n(real, length, key_bytes), reinterpret_cast<bool*>(encoded + width),
              false);
    const int64_t first = std::find(real, real + length, true) - real;
    const int64_t initial = first < length ? first : 0;
    encoded[Layout::query_start] = query_start;
    encoded[Layout::first_scaled_key] = initial;
    encoded[Layout::end_of_scaled_keys] = initial + 1;
  }
  return result;
}

}  // namespace zerotuning::ops
