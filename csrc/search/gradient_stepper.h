// Gradient steps on log gamma: Adam with an L2 penalty, a bound, and a moving average of the
// points.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "search/state_json.h"

namespace zerotuning::search {

// How the learning rate changes with step k of K.
enum class Schedule {
  constant,  // learning_rate
  cosine,    // learning_rate * (1 + cos(pi k / K)) / 2: falls to 0
};

struct GradientOptions {
  // Number of steps K, >= 1.
  int64_t steps = 30;
  // > 0, in units of log gamma: an early step moves every head by about this amount.
  double learning_rate = 0.1;
  // Decay of the mean gradient and of the mean squared gradient, in [0, 1).
  double beta1 = 0.9;
  double beta2 = 0.999;
  // > 0, in units of the gradient: a head whose gradients are smaller than epsilon moves by less
  // than learning_rate a step, so that noise in heads that do not matter is not scaled up to full
  // steps.
  double epsilon = 1e-8;
  // >= 0; l2_penalty/2 * |x|^2 is added to the loss.
  double l2_penalty = 1e-4;
  // > 0; every |x| stays within this bound: gamma from 0.018 to 55.
  double max_abs_log_scale = 4.0;
  Schedule schedule = Schedule::cosine;
  // In [0, 1): decay of the moving average of the points; 0: the average is the point itself.
  double average_decay = 0.0;
  // The first point; empty: x = 0.
  std::vector<double> start{};
};

// Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1) on f(x) + l2_penalty/2 |x|^2, clamped:
//   g = df/dx + l2_penalty x;   m = beta1 m + (1 - beta1) g;   v = beta2 v + (1 - beta2) g^2
//   x = clamp(x - rate_k * (m / (1 - beta1^k)) / (sqrt(v / (1 - beta2^k)) + epsilon))
// and, with a = average_decay, the moving average of the points after each step,
//   y = a y + (1 - a) x, whose bias is corrected: y / (1 - a^k)
//
//   while (!stepper.finished()) stepper.step(gradient(stepper.point()));
//
// The stepper receives gradients, no losses: the caller decides which point is accepted and when to
// stop. One object serves one thread at a time. All errors are std::invalid_argument
// and leave the object as it was.
class GradientStepper {
 public:
  // dimension: number of heads, >= 1.
  explicit GradientStepper(int64_t dimension, GradientOptions options = {});

  int64_t dimension() const { return dimension_; }
  // x, where the next gradient is to be taken: [dimension].
  const std::vector<double>& point() const { return state_.point; }
  // The moving average of the points after the steps so far; point() before the first step.
  std::vector<double> averaged_point() const;
  // rate_k of the next step.
  double learning_rate() const;

  // gradient: df/dx at point(), [dimension], finite. Throws after the last step.
  void step(const std::vector<double>& gradient);
  int64_t steps_done() const { return state_.steps_done; }
  int64_t steps_total() const { return options_.steps; }
  bool finished() const { return state_.steps_done == options_.steps; }

  // The whole state as JSON (state_json.h). A stepper of the same dimension and options that
  // restores this state continues as the saved stepper would have, bit for bit.
  std::string state() const;
  void restore(const std::string& state);

 private:
  struct State {
    explicit State(size_t dimension);
    int64_t steps_done = 0;
    std::vector<double> point, mean_gradient, mean_square, average;
  };
  template <class Archive, class MaybeConstState>
  void list_state(Archive& archive, MaybeConstState& state) const;
  void write_heading(StateWriter& writer) const;
  void check_gradient(const std::vector<double>& gradient) const;

  int64_t dimension_;
  GradientOptions options_;
  State state_;
};

}  // namespace zerotuning::search
