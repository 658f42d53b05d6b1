// Decode attention on CUDA: few queries (1 to 16) against many keys.
#pragma once

#include "attention/cuda_arguments.h"
#include "attention/decode_route.h"

namespace zerotuning::attention {

// The keys are split over blocks. A block reads K and V once for up to 32 rows (heads of a key head
// times queries; 16 above head size 128), and the splits are merged in a fixed order. 16-bit
// dtypes, head sizes that are multiples of 8 up to 256.
int64_t decode_scratch(const CudaAttention& arguments, int32_t multiprocessors);  // bytes

// Counters in the current device's memory: the blocks of a call count the blocks that have ended,
// so that the last block merges. All counters of a set are zero before and after a call. Calls that
// may run at the same time need different sets.
constexpr int32_t decode_counter_sets = 64;
cudaError_t decode_counters(int32_t set, uint32_t*& first);

// counters: a set of decode_counters; if null, a second kernel merges the splits. route: rings or
// bulk (ops/cuda_routes.h).
cudaError_t decode(const CudaAttention& arguments, void* scratch, uint32_t* counters,
                   const CudaDevice& device, cudaStream_t stream, DecodeRoute route);

}  // namespace zerotuning::attention
