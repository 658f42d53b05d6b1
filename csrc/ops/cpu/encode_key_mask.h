// The operator _encode_key_mask on the CPU: a decode step's attention mask in the encoding of
// attention/key_mask_layout.h.
#pragma once

#include "ops/problem.h"

namespace zerotuning::ops {

// key_mask: bool [B, any number]; keys beyond its columns are padding. The first real key of each
// sample is scaled, or key 0 if the sample has no real key.
Tensor encode_key_mask_cpu(const Tensor& key_mask, int64_t keys, int64_t query_start);

}  // namespace zerotuning::ops
