// Reading key masks on the device: where the real keys lie, and encoding the key mask of a decode
// step.
#pragma once

#include "attention/cuda_arguments.h"

namespace zerotuning::attention {

// For each sample b of key_mask [batch, keys]:
//   first_key[b]: the first real key, or keys if there is none
//   end_key[b]:   the first key after it that is padding, or keys
//   past_key[b]:  one past the last real key, or 0 if there is none
// Without holes, first_key and end_key describe the whole mask.
cudaError_t find_real_keys(const bool* key_mask, int64_t batch_stride, int32_t batch, int32_t keys,
                           int32_t* first_key, int32_t* end_key, int32_t* past_key,
                           cudaStream_t stream);

// Writes the encoding of key_mask_layout.h to encoded [batch, header + words(keys)], contiguous.
// key_mask is [batch, length]; keys from `length` on are encoded as padding. The first real key of
// each sample is the scaled one, or key 0 if there is none.
cudaError_t encode_key_mask(const bool* key_mask, int64_t batch_stride, int32_t batch,
                            int32_t length, int32_t keys, int64_t query_start, int64_t* encoded,
                            cudaStream_t stream);

}  // namespace zerotuning::attention
