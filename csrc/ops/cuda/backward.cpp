// zerotuning::attention_backward on a GPU.
#include "attention/cuda_backward.h"
#include "attention/cuda_initial_token.h"
#include "ops/attention_cuda.h"
#include "ops/cuda/torch_kernels.h"
#include "ops/layout.h"

namespace zerotuning::ops {
namespace {

using namespace cuda;
using attention::CudaAttentionGradients;

// The tensor in memory order [batch, rows, heads, columns], at an address that is a multiple of 16
// bytes. A copy if the tensor has another memory order or, as some views do, another address.
Tensor aligned_bthd(const Tensor& t) {
  const Tensor rows = to_bthd(t, t.size(3));
  if (reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0) return rows;
  const Tensor copy = gradient_like(t);
  aten::copy_(copy, t);
  return copy;
}

// Forward's results and the gradient of its output, in the layout that every kernel reads.
struct Results {
  Tensor grad_output, output, logsumexp;
  std::optional<Tensor> output_minus_initial_value;

  explicit Results(const BackwardArguments& b)
      : grad_output(aligned_bthd(b.grad_output)),
        output(aligned_bthd(b.output)),
        logsumexp(aten::contiguous(b.logsumexp)) {}
};

CudaAttentionGradients arguments_of(const Results& r, const Gradients& g,
                                    const Tensor& grad_log_scale, const Tensor& memory) {
  return {
      .output = const_array(r.output),
      .logsumexp = const_array(r.logsumexp),
      .output_minus_initial_value = r.output_minus_initial_value
                                        ? const_array(*r.output_minus_initial_value)
                                        : Strided4<const void>{},
      .grad_output = const_array(r.grad_output),
      .grad_query = mutable_array(g.query),
      .grad_key = mutable_array(g.key),
      .grad_value = mutable_array(g.value),
      .grad_log_scale = grad_log_scale.mutable_data_ptr(),
      .scratch = memory.mutable_data_ptr(),
  };
}

// The gradients by one of torch's kernels, completed with the initial token's share.
Gradients by_torch(const Problem& p, const Call& call, Route route, const Results& r,
                   const Tensor& grad_log_scale) {
  Gradients g = torch_backward(p, call, route, r.grad_output, r.output, r.logsumexp);
  const Tensor torch_query = g.query;  // must live until the launch, also if g.query is replaced
  if (!is_bthd(g.query)) g.query = gradient_like(p.query);
  const attention::TorchKernelGradients torch{.query = const_array(torch_query),
                                              .initial_key_replaced = !p.key_mask};
  const Tensor memory = scratch(p.query, attention::initial_token_backward_scratch(call.arguments));
  check(
      attention::initial_token_backward(call.arguments, arguments_of(r, g, grad_log_scale, memory),
                                        torch, call.device, call.stream),
      "attention_backward");
  return g;
}

// The gradients of all keys by one of our kernels.
Gradients by_own_kernel(const Problem& p, const Call& call, Route route, const Results& r,
                        const Tensor& grad_log_scale) {
  const Gradients g = new_gradients(p);
  const attention::CudaAttention& a = call.arguments;
  const bool hopper = route == Route::hopper;
  const Tensor memory = scratch(p.query, hopper ? attention::attention_backward_hopper_scratch(a)
                                                : attention::attention_backward_plain_scratch(a));
  const CudaAttentionGradients arguments = arguments_of(r, g, grad_log_scale, memory);
  check(hopper ? attention::attention_backward_hopper(a, arguments, call.device.multiprocessors,
                                                      call.stream)
               : attention::attention_backward_plain(a, arguments, call.stream),
        "attention_backward");
  return g;
}

FourTensors zeros(const Problem& p, const Tensor& grad_log_scale) {
  const Gradients g = new_gradients(p);
  for (const Tensor* gradient : {&g.query, &g.key, &g.value, &grad_log_scale}) {
    Tensor zeroed = *gradient;
    torch::stable::zero_(zeroed);
  }
  return {g.query, g.key, g.value, grad_log_scale};
}

}  // namespace

FourTensors attention_backward_cuda(const Problem& p, const BackwardArguments& backward,
                                    Route route) {
  Call call = begin(p);
  const Tensor grad_log_scale = torch::stable::empty_like(call.log_scale);
  if (has_empty_output(p)) return zeros(p, grad_log_scale);
  Results results(backward);
  read_key_mask(p, call);
  if (route == Route::automatic) route = backward_route(call.shape, call.card);
  require(supports_backward(route, call.shape, call.card), "the ", name_of(route),
          " route does not support this call");
  print_route("backward", call.shape, call.card, name_of(route));
  const bool torch = route == Route::cudnn || route == Route::flash;
  const auto& difference = backward.output_minus_initial_value;
  if (torch && difference && difference->numel() > 0)
    results.output_minus_initial_value = aligned_bthd(*difference);
  const auto [query, key, value] =
      (torch ? by_torch : by_own_kernel)(p, call, route, results, grad_log_scale);
  return {query, key, value, grad_log_scale};
}

}  // namespace zerotuning::ops
