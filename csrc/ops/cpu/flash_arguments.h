// The arguments of our own CPU kernels (attention/flash_cpu.h).
#pragma once

#include "attention/flash_cpu.h"
#include "ops/cpu/pieces.h"

namespace zerotuning::ops::cpu {

// All arguments but `logsumexp` and `packed`, which the decode kernel does not use. query, key,
// value and output have unit stride in the last dimension.
inline attention::FlashArguments flash_arguments(const Problem& p, const Geometry& geometry,
                                                 const Tensor& query, const Tensor& key,
                                                 const Tensor& value, const Tensor& output) {
  return {
      .batch = p.batch,
      .heads = p.heads,
      .key_heads = p.key_heads,
      .queries = p.queries,
      .keys = p.keys,
      .head_size = p.head_size,
      .value_head_size = p.value_head_size,
      .window = p.window,
      .scale = p.scale,
      .query = const_array(query),
      .key = const_array(key),
      .value = const_array(value),
      .output = mutable_array(output),
      .logsumexp = {},
      .log_scale = p.log_scale.const_data_ptr<float>(),
      .log_scale_batch_stride = p.log_scale_per_sample() ? p.log_scale.stride(0) : 0,
      .log_scale_head_stride = p.log_scale.stride(p.log_scale.dim() - 1),
      .key_mask = geometry.key_mask,
      .span = geometry.span.data(),
      .query_start = geometry.query_start.data(),
      .packed = nullptr,
  };
}

}  // namespace zerotuning::ops::cpu
