// The paper's search on separable losses, whose optimum is known in closed form.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "search/paper_optimizer.h"
#include "test_functions.h"

namespace zerotuning::search::testing {
namespace {

// sum_h (x_h - t_h)^2 / 2. Scaling head h alone by gamma changes it by g^2/2 - g t_h, g = log
// gamma: up-effective when t_h > g/2. A shared x of a group is best at the mean of its t_h.
Quadratic separable(const Vector& targets) { return {Vector(targets.size(), 1.0), targets}; }

const Vector kTargets = {1.2, -0.4, 0.8, 0.9, 0.1, -1.0, 0.7, 0.5};
const std::vector<int64_t> kUp = {0, 2, 3, 6, 7};  // targets above log(1.5)/2 = 0.203; mean 0.82

double log_of_sweep_nearest(const PaperOptions& options, double target) {
  double best = std::log(options.sweep[0]);
  for (const double gamma : options.sweep) {
    if (std::fabs(std::log(gamma) - target) < std::fabs(best - target)) best = std::log(gamma);
  }
  return best;
}

TEST(PaperOptimizer, finds_the_group_and_its_shared_scale_of_a_separable_loss) {
  const PaperOptions options;
  PaperOptimizer optimizer(8, options);
  const Quadratic function = separable(kTargets);
  EXPECT_EQ(run(optimizer, function), 1 + 8 + 12);
  EXPECT_EQ(optimizer.direction(), Direction::up);
  EXPECT_EQ(optimizer.group(), kUp);
  Vector expected(8, 0.0);
  for (const int64_t head : kUp) {
    expected[static_cast<size_t>(head)] = log_of_sweep_nearest(options, 0.82);
  }
  EXPECT_EQ(optimizer.finalists(), std::vector<Vector>{expected});
  EXPECT_EQ(optimizer.steps_done(), optimizer.steps_total());
}

TEST(PaperOptimizer, profiles_each_head_by_the_fall_of_the_loss) {
  PaperOptimizer optimizer(8);
  run(optimizer, separable(kTargets));
  const double g = std::log(1.5);
  for (size_t head = 0; head < 8; ++head) {
    EXPECT_NEAR(optimizer.profile()[head], g * kTargets[head] - g * g / 2, 1e-12);
  }
}

TEST(PaperOptimizer, measures_both_sides_when_two_sided) {
  PaperOptions options;
  options.two_sided = true;
  PaperOptimizer optimizer(8, options);
  EXPECT_EQ(run(optimizer, separable(kTargets)), 1 + 16 + 12);
  for (size_t head = 0; head < 8; ++head) {
    EXPECT_NEAR(optimizer.profile()[head], std::log(1.5) * kTargets[head], 1e-12);
  }
  EXPECT_EQ(optimizer.group(), (std::vector<int64_t>{0, 2, 3, 4, 6, 7}));  // all t_h > 0
}

TEST(PaperOptimizer, scales_the_down_effective_heads_down_when_they_are_the_larger_group) {
  Vector targets = kTargets;
  for (double& target : targets) target = -target;
  const PaperOptions options;
  PaperOptimizer optimizer(8, options);
  run(optimizer, separable(targets));
  EXPECT_EQ(optimizer.direction(), Direction::down);
  // Down-effective: t_h < 0.203, which are all but the two of +0.4 and +1.0; mean of the six: -0.7.
  EXPECT_EQ(optimizer.group(), (std::vector<int64_t>{0, 2, 3, 4, 6, 7}));
  ASSERT_EQ(optimizer.finalists().size(), 1u);
  EXPECT_EQ(optimizer.finalists()[0][0], log_of_sweep_nearest(options, -0.7));
  EXPECT_EQ(optimizer.finalists()[0][1], 0);
}

TEST(PaperOptimizer, prefers_up_when_the_groups_are_of_one_size) {
  PaperOptimizer optimizer(4);
  run(optimizer, separable({1.0, -1.0, 1.0, -1.0}));
  EXPECT_EQ(optimizer.direction(), Direction::up);
  EXPECT_EQ(optimizer.group(), (std::vector<int64_t>{0, 2}));
}

TEST(PaperOptimizer, tunes_the_top_fraction_of_the_group_by_size_of_effect) {
  PaperOptions options;
  options.top_fraction = 0.6;  // of five heads
  PaperOptimizer optimizer(8, options);
  run(optimizer, separable(kTargets));
  EXPECT_EQ(optimizer.group(), (std::vector<int64_t>{0, 2, 3}));
  options.top_fraction = 0.01;
  PaperOptimizer one(8, options);
  run(one, separable(kTargets));
  EXPECT_EQ(one.group(), (std::vector<int64_t>{0}));
}

// 1 - accuracy of 20 examples: a staircase, mostly flat.
double error_rate(const Vector& x) {
  double right = 0;
  for (int example = 0; example < 20; ++example) {
    const double evidence = 0.5 * x[0] + 0.5 * x[1] - 0.3 * x[2] - 0.6 + 0.1 * example;
    right += evidence > 0 ? 1 : 0;
  }
  return 1 - right / 20;
}

TEST(PaperOptimizer, works_on_error_rates_and_leaves_heads_without_effect_out) {
  const auto without_head_3 = [](const Vector& x) { return error_rate({x[0], x[1], x[2]}); };
  PaperOptimizer optimizer(4);
  run(optimizer, without_head_3);
  EXPECT_EQ(optimizer.direction(), Direction::up);
  EXPECT_EQ(optimizer.group(), (std::vector<int64_t>{0, 1}));
  EXPECT_EQ(optimizer.profile()[3], 0);
  // Every gamma from e^0.6 = 1.82 answers all examples: of 2, 2.75 and 4 the gamma nearest 1 wins.
  EXPECT_EQ(optimizer.finalists(), (std::vector<Vector>{{std::log(2.0), std::log(2.0), 0, 0}}));
}

TEST(PaperOptimizer, proposes_nothing_when_no_head_has_an_effect) {
  PaperOptimizer optimizer(5);
  EXPECT_EQ(run(optimizer, [](const Vector&) { return 0.25; }), 6);
  EXPECT_EQ(optimizer.direction(), Direction::none);
  EXPECT_TRUE(optimizer.finalists().empty());
  EXPECT_EQ(optimizer.progress(), "finished: no head has an effect");
}

TEST(PaperOptimizer, proposes_nothing_when_the_sweep_finds_nothing_better) {
  PaperOptions options;
  options.sweep = {0.1, 4.0};  // both far from the optimum of the one up-effective head
  PaperOptimizer optimizer(1, options);
  EXPECT_EQ(run(optimizer, separable({0.3})), 1 + 1 + 2);
  EXPECT_TRUE(optimizer.finalists().empty());
  EXPECT_EQ(optimizer.progress(), "finished");
}

TEST(PaperOptimizer, takes_a_head_whose_evaluation_failed_for_down_effective) {
  PaperOptimizer optimizer(3);
  run(optimizer, [](const Vector& x) { return x[0] > 0 ? std::nan("") : -x[1] - x[2]; });
  EXPECT_EQ(optimizer.profile()[0], -std::numeric_limits<double>::infinity());
  EXPECT_EQ(optimizer.group(), (std::vector<int64_t>{1, 2}));
}

TEST(PaperOptimizer, asks_in_chunks_and_shows_the_profile_as_it_grows) {
  PaperOptions options;
  options.chunk = 3;
  PaperOptimizer optimizer(8, options);
  const Quadratic function = separable(kTargets);
  size_t largest = 0;
  run(optimizer, function, [&] {
    largest = std::max(largest, optimizer.ask().size());
    return optimizer.steps_done() == 6;
  });
  EXPECT_EQ(largest, 3u);
  EXPECT_EQ(optimizer.progress(), "profile 5/8");
  EXPECT_FALSE(std::isnan(optimizer.profile()[4]));
  EXPECT_TRUE(std::isnan(optimizer.profile()[5]));
  PaperOptimizer at_once(8);
  run(optimizer, function);
  run(at_once, function);
  EXPECT_EQ(optimizer.finalists(), at_once.finalists());
  EXPECT_EQ(optimizer.sweep_losses(), at_once.sweep_losses());
}

TEST(PaperOptimizer, refuses_options_out_of_range) {
  PaperOptions options;
  options.profile_gamma = 1;
  EXPECT_THROW(PaperOptimizer(2, options), std::invalid_argument);
  options = {};
  options.sweep = {};
  EXPECT_THROW(PaperOptimizer(2, options), std::invalid_argument);
  options.sweep = {1.0, 0.0};
  EXPECT_THROW(PaperOptimizer(2, options), std::invalid_argument);
  options = {};
  options.top_fraction = 0;
  EXPECT_THROW(PaperOptimizer(2, options), std::invalid_argument);
  options = {};
  options.chunk = 0;
  EXPECT_THROW(PaperOptimizer(2, options), std::invalid_argument);
}

}  // namespace
}  // namespace zerotuning::search::testing
