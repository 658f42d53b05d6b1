// Correction of the gradients of scaled keys' logits for the rounding of the output.
//
// The gradient of a logit is dS = P (dP - Δ) with dP = dO V^T and Δ = dO·O. Δ is computed from the
// output in 16 bits. Where some keys have nearly all of a row's weight, dP - Δ of these keys is
// smaller than the rounding error of Δ. But Δ = Σ P dP, so the exact dS of a row add up to 0. The
// computed dS add up to the error of Δ, and each key's part of that error is proportional to its
// weight P:
//   exact dS = dS - P (dS + Σ dS of all other keys) = (1 - P) dS - P Σ dS of all other keys
#pragma once

namespace zerotuning::attention::device {

// P and dS of one query row, summed over some of its keys.
template <typename C>
struct RowSums {
  C weight = 0, grad_logit = 0;

  __device__ __forceinline__ void add(C key_weight, C key_grad_logit) {
    weight += key_weight;
    grad_logit += key_grad_logit;
  }
  // The exact dS of these keys, given the computed dS of all other keys of the row.
  __device__ __forceinline__ C correct_rounding(C others_grad_logit) const {
    return (1 - weight) * grad_logit - weight * others_grad_logit;
  }
};

}  // namespace zerotuning::attention::device
