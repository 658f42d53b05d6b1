// Key masks on the device: the positions of their real keys, and the encoding of a decode step's
// key mask.
#pragma once

#include "attention/cuda_arguments.h"

namespace zerotuning::attention {

// For each sample b of key_mask [batch, keys]:
//   first_key[b]: the first real key, or keys if the sample has none
//   end_key[b]:   the first padding key after first_key[b], or keys
//   past_key[b]:  one past the last real key, or 0 if the sample has none
// Without holes, first_key and end_key describe the whole mask.
cudaError_t find_real_keys(const bool* key_mask, int64_t batch_stride, int32_t batch, int32_t keys,
                           int32_t* first_key, int32_t* end_key, int32_t* past_key,
                           cudaStream_t stream);

// Writes the encoding of key_mask_layout.h to encoded [batch, header + words(keys)], contiguous.
// key_mask is [batch, length]; keys from `length` on are encoded as padding. The first real key of
// each sample is scaled, or key 0 if the sample has no real key.
cudaError_t encode_key_mask(const bool* key_mask, int64_t batch_stride, int32_t batch,
                            int32_t length, int32_t keys, int64_t query_start, int64_t* encoded,
                            cudaStream_t stream);

}  // namespace zerotuning::attention
