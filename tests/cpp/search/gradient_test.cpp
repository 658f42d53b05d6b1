// The gradient steps on functions whose optimum is known.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "search/gradient_stepper.h"
#include "search/random_numbers.h"
#include "test_functions.h"

namespace zerotuning::search::testing {
namespace {

GradientOptions plain(int64_t steps, double learning_rate) {
  GradientOptions options;
  options.steps = steps;
  options.learning_rate = learning_rate;
  options.l2_penalty = 0;
  return options;
}

TEST(GradientStepper, finds_the_optimum_of_quadratics_in_1_to_500_dimensions) {
  for (const int64_t n : {1, 2, 10, 270, 500}) {
    for (const double condition : {1.0, 1e4}) {
      const Quadratic function = quadratic(static_cast<size_t>(n), condition);
      GradientStepper stepper(n, plain(300, 0.1));
      EXPECT_LT(distance(run(stepper, function.slope()), function.optimum),
                1e-3 * std::sqrt(static_cast<double>(n)))
          << n << " dimensions, condition " << condition;
      EXPECT_EQ(stepper.steps_done(), 300);
    }
  }
}

TEST(GradientStepper, finds_the_optimum_of_rosenbrocks_function) {
  for (const int64_t n : {2, 10}) {
    GradientStepper stepper(n, plain(6000, 0.05));
    const Vector last = run(stepper, rosenbrock_gradient);
    EXPECT_LT(rosenbrock(last), 1e-3) << n;
    EXPECT_LT(distance(last, Vector(static_cast<size_t>(n), 1.0)), 0.1) << n;
  }
}

TEST(GradientStepper, takes_the_steps_of_adam_as_published) {
  const Quadratic function = quadratic(5, 100);
  GradientOptions options = plain(20, 0.1);
  options.schedule = Schedule::constant;
  options.l2_penalty = 0.25;
  GradientStepper stepper(5, options);
  Vector x(5, 0.0), m(5, 0.0), v(5, 0.0);
  for (int k = 1; k <= 20; ++k) {
    for (size_t i = 0; i < 5; ++i) ASSERT_NEAR(stepper.point()[i], x[i], 1e-12) << "step " << k;
    const Vector slope = function.gradient(x);
    for (size_t i = 0; i < 5; ++i) {
      const double g = slope[i] + 0.25 * x[i];
      m[i] = 0.9 * m[i] + 0.1 * g;
      v[i] = 0.999 * v[i] + 0.001 * g * g;
      x[i] -= 0.1 * (m[i] / (1 - std::pow(0.9, k))) /
              (std::sqrt(v[i] / (1 - std::pow(0.999, k))) + 1e-8);
    }
    stepper.step(function.gradient(stepper.point()));
  }
}

TEST(GradientStepper, lets_the_learning_rate_fall_along_a_cosine) {
  // Under a constant gradient each step of Adam is the learning rate itself.
  GradientStepper stepper(1, plain(10, 0.2));
  double expected = 0;
  for (int k = 0; k < 10; ++k) {
    const double rate = 0.2 * (1 + std::cos(std::acos(-1.0) * k / 10)) / 2;
    EXPECT_NEAR(stepper.learning_rate(), rate, 1e-15);
    expected += rate;
    stepper.step({-1.0});
    EXPECT_NEAR(stepper.point()[0], expected, 1e-6);
  }
}

TEST(GradientStepper, ends_where_the_penalty_balances_the_loss) {
  // Least of c/2 (x - a)^2 + p/2 x^2: x = c a / (c + p).
  const Quadratic function{{2.0, 2.0}, {1.0, -0.5}};
  GradientOptions options = plain(500, 0.05);
  options.l2_penalty = 3;
  GradientStepper stepper(2, options);
  const Vector last = run(stepper, function.slope());
  EXPECT_NEAR(last[0], 2.0 / 5, 1e-4);
  EXPECT_NEAR(last[1], -1.0 / 5, 1e-4);
}

TEST(GradientStepper, never_leaves_the_bound_and_reaches_an_optimum_on_it) {
  GradientOptions options = plain(100, 0.3);
  options.max_abs_log_scale = 1.5;
  GradientStepper stepper(2, options);
  const Quadratic function{{1.0, 1.0}, {9.0, -9.0}};
  while (!stepper.finished()) {
    stepper.step(function.gradient(stepper.point()));
    for (const double value : stepper.point()) ASSERT_LE(std::fabs(value), 1.5);
  }
  EXPECT_EQ(stepper.point(), (Vector{1.5, -1.5}));
}

TEST(GradientStepper, comes_near_the_optimum_under_gradient_noise) {
  const Quadratic function = quadratic(50, 10);
  RandomNumbers random(11);
  const auto noisy = [&](const Vector& x) {
    Vector slope = function.gradient(x);
    for (double& value : slope) value += random.normal();
    return slope;
  };
  GradientStepper stepper(50, plain(600, 0.1));
  EXPECT_LT(function(run(stepper, noisy)), 0.02 * function(Vector(50, 0.0)));
}

TEST(GradientStepper, starts_from_a_given_point) {
  GradientOptions options = plain(40, 0.1);
  options.start = {3.0, -3.0};
  GradientStepper stepper(2, options);
  EXPECT_EQ(stepper.point(), options.start);
  EXPECT_EQ(stepper.averaged_point(), options.start);
}

TEST(GradientStepper, averages_the_points_after_its_steps_with_their_bias_corrected) {
  GradientOptions options = plain(6, 0.3);
  options.average_decay = 0.8;
  options.start = {0.25};  // the average excludes the start
  GradientStepper stepper(1, options);
  double weights = 0, sum = 0;
  while (!stepper.finished()) {
    stepper.step({stepper.steps_done() % 2 == 0 ? 1.0 : -2.0});
    sum = 0.8 * sum + stepper.point()[0];
    weights = 0.8 * weights + 1;
    EXPECT_NEAR(stepper.averaged_point()[0], sum / weights, 1e-12);
  }
}

TEST(GradientStepper, averages_away_the_swinging_of_its_points) {
  // The gradient's sign alternates: the points swing about 0.5, the average does not.
  GradientOptions options = plain(60, 0.3);
  options.schedule = Schedule::constant;
  options.beta1 = 0;
  options.average_decay = 0.9;
  GradientStepper stepper(1, options);
  double nearest = 1, nearest_average = 1;
  while (!stepper.finished()) {
    stepper.step({stepper.point()[0] >= 0.5 ? 1.0 : -1.0});
    nearest = std::min(nearest, std::fabs(stepper.point()[0] - 0.5));
    nearest_average = std::min(nearest_average, std::fabs(stepper.averaged_point()[0] - 0.5));
  }
  EXPECT_LT(nearest_average, 0.5 * nearest);
}

TEST(GradientStepper, refuses_wrong_gradients_and_stays_as_it_was) {
  GradientStepper stepper(2, plain(2, 0.1));
  stepper.step({1.0, 2.0});
  const std::string before = stepper.state();
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const auto message = [&](const Vector& gradient) -> std::string {
    try {
      stepper.step(gradient);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "no error";
  };
  EXPECT_EQ(message({1.0}), "gradient must have 2 numbers, got 1");
  EXPECT_EQ(message({1.0, nan}), "gradient[1] must be finite, got nan");
  EXPECT_EQ(stepper.state(), before);
  stepper.step({1.0, 2.0});
  EXPECT_EQ(message({1.0, 2.0}), "all 2 steps are done: no further step is possible");
}

TEST(GradientStepper, refuses_options_out_of_range_and_names_them) {
  const auto message = [](const GradientOptions& options, int64_t dimension = 2) -> std::string {
    try {
      const GradientStepper stepper(dimension, options);
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
  options.l2_penalty = nan;
  EXPECT_EQ(message(options), "l2_penalty must be finite and not negative, got nan");
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
