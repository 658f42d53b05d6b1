// The CUDA kernels' arguments and launchers: raw device pointers, sizes, strides and a stream, no
// framework. Every launcher enqueues on `stream` of the current device, reads nothing back, and
// returns cudaGetLastError().
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "attention/arguments.h"

namespace zerotuning::attention {

constexpr int32_t most_devices = 64;

// The card that calls run on.
struct CudaDevice {
  int32_t multiprocessors, capability;  // capability: 90 for sm_90
  int32_t block_bytes, level2_bytes;    // a block's most shared memory; the level-2 cache
  int32_t built_for;                    // as kernels_built_for says
  int32_t index;                        // below most_devices

  // Whether a kernel may start before the one before it ends, since it is compiled to wait for it.
  bool starts_early() const { return built_for >= 90; }
};
// The capability that those of the kernels which run on the current device were compiled for: less
// than the device's own where a build has only PTX for older ones.
cudaError_t kernels_built_for(int32_t& capability);

// What each sample's queries see and which keys are scaled, read on the device, so that a captured
// CUDA graph follows it. Values outside the keys are clamped to them: nothing can be reported.
struct CudaGeometry {
  const bool* key_mask;  // [batch, keys], unit stride in keys, or null: every key is real
  int64_t key_mask_batch_stride;
  const int64_t* span;  // [batch, 2]: scaled keys [first, end), or null: the first real key
  int64_t span_batch_stride, span_stride;
  const int64_t*
      query_start;  // [batch]: position of query row 0 among the keys, or null: keys - queries
  int64_t query_start_stride;
  const int32_t* first_key;  // [batch]: find_real_keys' results, or null: 0, keys and keys
  const int32_t* end_key;
  const int32_t* past_key;
  int32_t window;  // keys that a query sees, its own included; 0 = all
};

// One attention call. Arrays as in Array4 (unit stride in the last dimension).
struct CudaAttention {
  DType dtype;  // of query, key, value and output
  int32_t batch, heads, key_heads, queries, keys, head_size, value_head_size;
  double scale;
  CudaGeometry geometry;
  Array4 query, key, value;
  const void*
      log_scale;  // float64 for float64, else float32; batch stride 0 for one [heads] vector
  int64_t log_scale_batch_stride, log_scale_head_stride;
  Array4 output;     // [batch, heads, queries, value_head_size]: written forward, read backward
  Array4 logsumexp;  // [batch, heads, queries], natural logarithm, type of log_scale; row_stride =
                     // stride of queries. Written forward (data may be null: not wanted), read
                     // backward
  // output - the first scaled key's value, of which rounding the output leaves nothing where that
  // key has all the weight. As output; data may be null: not wanted, not kept. Rows that see no key
  // hold some number.
  Array4 output_minus_initial_value;
};

struct CudaAttentionGradients {
  Array4 grad_output;                       // read
  Array4 grad_query, grad_key, grad_value;  // written
  void* grad_log_scale;  // [heads], or [batch, heads] where log_scale is; contiguous
  void* scratch;         // of the size that the launcher's *_scratch function says
};

// Whether rows of query, key, value and output can be read and written 16 bytes at a time.
inline bool has_16_byte_rows(const CudaAttention& c) {
  const auto fits = [](const Array4& array, int64_t batch, int64_t heads, int64_t rows) {
    const auto stride_fits = [](int64_t stride, int64_t size) {
      return size == 1 || (stride > 0 && stride % 8 == 0);
    };
    return reinterpret_cast<uintptr_t>(array.data) % 16 == 0 &&
           stride_fits(array.batch_stride, batch) && stride_fits(array.head_stride, heads) &&
           stride_fits(array.row_stride, rows);
  };
  return (c.dtype == DType::bfloat16 || c.dtype == DType::float16) && c.head_size % 8 == 0 &&
         c.value_head_size % 8 == 0 && fits(c.query, c.batch, c.heads, c.queries) &&
         fits(c.key, c.batch, c.key_heads, c.keys) && fits(c.value, c.batch, c.key_heads, c.keys) &&
         fits(c.output, c.batch, c.heads, c.queries);
}

// first_key[b]: the first real key, or keys if there is none; end_key[b]: the first key after it
// that is not real, or keys; past_key[b]: the key after the last real one, or 0. Without holes the
// first two are all of key_mask.
cudaError_t find_real_keys(const bool* key_mask, int64_t batch_stride, int32_t batch, int32_t keys,
                           int32_t* first_key, int32_t* end_key, int32_t* past_key,
                           cudaStream_t stream);

// words: [batch, step.header + step.key_words]. Keys from `length` on are not in key_mask: not
// real.
cudaError_t pack_step_words(const bool* key_mask, int64_t batch_stride, int32_t batch,
                            int32_t length, const StepWords& step, int64_t* words,
                            cudaStream_t stream);

// Any dtype, head size up to 256, length and geometry, without tensor cores: float32 arithmetic
// (float64 for float64). The exact route, and what the fast ones are compared with.
cudaError_t attention_plain(const CudaAttention& arguments, cudaStream_t stream);
int64_t attention_backward_plain_scratch(const CudaAttention& arguments);  // bytes
cudaError_t attention_backward_plain(const CudaAttention& arguments,
                                     const CudaAttentionGradients& gradients, cudaStream_t stream);

// Gradients of query by a stock kernel that left the initial token's key out, or that had the
// second key in its place as well (double_second_key).
struct StockGradients {
  Array4 query;  // may be grad_query itself
  bool second_key_doubled;
};

// The stock kernel's key and value rows: the call's, with those of the second key in the place of
// the initial token's. So it reads whole tiles from where they begin, no weight is larger than 1
// (that of the initial token's own row is not used), and what it says of a key 0 is that of key 1:
// a part of grad_query that initial_token_backward takes away.
cudaError_t double_second_key(const CudaAttention& arguments, const Array4& key,
                              const Array4& value, cudaStream_t stream);

// The gradients of all keys, from those of the others and the initial token's part (key 0): with
// a = exp(scale q·k_0 + log_scale - lse), ds = a (do·v_0 - do·o), of the output_minus_initial_value
// where it was kept:
//   grad_query = stock.query + scale ds k_0;  grad_key[0] = sum scale ds q;
//   grad_value[0] = sum a do;  grad_log_scale = sum ds.                       (design.md section 4)
// Other rows of grad_key and grad_value are the stock kernel's already. The scaled key is the only
// one of its sample's span; what the stock kernel says of it does not count. 16-bit dtypes. The
// sums are made in a fixed order.
int64_t initial_token_backward_scratch(const CudaAttention& arguments);  // bytes
cudaError_t initial_token_backward(const CudaAttention& arguments,
                                   const CudaAttentionGradients& gradients,
                                   const StockGradients& stock, const CudaDevice& device,
                                   cudaStream_t stream);

// For a stock kernel that takes an additive bias [batch, 1, 1, keys] of the query's 16-bit dtype:
// -inf for padding and for the first real key, else 0. Contiguous.
cudaError_t exclusion_bias(const CudaAttention& arguments, void* bias, cudaStream_t stream);
// -inf becomes +inf: of rows that see no key, exp(logit - logsumexp) is then 0, not NaN.
cudaError_t negate_minus_infinity(float* values, int64_t count, cudaStream_t stream);

// Merges the initial token into a stock kernel's attention over the other keys, row by row:
//   s = scale q·k_0 + log_scale;  m = max(s, lse);  o = (e^{s-m} v_0 + e^{lse-m} o) / (e^{s-m} +
//   e^{lse-m})
// `part` and `part_logsumexp` hold rows first_row, first_row + 1, ... of the result (rows before
// them see the initial token only). 16-bit dtypes, one pass, 16-byte accesses.
cudaError_t initial_token_merge(const CudaAttention& arguments, const Array4& part,
                                const Array4& part_logsumexp, int32_t first_row,
                                const CudaDevice& device, cudaStream_t stream);

// Few queries (1 to 16) against many keys: split over keys, the query heads of a key head packed on
// one read of K and V (of up to 32 rows, heads times queries; 16 above head size 128); the splits
// are merged in a fixed order. 16-bit dtypes, head sizes that are multiples of 8 up to 256.
bool decode_takes(const CudaAttention& arguments);
int64_t decode_scratch(const CudaAttention& arguments, int32_t multiprocessors);  // bytes

// How K and V come into shared memory. `bulk` is for caches that flood level 2: sm_90a, head sizes
// 64 and 128.
enum class DecodeRoute : int64_t {
  automatic = 0,
  rings = 1,  // each warp copies its own tiles
  bulk = 2,   // the bulk copy engine copies those of all
};
bool decode_bulk_takes(const CudaAttention& arguments);
// counters: a set of the current device's that no call uses which may run at the same time; the
// call leaves it as it was. Null: none, at the price of a second kernel.
constexpr int32_t decode_counter_sets = 64;
cudaError_t decode_counters(int32_t set, uint32_t*& first);
cudaError_t decode(const CudaAttention& arguments, void* scratch, uint32_t* counters,
                   const CudaDevice& device, cudaStream_t stream,
                   DecodeRoute route = DecodeRoute::automatic);

// Tensor cores of Hopper (sm_90a): bfloat16 or float16, head sizes up to 256 (multiples of 8),
// strides and pointers that are multiples of 16 bytes; any geometry.
bool hopper_takes(const CudaAttention& arguments);
cudaError_t attention_hopper(const CudaAttention& arguments, int32_t multiprocessors,
                             cudaStream_t stream);
// Its backward. The same from run to run.
constexpr int32_t largest_hopper_backward_head = 128;
bool hopper_backward_takes(const CudaAttention& arguments);
int64_t attention_backward_hopper_scratch(const CudaAttention& arguments);  // bytes
cudaError_t attention_backward_hopper(const CudaAttention& arguments,
                                      const CudaAttentionGradients& gradients,
                                      int32_t multiprocessors, cudaStream_t stream);

}  // namespace zerotuning::attention
