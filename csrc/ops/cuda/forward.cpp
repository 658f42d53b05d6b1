// zerotuning::attention on a GPU.
#include "attention/cuda_forward.h"
#include "attention/cuda_initial_token.h"
#include "ops/attention_cuda.h"
#include "ops/cuda/torch_kernels.h"
#include "ops/layout.h"

namespace zerotuning::ops {
namespace {

using namespace cuda;

void run(const Problem& p, const Call& call, Route route) {
  const attention::CudaAttention& a = call.arguments;
  switch (route) {
    case Route::hopper:
      check(attention::attention_hopper(a, call.device.multiprocessors, call.stream), "attention");
      return;
    case Route::cudnn:
    case Route::flash: {
      const auto [part, part_logsumexp] = torch_forward(p, call, route);
      check(attention::initial_token_merge(a, const_array(part), const_array(part_logsumexp), 1,
                                           call.device, call.stream),
            "attention");
      return;
    }
    default:
      check(attention::attention_plain(a, call.stream), "attention");
  }
}

}  // namespace

ThreeTensors attention_cuda(const Problem& p, Route route, bool with_output_minus_initial_value) {
  Call call = begin(p);
  const bool needs_output_minus_initial_value =
      with_output_minus_initial_value &&
      (route != Route::automatic ||
       torch_gradient_lengths(call.shape.fixed, call.card).contain(call.shape));
  const Tensor output = new_output(p);
  const Tensor output_minus_initial_value =
      needs_output_minus_initial_value ? new_output(p)
                                       : aten::empty(p.query, Sizes{0}, p.query.scalar_type());
  const Tensor logsumexp =
      aten::empty(p.query, Sizes{p.batch, p.heads, p.queries}, p.log_scale.scalar_type());
  if (has_empty_output(p)) return {output, logsumexp, output_minus_initial_value};
  attention::CudaAttention& a = call.arguments;
  a.output = mutable_array(output);
  a.logsumexp = mutable_array(logsumexp);
  if (needs_output_minus_initial_value)
    a.output_minus_initial_value = mutable_array(output_minus_initial_value);
  read_key_mask(p, call);
  if (route == Route::automatic) route = forward_route(call.shape, call.card);
  require(supports_forward(route, call.shape, call.card), "the ", name_of(route),
          " route does not support this call");
  print_route("forward", call.shape, call.card, name_of(route));
  run(p, call, route);
  return {output, logsumexp, output_minus_initial_value};
}

}  // namespace zerotuning::ops
