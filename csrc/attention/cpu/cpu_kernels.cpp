// The portable build of the CPU kernels, and the choice between this build and the AVX2 build.
#define ZEROTUNING_CPU_TARGET portable
#include "attention/cpu/cpu_kernels_target.h"

namespace zerotuning::attention {

#ifdef ZEROTUNING_HAS_AVX2
const CpuKernels& avx2_kernels();

const CpuKernels& cpu_kernels() {
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return avx2 ? avx2_kernels() : portable::kernels;
}
#else
const CpuKernels& cpu_kernels() { return portable::kernels; }
#endif

}  // namespace zerotuning::attention
