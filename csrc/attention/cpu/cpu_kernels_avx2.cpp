// The CPU kernels built for AVX2 and FMA; called only on processors that have both
// (cpu_kernels.cpp).
#define ZEROTUNING_CPU_TARGET avx2
#include "attention/cpu/cpu_kernels_target.h"

namespace zerotuning::attention {

const CpuKernels& avx2_kernels() { return avx2::kernels; }

}  // namespace zerotuning::attention
