// Forward attention on CPUs with AVX-512: bfloat16 on the matrix unit (AMX), float32 on vectors.
// Other processors and dtypes use torch's kernel (ops/cpu/forward.cpp).
//
// Keys and values are packed once for each key head into the tiles that the products read. Then
// each tile of queries is multiplied with the packed keys and values. The logits of a product have
// queries side by side. So the softmax needs only vertical operations, and the logits of a scaled
// or masked key are one row.
#pragma once

#include <cstdint>

#include "attention/arguments.h"

namespace zerotuning::attention {

struct FlashArguments {
  int64_t batch, heads, key_heads, queries, keys, head_size, value_head_size;
  int64_t window;  // number of keys that a query attends to, its own included; 0 = all
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

// First pack() for all pack_items(), then attend() for all items(). Items may be divided among
// threads in any way; the results are the same bits.
struct FlashKernel {
  int64_t (*packed_bytes)(const FlashArguments&);
  int64_t (*pack_items)(const FlashArguments&);
  void (*pack)(const FlashArguments&, int64_t begin, int64_t end);
  int64_t (*items)(const FlashArguments&);
  void (*attend)(const FlashArguments&, int64_t begin, int64_t end);
};

constexpr int64_t flash_max_head_size = 256;

// Null if this processor has no such kernel for the dtype.
const FlashKernel* flash_kernel(DType dtype);

// Attention of one query a head, also in float16, without packing: rows [begin, end) of the
// flattened batch × heads, divided among threads in any way. The kernel does not use `packed` and
// `logsumexp`.
using DecodeKernel = void (*)(const FlashArguments&, int64_t begin, int64_t end);
DecodeKernel decode_kernel(DType dtype);

}  // namespace zerotuning::attention
