// Attention of one query a head to the keys of a cache, on CPUs with AVX-512. Other processors and
// float64 take torch's own kernel (ops/attention_cpu.cpp).
#pragma once

#include "attention/arguments.h"

namespace zerotuning::attention {

struct DecodeArguments {
  int64_t batch, heads, heads_per_key_head, keys, head_size, value_head_size;
  int64_t window;  // keys that the query sees, its own included; 0 = all
  double scale;
  Array4 query, key, value;
  Array4 output;  // written
  const float* log_scale;
  int64_t log_scale_batch_stride, log_scale_head_stride;
  const bool* key_mask;        // [batch, keys] contiguous, or null
  const int64_t* span;         // [batch, 2]: scaled keys [first, end)
  const int64_t* query_start;  // [batch]: position of the query, below `keys`
};

// Rows [begin, end) of the flattened batch × heads, which may be spread over threads in any way.
using DecodeKernel = void (*)(const DecodeArguments&, int64_t begin, int64_t end);

constexpr int64_t decode_largest_head = 256;

// Null where this processor has none for the dtype.
DecodeKernel decode_kernel(DType dtype);

}  // namespace zerotuning::attention
