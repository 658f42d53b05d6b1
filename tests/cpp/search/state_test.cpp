// What all searches promise of ask, tell, state and restore.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>

#include "search/cma_es_optimizer.h"
#include "search/gradient_optimizer.h"
#include "search/paper_optimizer.h"
#include "test_functions.h"

namespace zerotuning::search::testing {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Method {
  std::string name;
  std::function<std::unique_ptr<Optimizer>(int64_t dimension)> make;
};

std::unique_ptr<Optimizer> make_gradient(int64_t dimension, bool held_out, double average) {
  GradientOptions options;
  options.steps = 12;
  options.evaluate_every = 3;
  options.held_out = held_out;
  options.average = average;
  options.start.assign(static_cast<size_t>(dimension), average / 3);
  return std::make_unique<GradientOptimizer>(dimension, options);
}

std::unique_ptr<Optimizer> make_paper(int64_t dimension, bool two_sided) {
  PaperOptions options;
  options.chunk = 4;
  options.two_sided = two_sided;
  options.held_out = !two_sided;
  return std::make_unique<PaperOptimizer>(dimension, options);
}

std::unique_ptr<Optimizer> make_cma_es(int64_t dimension, bool diagonal) {
  CmaEsOptions options;
  options.evaluations = 600;
  options.seed = 0xfedcba9876543210u;
  options.diagonal = diagonal;
  options.held_out = !diagonal;
  return std::make_unique<CmaEsOptimizer>(dimension, options);
}

class EveryMethod : public ::testing::TestWithParam<Method> {
 protected:
  static constexpr int64_t kDimension = 7;
  std::unique_ptr<Optimizer> make(int64_t dimension = kDimension) const {
    return GetParam().make(dimension);
  }
  const Problem problem_ = quadratic(7, 30).problem();
};

INSTANTIATE_TEST_SUITE_P(
    Search, EveryMethod,
    ::testing::Values(
        Method{"gradient", [](int64_t n) { return make_gradient(n, true, 0); }},
        Method{"gradient_with_average", [](int64_t n) { return make_gradient(n, true, 0.9); }},
        Method{"gradient_without_held_out", [](int64_t n) { return make_gradient(n, false, 0.5); }},
        Method{"paper", [](int64_t n) { return make_paper(n, false); }},
        Method{"paper_two_sided", [](int64_t n) { return make_paper(n, true); }},
        Method{"cma_es", [](int64_t n) { return make_cma_es(n, false); }},
        Method{"cma_es_diagonal", [](int64_t n) { return make_cma_es(n, true); }}),
    [](const auto& method) { return method.param.name; });

void expect_same_questions(const std::vector<Evaluation>& a, const std::vector<Evaluation>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_EQ(a[i].point, b[i].point);  // to the last bit
    EXPECT_EQ(a[i].part, b[i].part);
    EXPECT_EQ(a[i].gradient, b[i].gradient);
  }
}

TEST_P(EveryMethod, restored_at_every_ask_goes_the_same_way_to_the_last_bit) {
  const auto uninterrupted = make();
  auto restored = make();
  while (!uninterrupted->finished()) {
    auto fresh = make();
    fresh->restore(restored->state());
    restored = std::move(fresh);
    expect_same_questions(restored->ask(), uninterrupted->ask());
    EXPECT_EQ(restored->progress(), uninterrupted->progress());
    restored->tell(answer(problem_, *restored));
    uninterrupted->tell(answer(problem_, *uninterrupted));
    EXPECT_EQ(restored->state(), uninterrupted->state());
  }
  EXPECT_TRUE(restored->finished());
  EXPECT_EQ(restored->best(), uninterrupted->best());
  EXPECT_EQ(restored->best_loss(), uninterrupted->best_loss());
}

TEST_P(EveryMethod, improves_on_zero_and_says_so) {
  const auto optimizer = make();
  EXPECT_TRUE(std::isnan(optimizer->best_loss()));
  EXPECT_EQ(optimizer->best(), Vector(7, 0.0));
  run(*optimizer, problem_);
  EXPECT_EQ(optimizer->baseline_loss(), problem_.held_out(Vector(7, 0.0)));
  EXPECT_LT(optimizer->best_loss(), optimizer->baseline_loss());
  EXPECT_EQ(optimizer->best_loss(), problem_.held_out(optimizer->best()));
  EXPECT_TRUE(optimizer->ask().empty());
  EXPECT_LE(optimizer->steps_done(), optimizer->steps_total());
  EXPECT_NO_THROW(optimizer->tell({}));
}

TEST_P(EveryMethod, asks_the_same_until_it_is_told) {
  const auto optimizer = make();
  optimizer->tell(answer(problem_, *optimizer));
  expect_same_questions(optimizer->ask(), optimizer->ask());
}

std::string error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "no error";
}

TEST_P(EveryMethod, refuses_wrong_outcomes_and_stays_as_it_was) {
  const auto optimizer = make();
  optimizer->tell(answer(problem_, *optimizer));
  const std::string before = optimizer->state();
  const std::vector<Evaluation> asked = optimizer->ask();
  const std::vector<Outcome> right = answer(problem_, *optimizer);
  std::vector<std::vector<Outcome>> wrong(6, right);
  wrong[0].pop_back();
  wrong[1].push_back(right[0]);
  wrong[2].back().loss = kNan;
  wrong[3].front().loss = -kInfinity;
  wrong[4].front().gradient.push_back(0);
  wrong[5].front().gradient.assign(asked[0].gradient ? 7 : 1, kNan);
  for (const auto& outcomes : wrong) {
    EXPECT_NE(error_of([&] { optimizer->tell(outcomes); }), "no error");
    EXPECT_EQ(optimizer->state(), before);
    expect_same_questions(optimizer->ask(), asked);
  }
  const std::string count = std::to_string(right.size());
  EXPECT_EQ(error_of([&] { optimizer->tell({}); }),
            "outcomes must be " + count + ", one for each evaluation asked for, got 0");
  EXPECT_EQ(error_of([&] { optimizer->tell(wrong[3]); }),
            "outcomes[0].loss (fit) must be finite, got -inf");
  optimizer->tell(right);
  EXPECT_NE(optimizer->state(), before);
}

TEST_P(EveryMethod, refuses_a_state_that_is_cut_or_changed_and_stays_as_it_was) {
  const auto source = make();
  source->tell(answer(problem_, *source));
  const std::string state = source->state();
  const auto optimizer = make();
  const std::string before = optimizer->state();
  for (size_t length = 0; length < state.size(); length += 1 + state.size() / 200) {
    EXPECT_NE(error_of([&] { optimizer->restore(state.substr(0, length)); }), "no error") << length;
    std::string changed = state;
    changed[length] = changed[length] == '1' ? '2' : '1';
    EXPECT_NE(error_of([&] { optimizer->restore(changed); }), "no error") << length;
  }
  EXPECT_NE(error_of([&] { optimizer->restore(state + "x"); }), "no error");
  EXPECT_NE(error_of([&] { optimizer->restore(""); }), "no error");
  EXPECT_EQ(optimizer->state(), before);
  expect_same_questions(optimizer->ask(), make()->ask());
}

TEST_P(EveryMethod, refuses_a_state_of_another_dimension_and_names_both) {
  const std::string error = error_of([&] { make(8)->restore(make(7)->state()); });
  EXPECT_EQ(error, "state: dimension does not match: this optimizer has 8, the state has 7");
}

TEST(State, of_another_method_is_refused_with_both_names) {
  GradientOptimizer gradient(3);
  EXPECT_EQ(error_of([&] { gradient.restore(PaperOptimizer(3).state()); }),
            "state: method does not match: this optimizer has gradient, the state has paper");
}

TEST(State, of_other_options_is_refused_with_the_option_and_both_values) {
  GradientOptions options;
  options.learning_rate = 0.05;
  GradientOptimizer slower(3, options);
  EXPECT_EQ(error_of([&] { slower.restore(GradientOptimizer(3).state()); }),
            "state: learning_rate does not match: this optimizer has 0.05, the state has 0.1");
  PaperOptions paper_options;
  paper_options.sweep = {2.0};
  PaperOptimizer paper(3, paper_options);
  EXPECT_EQ(error_of([&] { paper.restore(PaperOptimizer(3).state()); }),
            "state: sweep does not match: this optimizer has a list of 1 numbers, the state has a "
            "list of 12 numbers");
  CmaEsOptions cma_options;
  cma_options.seed = 9;
  CmaEsOptimizer cma(3, cma_options);
  EXPECT_EQ(error_of([&] { cma.restore(CmaEsOptimizer(3).state()); }),
            "state: seed does not match: this optimizer has 9, the state has 0");
}

TEST(State, of_a_later_format_is_refused) {
  std::string state = GradientOptimizer(2).state();
  state.replace(state.find(" 1\n"), 3, " 2\n");
  EXPECT_EQ(error_of([&] { GradientOptimizer(2).restore(state); }),
            "state: expected the first line 'zerotuning-search 1', got 'zerotuning-search 2'");
}

TEST(StateText, carries_every_double_to_the_last_bit) {
  const Vector values = {0.0,
                         -0.0,
                         1.0,
                         -1.5,
                         0.1,
                         1e300,
                         -1e-300,
                         5e-324,
                         1e16,
                         1 / 3.,
                         kInfinity,
                         -kInfinity,
                         2.2250738585072014e-308};
  StateWriter writer;
  writer.numbers("values", values, 13);
  writer.number("missing", kNan);
  StateReader reader(writer.sealed());
  Vector back;
  double missing = 0;
  reader.numbers("values", back, 13);
  reader.number("missing", missing);
  reader.end();
  EXPECT_EQ(back, values);
  EXPECT_TRUE(std::signbit(back[1]));
  EXPECT_TRUE(std::isnan(missing));
}

TEST(StateText, is_read_by_any_c_library_too) {
  StateWriter writer;
  writer.number("value", -0.1);
  EXPECT_EQ(std::strtod(writer.text().c_str() + 6, nullptr), -0.1);
}

TEST(StateText, names_the_field_and_the_line_that_is_wrong) {
  StateWriter writer;
  writer.integer("step", 31, 0, 31);
  writer.word("scale", "0x1p");
  int64_t step = 0;
  double scale = 0;
  StateReader reader(writer.sealed());
  EXPECT_EQ(error_of([&] { reader.number("scale", scale); }),
            "state: line 2: expected 'scale', got 'step 31'");
  EXPECT_EQ(error_of([&] { StateReader(reader).integer("step", step, 0, 30); }),
            "state: step: expected an integer from 0 to 30, got '31'");
  reader.integer("step", step, 0, 31);
  EXPECT_EQ(error_of([&] { reader.end(); }), "state: line 3: expected the end, got 'scale 0x1p'");
  EXPECT_EQ(error_of([&] { reader.number("scale", scale); }),
            "state: scale: expected a number, got '0x1p'");
}

}  // namespace
}  // namespace zerotuning::search::testing
