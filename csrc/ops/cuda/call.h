// One call on a GPU: the kernels' arguments, the tensors that these arguments point into, the
// device and the stream.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "attention/cuda_arguments.h"
#include "ops/cuda_routes.h"
#include "ops/problem.h"

namespace zerotuning::ops::cuda {

using attention::Strided4;

// Throws std::runtime_error that names what failed.
void check(cudaError_t error, const char* what);

cudaStream_t current_stream(int32_t device);

// A tensor of three or four dimensions, as an array that kernels read, or read and write.
Strided4<const void> const_array(const Tensor& tensor);
Strided4<void> mutable_array(const Tensor& tensor);

// Uninitialised bytes, at least one.
Tensor scratch(const Tensor& like, int64_t bytes);

struct Call {
  torch::stable::accelerator::DeviceGuard guard;
  const attention::CudaDevice& device;
  cudaStream_t stream;
  Tensor query, key, value, log_scale;        // unit stride in the last dimension
  std::optional<Tensor> key_mask, real_keys;  // set by read_key_mask
  attention::CudaAttention arguments;
  CudaCall shape;
  Card card;
};

// Everything but the key mask and the results. Throws std::invalid_argument for sizes that the
// kernels do not support.
Call begin(const Problem& problem);

// Sets the key mask. find_real_keys: a kernel finds each sample's first and last real keys once for
// all kernels that read the mask. In a short call whose span is given, the launch costs more time
// than this saves.
void read_key_mask(const Problem& problem, Call& call, bool find_real_keys = true);

}  // namespace zerotuning::ops::cuda
