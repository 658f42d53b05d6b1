// Copies of the decode kernels: from global to shared memory, and from shared memory to registers.
#pragma once

#include "attention/cuda/decode/arguments.cuh"

namespace zerotuning::attention::decoding {

// A policy of the level-2 cache for the data that a copy reads.
__device__ __forceinline__ uint64_t cache_policy(bool evict_first) {
  uint64_t policy;
  if (evict_first) {
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
  } else {
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0;" : "=l"(policy));
  }
  return policy;
}

// Copies 16 bytes asynchronously, or writes 16 zero bytes if the source does not exist.
__device__ __forceinline__ void copy_chunk(uint32_t to, const void* from, bool exists,
                                           uint64_t policy) {
  asm volatile(
      "cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(to),
      "l"(from), "r"(exists ? 16 : 0), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most `pending` committed groups of the thread's copies are running.
template <int pending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Copies the block's rows of queries; rows and columns that do not exist are zeros.
template <int size, int rows>
__device__ __forceinline__ void copy_query(const Arguments& args, int batch, int key_head,
                                           int first_row, uint32_t to, uint64_t policy) {
  const uint16_t* base = row_of<uint16_t>(args.query, batch, 0, 0);
  for (int i = threadIdx.x; i < rows * Tile<size>::chunks; i += blockDim.x) {
    const int tile_row = i / Tile<size>::chunks, chunk = i % Tile<size>::chunks;
    const int row = first_row + tile_row;
    const bool exists = row < args.rows && chunk * 8 < args.head_size;
    const int64_t head = key_head * args.group + row / args.queries, query = row % args.queries;
    copy_chunk(
        to + tile_row * Tile<size>::row_bytes + chunk * 16,
        exists ? base + head * args.query.head_stride + query * args.query.row_stride + chunk * 8
               : base,
        exists, policy);
  }
}

// Reads four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&m)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}

// Where a lane reads matrices of a tile in shared memory (see load_matrices), relative to the tile.
struct LaneAddresses {
  uint32_t left;   // of the left operand, and of a right operand that is transposed in loading
  uint32_t right;  // of a right operand stored by its columns
};

template <int size>
__device__ __forceinline__ LaneAddresses lane_addresses() {
  const uint32_t lane = threadIdx.x % 32, row = lane % 8, matrix = lane / 8;
  return {(row + matrix % 2 * 8) * Tile<size>::row_bytes + matrix / 2 * 16,
          (row + matrix / 2 * 8) * Tile<size>::row_bytes + matrix % 2 * 16};
}

}  // namespace zerotuning::attention::decoding
