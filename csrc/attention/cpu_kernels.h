// The portable CPU kernels, compiled for several instruction sets. Each process chooses one
// instruction set, once.
#pragma once

#include "attention/arguments.h"

namespace zerotuning::attention {

struct CpuKernels {
  // Rows [begin, end) of the flattened batch × heads × rows.
  void (*merge)(const MergeArguments&, int64_t begin, int64_t end);
  void (*add)(const AddArguments&, int64_t begin, int64_t end);
  // Items [begin, end) of the flattened batch × heads × chunks. Each item has a sum of its own.
  // So the result does not depend on the division of the items among threads.
  void (*log_scale_gradient)(const LogScaleGradientArguments&, int64_t begin, int64_t end);
};

const CpuKernels& cpu_kernels();

}  // namespace zerotuning::attention
