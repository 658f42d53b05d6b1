// The choice of the kernels of flash_cpu.h for the processor that runs the program.
#include "attention/flash_cpu.h"

#ifdef ZEROTUNING_HAS_AVX512
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace zerotuning::attention {

#ifdef ZEROTUNING_HAS_AVX512

const FlashKernel& avx512_flash_kernel();
const FlashKernel& amx_flash_kernel();
DecodeKernel avx512_decode_kernel(DType dtype);

namespace {

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// Linux permits the use of the matrix unit's registers only after a system call.
bool may_use_matrix_unit() {
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

bool has_amx() {
  unsigned a, b, c, d;
  if (!has_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool bfloat16_tiles = d >> 22 & 1, tiles = d >> 24 & 1;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
  const bool bfloat16_vectors = a >> 5 & 1;
  return bfloat16_tiles && tiles && bfloat16_vectors && may_use_matrix_unit();
}

}  // namespace

const FlashKernel* flash_kernel(DType dtype) {
  static const bool avx512 = has_avx512(), amx = has_amx();
  if (dtype == DType::bfloat16 && amx) return &amx_flash_kernel();
  if (dtype == DType::float32 && avx512) return &avx512_flash_kernel();
  return nullptr;
}

DecodeKernel decode_kernel(DType dtype) {
  static const bool avx512 = has_avx512();
  return avx512 ? avx512_decode_kernel(dtype) : nullptr;
}

#else

const FlashKernel* flash_kernel(DType) { return nullptr; }
DecodeKernel decode_kernel(DType) { return nullptr; }

#endif

}  // namespace zerotuning::attention
