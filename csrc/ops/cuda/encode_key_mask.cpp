// zerotuning::_encode_key_mask on a GPU.
#include "attention/cuda_key_mask.h"
#include "attention/key_mask_layout.h"
#include "ops/attention_cuda.h"
#include "ops/cuda/call.h"

namespace zerotuning::ops {

using cuda::check;
using cuda::current_stream;

Tensor encode_key_mask_cuda(const Tensor& key_mask, int64_t keys, int64_t query_start) {
  using Layout = attention::KeyMaskLayout;
  check_key_mask_to_encode(key_mask, keys);
  const int64_t batch = key_mask.size(0), length = std::min(key_mask.size(1), keys);
  const torch::stable::accelerator::DeviceGuard guard(key_mask.get_device_index());
  const Tensor mask = key_mask.stride(1) == 1 ? key_mask : aten::clone_contiguous(key_mask);
  const Sizes sizes{batch, 1, Layout::header + Layout::words(keys), 1};
  const Tensor encoded = aten::empty(mask, sizes, ScalarType::Long);
  if (batch == 0) return encoded;
  check(attention::encode_key_mask(static_cast<const bool*>(mask.const_data_ptr()), mask.stride(0),
                                   static_cast<int32_t>(batch), static_cast<int32_t>(length),
                                   static_cast<int32_t>(keys), query_start,
                                   encoded.mutable_data_ptr<int64_t>(),
                                   current_stream(mask.get_device_index())),
        "key_mask");
  return encoded;
}

}  // namespace zerotuning::ops
