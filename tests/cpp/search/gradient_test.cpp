// The gradient search on functions whose optimum is known.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "search/gradient_optimizer.h"
#include "search/random_numbers.h"
#include "test_functions.h"

namespace zerotuning::search::testing {
namespace {

GradientOptions plain(int64_t steps, double learning_rate) {
  GradientOptions options;
  options.steps = steps;
  options.learning_rate = learning_rate;
  options.penalty = 0;
  options.patience = 0;
  return options;
}

TEST(GradientOptimizer, finds_the_optimum_of_quadratics_in_1_to_500_dimensions) {
  for (const int64_t n : {1, 2, 10, 270, 500}) {
    for (const double condition : {1.0, 1e4}) {
      const Quadratic function = quadratic(static_cast<size_t>(n), condition);
      GradientOptimizer optimizer(n, plain(300, 0.1));
      const Counts counts = run(optimizer, function.problem());
      EXPECT_EQ(counts.gradient, 300);
      EXPECT_EQ(counts.held_out, 301);
      EXPECT_LT(distance(optimizer.best(), function.optimum),
                1e-3 * std::sqrt(static_cast<double>(n)))
          << n << " dimensions, condition " << condition;
    }
  }
}

TEST(GradientOptimizer, finds_the_optimum_of_rosenbrocks_function) {
  for (const int64_t n : {2, 10}) {
    GradientOptimizer optimizer(n, plain(6000, 0.05));
    run(optimizer, same_on_both_parts(rosenbrock, rosenbrock_gradient));
    EXPECT_LT(optimizer.best_loss(), 1e-3) << n;
    EXPECT_LT(distance(optimizer.best(), Vector(static_cast<size_t>(n), 1.0)), 0.1) << n;
  }
}

TEST(GradientOptimizer, takes_the_steps_of_adam_as_published) {
  const Quadratic function = quadratic(5, 100);
  GradientOptions options = plain(20, 0.1);
  options.schedule = Schedule::constant;
  options.penalty = 0.25;
  GradientOptimizer optimizer(5, options);
  Vector x(5, 0.0), m(5, 0.0), v(5, 0.0);
  for (int k = 1; k <= 20; ++k) {
    const Vector asked = optimizer.ask().front().point;
    for (size_t i = 0; i < 5; ++i) ASSERT_NEAR(asked[i], x[i], 1e-12) << "step " << k;
    const Vector slope = function.gradient(x);
    for (size_t i = 0; i < 5; ++i) {
      const double g = slope[i] + 0.25 * x[i];
      m[i] = 0.9 * m[i] + 0.1 * g;
      v[i] = 0.999 * v[i] + 0.001 * g * g;
      x[i] -= 0.1 * (m[i] / (1 - std::pow(0.9, k))) /
              (std::sqrt(v[i] / (1 - std::pow(0.999, k))) + 1e-8);
    }
    optimizer.tell(answer(function.problem(), optimizer));
  }
}

TEST(GradientOptimizer, lets_the_learning_rate_fall_along_a_cosine) {
  // Under a constant gradient each step of Adam is the learning rate itself.
  GradientOptimizer optimizer(1, plain(10, 0.2));
  const Problem slope = same_on_both_parts([](const Vector& x) { return -x[0]; },
                                           [](const Vector&) { return Vector{-1.0}; });
  run(optimizer, slope);
  double expected = 0;
  for (int k = 0; k < 10; ++k) expected += 0.2 * (1 + std::cos(std::acos(-1.0) * k / 10)) / 2;
  EXPECT_NEAR(optimizer.best()[0], expected, 1e-6);
}

TEST(GradientOptimizer, ends_where_the_penalty_balances_the_loss) {
  // Least of c/2 (x - a)^2 + p/2 x^2: x = c a / (c + p).
  const Quadratic function{{2.0, 2.0}, {1.0, -0.5}};
  GradientOptions options = plain(500, 0.05);
  options.penalty = 3;
  GradientOptimizer optimizer(2, options);
  run(optimizer, function.problem(), [&] { return optimizer.steps_done() == 500; });
  const Vector last = optimizer.ask().front().point;
  EXPECT_NEAR(last[0], 2.0 / 5, 1e-4);
  EXPECT_NEAR(last[1], -1.0 / 5, 1e-4);
}

TEST(GradientOptimizer, never_leaves_the_bound_and_reaches_an_optimum_on_it) {
  GradientOptions options = plain(100, 0.3);
  options.max_abs_log_scale = 1.5;
  GradientOptimizer optimizer(2, options);
  const Quadratic function{{1.0, 1.0}, {9.0, -9.0}};
  double widest = 0;
  run(optimizer, function.problem(), [&] {
    for (const Evaluation& wanted : optimizer.ask()) {
      widest = std::max({widest, std::fabs(wanted.point[0]), std::fabs(wanted.point[1])});
    }
    return false;
  });
  EXPECT_EQ(widest, 1.5);
  EXPECT_EQ(optimizer.best(), (Vector{1.5, -1.5}));
}

TEST(GradientOptimizer, comes_near_the_optimum_under_gradient_noise) {
  const Quadratic function = quadratic(50, 10);
  RandomNumbers random(11);
  Problem noisy = function.problem();
  noisy.gradient = [&](const Vector& x) {
    Vector slope = function.gradient(x);
    for (double& value : slope) value += random.normal();
    return slope;
  };
  GradientOptimizer optimizer(50, plain(600, 0.1));
  run(optimizer, noisy);
  EXPECT_LT(optimizer.best_loss(), 0.02 * optimizer.baseline_loss());
}

TEST(GradientOptimizer, returns_the_earlier_point_when_the_held_out_part_gets_worse) {
  const Quadratic fit = quadratic(4, 1);
  Quadratic held_out = fit;
  for (double& value : held_out.optimum) value *= 0.4;
  GradientOptions options = plain(200, 0.05);
  options.schedule = Schedule::constant;
  options.patience = 6;
  GradientOptimizer optimizer(4, options);
  Problem overfit = fit.problem();
  overfit.held_out = held_out;
  const Counts counts = run(optimizer, overfit);
  EXPECT_TRUE(optimizer.stopped_early());
  EXPECT_LT(counts.gradient, 40);
  EXPECT_LT(optimizer.best_loss(), optimizer.baseline_loss());
  EXPECT_EQ(optimizer.best_loss(), held_out(optimizer.best()));
  EXPECT_LT(distance(optimizer.best(), held_out.optimum), distance(fit.optimum, held_out.optimum));
  EXPECT_NE(optimizer.progress().find("stopped early"), std::string::npos);
}

TEST(GradientOptimizer, returns_zero_when_nothing_beats_it_on_the_held_out_part) {
  GradientOptions options = plain(50, 0.1);
  options.patience = 5;
  GradientOptimizer optimizer(3, options);
  Problem harmful = quadratic(3, 1).problem();
  harmful.held_out = [](const Vector& x) { return 0.5 + distance(x, Vector(3, 0.0)); };
  const Counts counts = run(optimizer, harmful);
  EXPECT_EQ(counts.asks, 6);  // x = 0 and five evaluations that are worse
  EXPECT_EQ(optimizer.best(), Vector(3, 0.0));
  EXPECT_EQ(optimizer.best_loss(), 0.5);
  EXPECT_EQ(optimizer.baseline_loss(), 0.5);
}

TEST(GradientOptimizer, evaluates_the_held_out_part_only_when_due_and_at_the_end) {
  GradientOptions options = plain(10, 0.1);
  options.evaluate_every = 4;
  GradientOptimizer optimizer(2, options);
  EXPECT_TRUE(std::isnan(optimizer.best_loss()));
  std::vector<size_t> sizes;
  run(optimizer, quadratic(2, 1).problem(), [&] {
    sizes.push_back(optimizer.ask().size());
    return false;
  });
  // Steps 0, 4 and 8 are due; the last ask is the held-out loss of the last point alone.
  EXPECT_EQ(sizes, (std::vector<size_t>{2, 1, 1, 1, 2, 1, 1, 1, 2, 1, 1}));
  EXPECT_EQ(optimizer.steps_done(), 10);
  EXPECT_EQ(optimizer.progress(), "step 10/10");
}

TEST(GradientOptimizer, uses_the_fit_losses_when_there_is_no_held_out_part) {
  GradientOptions options = plain(300, 0.1);
  options.held_out = false;
  GradientOptimizer optimizer(10, options);
  const Quadratic function = quadratic(10, 10);
  const Counts counts = run(optimizer, function.problem());
  EXPECT_EQ(counts.held_out, 0);
  EXPECT_EQ(counts.fit, 301);
  EXPECT_EQ(optimizer.baseline_loss(), function(Vector(10, 0.0)));
  EXPECT_LT(distance(optimizer.best(), function.optimum), 1e-3);
}

TEST(GradientOptimizer, starts_from_a_given_point_and_still_compares_with_zero) {
  const Quadratic function{{1.0, 1.0}, {0.1, 0.1}};
  GradientOptions options = plain(40, 0.1);
  options.start = {3.0, -3.0};
  options.patience = 3;
  GradientOptimizer optimizer(2, options);
  const std::vector<Evaluation> first = optimizer.ask();
  ASSERT_EQ(first.size(), 3u);
  EXPECT_EQ(first[0].point, options.start);
  EXPECT_EQ(first[1].point, Vector(2, 0.0));
  run(optimizer, function.problem());
  // The start is far worse than 0: improving from there is no reason to stop.
  EXPECT_EQ(optimizer.steps_done(), 40);
  EXPECT_EQ(optimizer.baseline_loss(), function(Vector(2, 0.0)));
  EXPECT_LE(optimizer.best_loss(), optimizer.baseline_loss());
}

TEST(GradientOptimizer, judges_the_moving_average_of_the_points_too) {
  // The gradient's sign alternates: the points swing about their start, the average does not.
  const Problem swinging = {[](const Vector&) { return 0.0; },
                            [](const Vector& x) { return Vector{x[0] >= 0.5 ? 1.0 : -1.0}; },
                            [](const Vector& x) { return std::fabs(x[0] - 0.5); }};
  GradientOptions options = plain(60, 0.3);
  options.schedule = Schedule::constant;
  options.beta1 = 0;
  GradientOptimizer points(1, options);
  run(points, swinging);
  options.average = 0.9;
  GradientOptimizer averaged(1, options);
  const Counts counts = run(averaged, swinging);
  EXPECT_EQ(counts.held_out, 61 + 60);
  EXPECT_LT(averaged.best_loss(), 0.5 * points.best_loss());
}

TEST(GradientOptimizer, refuses_options_out_of_range_and_names_them) {
  const auto message = [](const GradientOptions& options, int64_t dimension = 2) -> std::string {
    try {
      const GradientOptimizer optimizer(dimension, options);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "no error";
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  GradientOptions options;
  options.learning_rate = -1;
  EXPECT_EQ(message(options), "learning_rate must be positive and finite, got -1");
  options = {};
  options.penalty = nan;
  EXPECT_EQ(message(options), "penalty must be finite and not negative, got nan");
  options = {};
  options.steps = 0;
  EXPECT_EQ(message(options), "steps must be at least 1, got 0");
  options = {};
  options.beta2 = 1;
  EXPECT_EQ(message(options), "beta2 must be in [0, 1), got 1");
  options = {};
  options.start = {1.0, nan};
  EXPECT_EQ(message(options), "start must be within max_abs_log_scale = 4 of 0, got nan");
  options.start = {1.0};
  EXPECT_EQ(message(options), "start must be empty or 2 numbers long, got 1");
  EXPECT_EQ(message({}, 0), "dimension must be at least 1, got 0");
}

}  // namespace
}  // namespace zerotuning::search::testing
