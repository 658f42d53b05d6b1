// Forward attention on CPUs with AVX-512: bfloat16 on the matrix unit (AMX), float32 on vectors.
// Other processors and dtypes take torch's own kernel (ops/attention_cpu.cpp).
//
// Keys and values are packed once for each key head into the tiles that the products read; then
// tiles of queries go over them. A product's logits have queries side by side, so that the softmax
// needs nothing but vertical operations, and a key that is scaled, masked or out of sight is one
// row.
#pragma once

#include <cstdint>

#include "attention/arguments.h"

namespace zerotuning::attention {

struct FlashArguments {
  int64_t batch, heads, key_heads, queries, keys, head_size, value_head_size;
  int64_t window;  // keys that a query sees, its own included; 0 = all
  double scale;    // > 0 (DecodeKernel: any)
  Strided4<const void> query, key, value;
  Strided4<void> output;
  Strided4<void> logsumexp;  // float [batch, heads, queries, 1]
  const float* log_scale;
  int64_t log_scale_batch_stride, log_scale_head_stride;
  const bool* key_mask;        // [batch, keys] contiguous, or null
  const int64_t* span;         // [batch, 2]: scaled keys [first, end)
  const int64_t* query_start;  // [batch]: position of query row 0; query_start + queries <= keys
  void* packed;                // packed_bytes(), at a multiple of 64
};

// First pack() for all pack_items(), then attend() for all items(); both may be spread over threads
// in any way, and give the same whatever the way.
struct FlashKernel {
  int64_t (*packed_bytes)(const FlashArguments&);
  int64_t (*pack_items)(const FlashArguments&);
  void (*pack)(const FlashArguments&, int64_t begin, int64_t end);
  int64_t (*items)(const FlashArguments&);
  void (*attend)(const FlashArguments&, int64_t begin, int64_t end);
};

constexpr int64_t flash_largest_head = 256;

// Null where this processor has none for the dtype.
const FlashKernel* flash_kernel(DType dtype);

// Where there is one query, which does not repay packing: rows [begin, end) of the flattened batch
// × heads, spread over threads in any way. Neither packed nor logsumexp is used. Float16 as well.
using DecodeKernel = void (*)(const FlashArguments&, int64_t begin, int64_t end);
DecodeKernel decode_kernel(DType dtype);

}  // namespace zerotuning::attention
