// Calls the operator with gradients and runs a search through the installed package; exits 0 when
// both are right.
#include <torch/torch.h>
#include <zerotuning/ops/attention.h>
#include <zerotuning/search/gradient_stepper.h>

#include <cmath>
#include <iostream>
#include <vector>

namespace {

// The paper's two steps in float64: scale the initial token's weight after the softmax,
// renormalise.
at::Tensor reference(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     const at::Tensor& log_scale) {
  const int64_t length = query.size(2);
  const auto hidden = at::ones({length, length}, at::kBool).triu(1);
  const auto logits =
      at::matmul(query, key.transpose(-1, -2)) / std::sqrt(static_cast<double>(query.size(3)));
  const auto weights = at::softmax(logits.masked_fill(hidden, -INFINITY), -1);
  const auto gamma = at::exp(log_scale).view({1, -1, 1, 1});
  const auto scaled =
      at::cat({weights.narrow(-1, 0, 1) * gamma, weights.narrow(-1, 1, length - 1)}, -1);
  return at::matmul(scaled / scaled.sum(-1, true), value);
}

bool attention_equals_the_formula() {
  torch::manual_seed(0);
  const auto options = at::TensorOptions().dtype(at::kDouble).requires_grad(true);
  std::vector<at::Tensor> inputs = {
      torch::randn({2, 4, 17, 32}, options), torch::randn({2, 4, 17, 32}, options),
      torch::randn({2, 4, 17, 32}, options), torch::randn({4}, options)};
  const auto [output, logsumexp] =
      zerotuning::attention(inputs[0], inputs[1], inputs[2], inputs[3]);
  const auto expected = reference(inputs[0], inputs[1], inputs[2], inputs[3]);
  const auto weight = at::randn_like(expected);
  const auto gradients = torch::autograd::grad({(output * weight).sum()}, inputs);
  const auto expected_gradients = torch::autograd::grad({(expected * weight).sum()}, inputs);
  bool same = at::allclose(output, expected, 1e-10, 1e-10);
  for (size_t i = 0; i < inputs.size(); ++i)
    same &= at::allclose(gradients[i], expected_gradients[i], 1e-8, 1e-8);
  const auto decoded =
      zerotuning::decode_attention(inputs[0].narrow(2, 16, 1), inputs[1], inputs[2], inputs[3]);
  return same && at::allclose(decoded, expected.narrow(2, 16, 1), 1e-10, 1e-10);
}

// A complete search: gradient steps, and the best of their points on held-out examples, for which
// the same function stands here. x = 0 is the first candidate, so that a worse point is never
// chosen.
bool search_finds_the_minimum() {
  using namespace zerotuning::search;
  GradientOptions options;
  options.steps = 200;
  options.l2_penalty = 0;
  GradientStepper stepper(3, options);
  const std::vector<double> target = {0.5, -1.0, 2.0};
  std::vector<double> best = stepper.point(), gradient(3);
  double best_loss = 0.25 + 1 + 4;
  while (!stepper.finished()) {
    for (size_t i = 0; i < 3; ++i) gradient[i] = 2 * (stepper.point()[i] - target[i]);
    stepper.step(gradient);
    double held_out_loss = 0;
    for (size_t i = 0; i < 3; ++i) held_out_loss += std::pow(stepper.point()[i] - target[i], 2);
    if (held_out_loss < best_loss) {
      best = stepper.point();
      best_loss = held_out_loss;
    }
  }
  return best_loss < 1e-3 && std::fabs(best[2] - target[2]) < 0.03;
}

}  // namespace

int main() {
  const bool attention = attention_equals_the_formula(), search = search_finds_the_minimum();
  std::cout << "attention " << (attention ? "ok" : "WRONG") << ", search "
            << (search ? "ok" : "WRONG") << "\n";
  return attention && search ? 0 : 1;
}
