// Hopper's PTX instructions as functions: barriers in shared memory, bulk copies, wgmma products.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <type_traits>

#include "attention/cuda/addresses.cuh"
#include "attention/cuda/numbers.cuh"

namespace zerotuning::attention::hopper {

using device::shared_address;

// Barriers in shared memory. A wait for `parity` returns once the barrier's phase of that parity is
// complete: all arrivals have come, and all expected bytes.

__device__ __forceinline__ void init_barrier(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals));
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

__device__ __forceinline__ void expect_bytes(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

__device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// A barrier among some of the block's threads: threads that wait, and threads that only arrive.
__device__ __forceinline__ void wait_named(int id, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}
__device__ __forceinline__ void arrive_named(int id, int count) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(count) : "memory");
}

// Registers are moved from the producer warpgroup to the consumers.

template <int count>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ __forceinline__ void acquire_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

// The bulk copy engine. A tensor map describes an array and the box that one instruction copies.
// The part of a box outside the array is read as zeros and is not written.

// Fetches a tensor map into the cache, so that the first copy need not wait for the map.
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void load_box(void* to, const CUtensorMap* map, uint64_t* barrier,
                                         int column, int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// A box of a five-dimensional map, whose two inner dimensions are the columns of a row.
__device__ __forceinline__ void load_rows(void* to, const CUtensorMap* map, uint64_t* barrier,
                                          int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(0), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// Contiguous memory; `bytes` is a multiple of 16.
__device__ __forceinline__ void load_bytes(void* to, const void* from, uint32_t bytes,
                                           uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

__device__ __forceinline__ void store_box(const CUtensorMap* map, const void* from, int column,
                                          int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
          map),
      "r"(shared_address(from)), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// Stores are committed in groups and read shared memory asynchronously.
__device__ __forceinline__ void commit_stores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Waits until all committed stores have read their shared memory.
__device__ __forceinline__ void wait_until_stores_have_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
// Waits until all committed stores are complete.
__device__ __forceinline__ void wait_stores() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
// Makes the thread's writes to shared memory visible to the copy engine.
__device__ __forceinline__ void fence_for_copy_engine() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Four 8 x 8 matrices from registers to shared memory; lane l gives the address of row l % 8 of
// matrix l / 8.
__device__ __forceinline__ void store_matrices(uint32_t to, uint32_t m0, uint32_t m1, uint32_t m2,
                                               uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
               "r"(m0), "r"(m1), "r"(m2), "r"(m3)
               : "memory");
}

// wgmma: matrix products of a warpgroup, which run asynchronously between commit_products and
// wait_products.

// The descriptor of a matrix in shared memory that lies in blocks of 64 columns (128 bytes),
// swizzled by 128 bytes. stride_bytes: from 8 rows to the next 8. leading_bytes: from one block of
// 64 columns to the next, if the matrix is read transposed (N contiguous); ignored if it is read by
// rows (K contiguous).
__device__ __forceinline__ uint64_t matrix_descriptor(const void* shared, uint32_t leading_bytes,
                                                      uint32_t stride_bytes) {
  constexpr uint64_t swizzle_128_bytes = 1;
  return (shared_address(shared) & 0x3ffff) >> 4 | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32 | swizzle_128_bytes << 62;
}

// The descriptor of the same matrix, `bytes` further on.
__device__ __forceinline__ uint64_t advanced(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

// Orders earlier accesses to registers before the products that follow.
__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most `pending` committed groups of products are running.
template <int pending>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Keeps the compiler from moving accesses to registers that running products write across this
// point.
template <int count>
__device__ __forceinline__ void fence_registers(float (&registers)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// A wgmma instruction names every register of its result; these macros write the names out.
#define ZT_4(f, i) f(i), f(i + 1), f(i + 2), f(i + 3)
#define ZT_16(f, i) ZT_4(f, i), ZT_4(f, i + 4), ZT_4(f, i + 8), ZT_4(f, i + 12)
#define ZT_32(f) ZT_16(f, 0), ZT_16(f, 16)
#define ZT_64(f) ZT_32(f), ZT_16(f, 32), ZT_16(f, 48)
#define ZT_128(f) ZT_64(f), ZT_16(f, 64), ZT_16(f, 80), ZT_16(f, 96), ZT_16(f, 112)
#define ZT_RESULT(i) "+f"(d[i])
#define ZT_NAMES_32                                        \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define ZT_NAMES_64                                                  \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"           \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define ZT_NAMES_128                                                             \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"                       \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"             \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"             \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"             \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"             \
  "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"             \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111," \
  "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// d = left right, or d += left right if accumulates: left 64 x 16 in shared memory, right 16 x N in
// shared memory, stored transposed (by the rows of right^T).
#define ZT_PRODUCT(N, registers, type, accumulates_name, left_name, right_name)                    \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" accumulates_name                               \
               ", 0;\n"                                                                            \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type                     \
               " {" ZT_NAMES_##registers "}, %" left_name ", %" right_name ", p, 1, 1, 0, 0;\n}\n" \
               : ZT_##registers(ZT_RESULT)                                                         \
               : "r"(accumulates), "l"(left), "l"(right))
// d += left right: left 64 x 16 in registers, right 16 x N in shared memory, stored by its rows.
#define ZT_PRODUCT_OF_REGISTERS(N, registers, type, n0, n1, n2, n3, right_name)               \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type                \
               " {" ZT_NAMES_##registers "}, {%" n0 ",%" n1 ",%" n2 ",%" n3 "}, %" right_name \
                                         ", 1, 1, 1, 1;\n"                                    \
               : ZT_##registers(ZT_RESULT)                                                    \
               : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right))
#define ZT_DEFINE_MULTIPLY(N, registers, n0, n1, n2, n3, n4)                                    \
  template <typename T>                                                                         \
  __device__ __forceinline__ void multiply(float(&d)[registers], uint64_t left, uint64_t right, \
                                           int accumulates) {                                   \
    if constexpr (std::is_same_v<T, __half>) {                                                  \
      ZT_PRODUCT(N, registers, "f16", n0, n1, n2);                                              \
    } else {                                                                                    \
      ZT_PRODUCT(N, registers, "bf16", n0, n1, n2);                                             \
    }                                                                                           \
  }                                                                                             \
  template <typename T>                                                                         \
  __device__ __forceinline__ void multiply_add(float(&d)[registers], const uint32_t(&left)[4],  \
                                               uint64_t right) {                                \
    if constexpr (std::is_same_v<T, __half>) {                                                  \
      ZT_PRODUCT_OF_REGISTERS(N, registers, "f16", n0, n1, n2, n3, n4);                         \
    } else {                                                                                    \
      ZT_PRODUCT_OF_REGISTERS(N, registers, "bf16", n0, n1, n2, n3, n4);                        \
    }                                                                                           \
  }
ZT_DEFINE_MULTIPLY(64, 32, "32", "33", "34", "35", "36")
ZT_DEFINE_MULTIPLY(128, 64, "64", "65", "66", "67", "68")
ZT_DEFINE_MULTIPLY(256, 128, "128", "129", "130", "131", "132")
#undef ZT_DEFINE_MULTIPLY
#undef ZT_PRODUCT_OF_REGISTERS
#undef ZT_PRODUCT
#undef ZT_NAMES_128
#undef ZT_NAMES_64
#undef ZT_NAMES_32
#undef ZT_RESULT
#undef ZT_128
#undef ZT_64
#undef ZT_32
#undef ZT_16
#undef ZT_4

}  // namespace zerotuning::attention::hopper
