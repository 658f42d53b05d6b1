// Arguments and tile sizes of the decode kernels.
#pragma once

#include <cstdint>

#include "attention/cuda/addresses.cuh"
#include "attention/cuda/launch.cuh"
#include "attention/cuda/visibility.cuh"

namespace zerotuning::attention::decoding {

using namespace device;

constexpr int tile_keys = 16;
constexpr int tile_rows = 16;
constexpr int merge_threads = 256;  // threads of a block of merge_splits

struct Arguments {
  Strided4<const void> query, key, value;
  CudaGeometry geometry;
  const float* log_scale;
  int64_t log_scale_batch_stride, log_scale_head_stride;
  Strided4<void> output;
  Strided4<void> logsumexp;  // data may be null
  float* split_output;       // [batch, heads, queries, splits, value_head_size], if splits > 1
  float* split_logsumexp;    // [batch, heads, queries, splits], base 2
  uint32_t* arrivals;        // [batch, key heads, row_groups], zeros; null if merge_splits follows
  int heads, group, queries, keys, head_size, value_head_size;
  int rows;        // of a key head: group * queries, queries innermost
  int row_groups;  // blocks that share a key head's rows
  int splits;      // blocks that share a key head's keys
  float scale_log2;
  bool evict_first;  // K and V leave the level-2 cache before other data
};

// 16 rows of queries, keys or values in shared memory.
template <int size>
struct Tile {
  static constexpr int chunks = size / 8;  // of 16 bytes
  // An odd number of chunks: the eight rows that ldmatrix reads at once lie in different banks.
  static constexpr int row_bytes = (chunks + 1) * 16;
  static constexpr int bytes = tile_keys * row_bytes;
};

// Launches the kernel of hopper/decode.cu. row_tiles is 1 or 2.
cudaError_t launch_bulk_kernel(const CudaAttention& call, const Arguments& args, int row_tiles,
                               const dim3& grid, const CudaDevice& device, cudaStream_t stream);

}  // namespace zerotuning::attention::decoding
