// Operators as functions of a checked call. The arguments that all schemas share are listed here
// once, in the schemas' order (library.cpp):
//   library.impl("decode_attention", TORCH_BOX(&Forward<decode_attention>::call));
#pragma once

#include <utility>

#include "ops/problem.h"

namespace zerotuning::ops {

template <auto function>
struct Forward;

// more: the schema's arguments after the shared arguments.
template <typename Result, typename... More, Result (*function)(const Problem&, More...)>
struct Forward<function> {
  static Result call(Tensor query, Tensor key, Tensor value, Tensor log_scale,
                     std::optional<Tensor> key_mask, std::optional<Tensor> span,
                     std::optional<Tensor> query_start, int64_t window, double scale,
                     More... more) {
    return function(check_problem({std::move(query), std::move(key), std::move(value),
                                   std::move(log_scale), std::move(key_mask), std::move(span),
                                   std::move(query_start), window, scale}),
                    more...);
  }
};

template <auto function>
struct Backward;

template <typename... More,
          FourTensors (*function)(const Problem&, const BackwardArguments&, More...)>
struct Backward<function> {
  static FourTensors call(Tensor grad_output, Tensor query, Tensor key, Tensor value,
                          Tensor log_scale, Tensor output, Tensor logsumexp,
                          std::optional<Tensor> key_mask, std::optional<Tensor> span,
                          std::optional<Tensor> query_start, int64_t window, double scale,
                          std::optional<Tensor> output_minus_initial_value, More... more) {
    const Problem problem = check_problem({std::move(query), std::move(key), std::move(value),
                                           std::move(log_scale), std::move(key_mask),
                                           std::move(span), std::move(query_start), window, scale});
    const BackwardArguments backward{grad_output, output, logsumexp, output_minus_initial_value};
    check_backward(problem, backward);
    return function(problem, backward, more...);
  }
};

}  // namespace zerotuning::ops
