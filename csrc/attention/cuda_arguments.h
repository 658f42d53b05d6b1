// Arguments of the CUDA kernels: raw device pointers, sizes and strides, no framework.
//
// The launchers of each family of kernels are declared in cuda_forward.h, cuda_backward.h,
// cuda_initial_token.h, cuda_decode.h and cuda_key_mask.h. Every launcher enqueues its kernels on
// `stream` of the current device, copies nothing back to the host, and returns cudaGetLastError()
// after each launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "attention/arguments.h"

namespace zerotuning::attention {

constexpr int32_t max_devices = 64;

// The GPU that a call runs on.
struct CudaDevice {
  int32_t multiprocessors;
  int32_t capability;                  // compute capability: 90 for sm_90
  int32_t max_shared_bytes_per_block;  // with cudaFuncAttributeMaxDynamicSharedMemorySize
  int32_t l2_bytes;                    // size of the level-2 cache
  int32_t compiled_capability;         // as compiled_capability_of_kernels returns it
  int32_t index;                       // of the device, below max_devices

  // Whether a kernel may be launched while its predecessor runs (programmatic dependent launch).
  // Only kernels that are compiled for sm_90 or later wait for their predecessor themselves.
  bool supports_dependent_launch() const { return compiled_capability >= 90; }
};

// Finds the compute capability that the kernels chosen for the current device were compiled for.
// This capability is lower than the device's capability if the build has only PTX of an older
// architecture.
cudaError_t compiled_capability_of_kernels(int32_t& capability);

// The mask of a call and the keys whose logits are scaled. The kernels read the arrays on the
// device, so that a captured CUDA graph follows their contents. Positions outside the keys are
// clamped: a kernel cannot report an error.
struct CudaGeometry {
  const bool* key_mask;  // [batch, keys], unit stride in keys, or null: no padding
  int64_t key_mask_batch_stride;
  const int64_t* span;  // [batch, 2]: scaled keys [first, end), or null: the first real key
  int64_t span_batch_stride, span_stride;
  const int64_t* query_start;  // [batch]: position of query row 0, or null: keys - queries
  int64_t query_start_stride;
  // [batch] each: results of find_real_keys, or null: 0, keys and keys.
  const int32_t* first_key;
  const int32_t* end_key;
  const int32_t* past_key;
  int32_t window;  // number of keys that a query may attend to, its own included; 0 = all
};

// One call of attention. Every array has unit stride in its last dimension.
struct CudaAttention {
  DType dtype;  // of query, key, value and output
  int32_t batch, heads, key_heads, queries, keys, head_size, value_head_size;
  double scale;
  CudaGeometry geometry;
  Strided4<const void> query, key, value;
  const void* log_scale;  // [batch, heads]; float64 for float64, else float32
  int64_t log_scale_batch_stride, log_scale_head_stride;  // batch stride 0: one vector [heads]
  // Forward's results. For backward, CudaAttentionGradients has these arrays.
  Strided4<void> output;  // [batch, heads, queries, value_head_size]
  // [batch, heads, queries, 1], natural logarithm, dtype of log_scale; data may be null.
  Strided4<void> logsumexp;
  // output - v of the first scaled key, like output; data may be null. Where that key has nearly
  // all of the weight, this difference is lost in the rounding of a 16-bit output. Rows that attend
  // to no key hold unspecified numbers.
  Strided4<void> output_minus_initial_value;
};

struct CudaAttentionGradients {
  // Forward's results; output_minus_initial_value.data is null if forward did not compute it.
  Strided4<const void> output, logsumexp, output_minus_initial_value;
  Strided4<const void> grad_output;
  Strided4<void> grad_query, grad_key, grad_value;
  void* grad_log_scale;  // [heads], or [batch, heads] if log_scale is; contiguous
  void* scratch;         // as many bytes as the launcher's *_scratch function returns
};

}  // namespace zerotuning::attention
