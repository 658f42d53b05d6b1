// Which keys a query may attend to, and which keys are scaled: CudaGeometry for one sample.
//
// Key j is visible to the query at position p if
//   j < keys,  j <= p (causal),  j > p - window (if there is a window),  key_mask[j] (if given)
#pragma once

#include <cstdint>

#include "attention/cuda_arguments.h"

namespace zerotuning::attention::device {

__device__ __forceinline__ int clamped(int64_t x, int low, int high) {
  return static_cast<int>(x < low ? low : x > high ? high : x);
}

// CudaGeometry of one sample, clamped to its keys.
struct SampleGeometry {
  const bool* key_mask;      // of the sample, or null
  int first_key;             // all keys before first_key are padding
  int past_key;              // all keys from past_key on are padding
  int start;                 // position of query row 0
  int span_begin, span_end;  // the scaled keys
};

__device__ __forceinline__ SampleGeometry sample_geometry(const CudaGeometry& g, int sample,
                                                          int queries, int keys) {
  SampleGeometry s;
  s.key_mask = g.key_mask ? g.key_mask + sample * g.key_mask_batch_stride : nullptr;
  s.first_key = g.first_key ? clamped(g.first_key[sample], 0, keys) : 0;
  s.past_key = g.past_key ? clamped(g.past_key[sample], 0, keys) : keys;
  const int latest = max(keys - queries, 0);
  s.start =
      g.query_start ? clamped(g.query_start[sample * g.query_start_stride], 0, latest) : latest;
  if (g.span) {
    const int64_t* span = g.span + sample * g.span_batch_stride;
    s.span_begin = clamped(span[0], 0, keys);
    s.span_end = clamped(span[g.span_stride], s.span_begin, keys);
  } else {
    s.span_begin = s.first_key;
    s.span_end = min(s.span_begin + 1, keys);
  }
  return s;
}

struct Visibility : SampleGeometry {
  int window, keys;

  __device__ __forceinline__ bool is_visible(int key, int position) const {
    return key < keys && key <= position && (!window || key > position - window) &&
           (!key_mask || key_mask[key]);
  }
  __device__ __forceinline__ bool is_scaled(int key) const {
    return key >= span_begin && key < span_end;
  }
};

__device__ __forceinline__ Visibility visibility_of(const CudaAttention& call, int sample) {
  return {sample_geometry(call.geometry, sample, call.queries, call.keys), call.geometry.window,
          call.keys};
}

}  // namespace zerotuning::attention::device
