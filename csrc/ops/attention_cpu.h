// Attention with a scaled initial token on the CPU. Forward uses our own kernels on processors with
// AVX-512 (attention/flash_cpu.h). Otherwise, and for backward, torch's flash kernel runs with a
// broadcast bias (docs/how-it-works.md, "CPU: a broadcast bias").
#pragma once

#include <tuple>

#include "ops/problem.h"

namespace zerotuning::ops {

// torch: torch's kernel. tiles: our kernel; an error if our kernel does not support the call or the
// processor.
enum class CpuRoute { automatic, torch, tiles };

// (output [B, H, Tq, Dv], logsumexp [B, H, Tq]), both in memory order [B, Tq, H, Dv] like the
// results of torch's flash kernel.
std::tuple<Tensor, Tensor> attention_cpu(const Problem& problem,
                                         CpuRoute route = CpuRoute::automatic);

// Gradients of query, key, value and log_scale.
FourTensors attention_backward_cpu(const Problem& problem, const BackwardArguments& backward);

// output [B, H, Tq, Dv]. With one query, keys and values are read once for all heads of a key
// head.
Tensor decode_attention_cpu(const Problem& problem);

}  // namespace zerotuning::ops
