// Attention with a scaled initial token on the CPU: forward by our own kernels where the processor
// has AVX-512 (attention/flash_cpu.h), else, and backward, by torch's flash kernel with a broadcast
// bias (design.md section 4).
#pragma once

#include <tuple>

#include "ops/problem.h"

namespace zerotuning::ops {

// torch: its kernel. tiles: ours; refuses a call or a processor that it is not made for.
enum class CpuRoute { automatic, torch, tiles };

// (output [B, H, Tq, Dv], logsumexp [B, H, Tq]); both laid out with heads inside rows, as torch's
// flash kernel does.
std::tuple<Tensor, Tensor> attention_cpu(const Problem& problem,
                                         CpuRoute route = CpuRoute::automatic);

// Gradients of query, key, value and log_scale.
FourTensors attention_backward_cpu(const Problem& problem, const BackwardArguments& backward);

// output [B, H, Tq, Dv]; one query reads each key and value once for all query heads that share it.
Tensor decode_attention_cpu(const Problem& problem);

}  // namespace zerotuning::ops
