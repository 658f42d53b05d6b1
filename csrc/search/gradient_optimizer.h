// The default search: adaptive gradient steps on log gamma, a penalty toward 0, early stopping on
// the held-out part.
#pragma once

#include <string>
#include <vector>

#include "search/optimizer.h"

namespace zerotuning::search {

// How the learning rate changes with step k of K.
enum class Schedule {
  constant,  // learning_rate
  cosine,    // learning_rate * (1 + cos(pi k / K)) / 2: falls to 0
};

struct GradientOptions {
  // Most gradient steps, >= 1.
  int64_t steps = 30;
  // > 0, in units of log gamma: an early step moves every head by about as much.
  double learning_rate = 0.1;
  // Decay of the mean gradient and of the mean squared gradient, in [0, 1).
  double beta1 = 0.9;
  double beta2 = 0.999;
  // > 0, in units of the gradient: a head whose gradients are smaller than this moves by less than
  // learning_rate a step, so that noise in heads that do not matter is not scaled up to full steps.
  double epsilon = 1e-8;
  // >= 0; penalty/2 * |x|^2 is added to the fit loss.
  double penalty = 1e-4;
  // > 0; every |x| stays within it: gamma from 0.018 to 55.
  double max_abs_log_scale = 4.0;
  Schedule schedule = Schedule::cosine;
  // Steps from one held-out evaluation to the next, >= 1.
  int64_t evaluate_every = 1;
  // Evaluations in a row without improvement that end the search; 0: it never ends early.
  int64_t patience = 8;
  // false: there is no held-out part, and the fit loss of every step takes its place.
  bool held_out = true;
  // In [0, 1): decay of a moving average of the points, judged beside them; 0: none.
  double average = 0.0;
  // Where the search begins; empty: x = 0.
  std::vector<double> start{};
};

// Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1) on f(x) + penalty/2 |x|^2, clamped:
//   g = df/dx + penalty x;   m = beta1 m + (1 - beta1) g;   v = beta2 v + (1 - beta2) g^2
//   x = clamp(x - rate_k * (m / (1 - beta1^k)) / (sqrt(v / (1 - beta2^k)) + epsilon))
//
// Each step asks for the fit loss and gradient at x; every `evaluate_every` steps, and after the
// last, also for the held-out loss there. The first ask includes the held-out loss of x = 0, the
// baseline. With average = a > 0 a second point is judged each time, with its bias corrected:
//   y = (a y + (1 - a) x),   y / (1 - a^k)
// Losses are compared without the penalty. `patience` counts from the best point of this search,
// not from the baseline, so that a bad start may improve.
class GradientOptimizer final : public Optimizer {
 public:
  explicit GradientOptimizer(int64_t dimension, GradientOptions options = {});

  std::string method() const override { return "gradient"; }
  std::string progress() const override;
  // Gradient steps taken, and options.steps.
  int64_t steps_done() const override;
  int64_t steps_total() const override { return options_.steps; }
  // Whether patience ran out before the last step.
  bool stopped_early() const;

 private:
  struct State {
    explicit State(int64_t dimension);
    int64_t step = 0;  // options.steps: only the last point's evaluation is left; one more: done
    std::vector<double> point, mean_gradient, mean_square, average;
    double path_best = std::numeric_limits<double>::infinity();
    int64_t evaluations_without_improvement = 0;
    Incumbent incumbent;
  };
  template <class Archive, class MaybeConstState>
  void list_state(Archive& archive, MaybeConstState& state) const;

  std::vector<Evaluation> plan() const override;
  void learn(const std::vector<Evaluation>& asked, const std::vector<Outcome>& outcomes) override;
  const Incumbent& incumbent() const override { return state_.incumbent; }
  void write_options(StateWriter& writer) const override;
  void write(StateWriter& writer) const override;
  void read(StateReader& reader) override;

  Part judging_part() const { return options_.held_out ? Part::held_out : Part::fit; }
  bool is_due() const;
  std::vector<double> averaged_point() const;
  void judge(const std::vector<Evaluation>& asked, const std::vector<Outcome>& outcomes);
  void take_step(const std::vector<double>& gradient);
  double learning_rate() const;

  GradientOptions options_;
  State state_;
};

}  // namespace zerotuning::search
