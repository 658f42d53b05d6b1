// The contract of ask, tell, state and restore, for every search.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <stdexcept>

#include "search/cma_es_optimizer.h"
#include "search/gradient_stepper.h"
#include "search/paper_optimizer.h"
#include "test_functions.h"

namespace zerotuning::search::testing {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::string error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "no error";
}

// Replaces the first occurrence of `from`, which must exist.
std::string replaced(std::string text, const std::string& from, const std::string& to) {
  EXPECT_NE(text.find(from), std::string::npos) << from;
  return text.replace(text.find(from), from.size(), to);
}

// Every proper beginning of the state, and states whose fields are damaged, are refused.
void expect_damage_is_refused(const std::string& state,
                              const std::function<void(const std::string&)>& restore) {
  const std::string object = state.substr(0, state.rfind('}'));
  for (size_t length = 0; length < object.size(); length += 1 + object.size() / 200) {
    EXPECT_NE(error_of([&] { restore(object.substr(0, length)); }), "no error") << length;
  }
  EXPECT_NE(error_of([&] { restore(state + "x"); }), "no error");
  EXPECT_EQ(error_of([&] { restore(object + ", \"more\": 1}"); }),
            "state: unexpected field 'more'");
  EXPECT_EQ(error_of([&] { restore(object + ", \"method\": 1}"); }),
            "state: field 'method' appears twice");
  EXPECT_EQ(error_of([&] { restore(replaced(state, "\"dimension\"", "\"dimensions\"")); }),
            "state: field 'dimension' is missing");
  EXPECT_EQ(error_of([&] { restore(replaced(state, "\"zerotuning-search 2\"", "2")); }),
            "state: format: expected \"zerotuning-search 2\", got 2");
}

struct Method {
  std::string name;
  std::function<std::unique_ptr<Optimizer>(int64_t dimension)> make;
};

std::unique_ptr<Optimizer> make_paper(int64_t dimension, bool two_sided) {
  PaperOptions options;
  options.chunk = 4;
  options.two_sided = two_sided;
  return std::make_unique<PaperOptimizer>(dimension, options);
}

std::unique_ptr<Optimizer> make_cma_es(int64_t dimension, bool diagonal) {
  CmaEsOptions options;
  options.evaluations = 600;
  options.seed = 0xfedcba9876543210u;
  options.diagonal = diagonal;
  return std::make_unique<CmaEsOptimizer>(dimension, options);
}

class EveryMethod : public ::testing::TestWithParam<Method> {
 protected:
  static constexpr int64_t kDimension = 7;
  std::unique_ptr<Optimizer> make(int64_t dimension = kDimension) const {
    return GetParam().make(dimension);
  }
  const Quadratic function_ = quadratic(7, 30);
  // The evaluation fails where the first head is scaled up far.
  double loss(const Vector& x) const { return x[0] > 0.4 ? kNan : function_(x); }
  std::vector<double> losses(const Optimizer& optimizer) const {
    return losses_asked_for(optimizer, [this](const Vector& x) { return loss(x); });
  }
};

INSTANTIATE_TEST_SUITE_P(
    Search, EveryMethod,
    ::testing::Values(Method{"paper", [](int64_t n) { return make_paper(n, false); }},
                      Method{"paper_two_sided", [](int64_t n) { return make_paper(n, true); }},
                      Method{"cma_es", [](int64_t n) { return make_cma_es(n, false); }},
                      Method{"cma_es_diagonal", [](int64_t n) { return make_cma_es(n, true); }}),
    [](const auto& method) { return method.param.name; });

TEST_P(EveryMethod, restored_at_every_ask_goes_the_same_way_to_the_last_bit) {
  const auto uninterrupted = make();
  auto restored = make();
  while (!uninterrupted->finished()) {
    auto fresh = make();
    fresh->restore(restored->state());
    restored = std::move(fresh);
    EXPECT_EQ(restored->ask(), uninterrupted->ask());
    EXPECT_EQ(restored->progress(), uninterrupted->progress());
    restored->tell(losses(*restored));
    uninterrupted->tell(losses(*uninterrupted));
    EXPECT_EQ(restored->state(), uninterrupted->state());
  }
  EXPECT_TRUE(restored->finished());
  EXPECT_EQ(restored->finalists(), uninterrupted->finalists());
}

TEST_P(EveryMethod, proposes_a_point_that_improves_on_zero) {
  const auto optimizer = make();
  EXPECT_TRUE(optimizer->finalists().empty());
  run(*optimizer, function_);
  EXPECT_NE(best_finalist(*optimizer, function_), Vector(7, 0.0));
  EXPECT_TRUE(optimizer->ask().empty());
  EXPECT_LE(optimizer->steps_done(), optimizer->steps_total());
  EXPECT_NO_THROW(optimizer->tell({}));
}

TEST_P(EveryMethod, asks_for_the_same_points_until_tell_is_called) {
  const auto optimizer = make();
  optimizer->tell(losses(*optimizer));
  EXPECT_EQ(optimizer->ask(), optimizer->ask());
}

TEST_P(EveryMethod, refuses_another_number_of_losses_and_stays_as_it_was) {
  const auto optimizer = make();
  optimizer->tell(losses(*optimizer));
  const std::string before = optimizer->state();
  const std::vector<Vector> points = optimizer->ask();
  const std::vector<double> right = losses(*optimizer);
  std::vector<double> more = right;
  more.push_back(1);
  EXPECT_NE(error_of([&] { optimizer->tell(more); }), "no error");
  EXPECT_EQ(error_of([&] { optimizer->tell({}); }),
            "losses must have " + std::to_string(right.size()) +
                " numbers, one for each point of the last ask(), got 0");
  EXPECT_EQ(optimizer->state(), before);
  EXPECT_EQ(optimizer->ask(), points);
  optimizer->tell(right);
  EXPECT_NE(optimizer->state(), before);
}

TEST_P(EveryMethod, refuses_a_damaged_state_and_stays_as_it_was) {
  const auto source = make();
  source->tell(losses(*source));
  const auto optimizer = make();
  const std::string before = optimizer->state();
  expect_damage_is_refused(source->state(),
                           [&](const std::string& state) { optimizer->restore(state); });
  EXPECT_EQ(optimizer->state(), before);
  EXPECT_EQ(optimizer->ask(), make()->ask());
}

TEST_P(EveryMethod, refuses_a_state_of_another_dimension_and_names_both) {
  const std::string error = error_of([&] { make(8)->restore(make(7)->state()); });
  EXPECT_EQ(error, "state: dimension does not match: this search has 8, the state has 7");
}

GradientStepper make_stepper(int64_t dimension = 7) {
  GradientOptions options;
  options.steps = 12;
  options.average_decay = 0.9;
  options.start.assign(static_cast<size_t>(dimension), 0.3);
  return GradientStepper(dimension, options);
}

TEST(GradientStepperState, restored_at_every_step_goes_the_same_way_to_the_last_bit) {
  const Quadratic function = quadratic(7, 30);
  GradientStepper uninterrupted = make_stepper();
  GradientStepper restored = make_stepper();
  while (!uninterrupted.finished()) {
    GradientStepper fresh = make_stepper();
    fresh.restore(restored.state());
    restored = fresh;
    restored.step(function.gradient(restored.point()));
    uninterrupted.step(function.gradient(uninterrupted.point()));
    EXPECT_EQ(restored.point(), uninterrupted.point());
    EXPECT_EQ(restored.averaged_point(), uninterrupted.averaged_point());
    EXPECT_EQ(restored.state(), uninterrupted.state());
  }
}

TEST(GradientStepperState, that_is_damaged_is_refused) {
  GradientStepper source = make_stepper();
  source.step(Vector(7, 1.0));
  GradientStepper stepper = make_stepper();
  const std::string before = stepper.state();
  const auto restore = [&](const std::string& state) { stepper.restore(state); };
  expect_damage_is_refused(source.state(), restore);
  const auto error = [&](const std::string& from, const std::string& to) {
    return error_of([&] { restore(replaced(before, from, to)); });
  };
  EXPECT_EQ(error("\"steps_done\": 0", "\"steps_done\": 13"),
            "state: steps_done: expected an integer from 0 to 12, got 13");
  EXPECT_EQ(error("\"point\": [0.3", "\"point\": [\"NaN\""),
            "state: point[0]: expected a finite number, got \"NaN\"");
  EXPECT_EQ(error("\"point\": [0.3", "\"point\": [9.5"),
            "state: point must be within max_abs_log_scale, got 9.5");
  EXPECT_EQ(error("\"point\": [0.3, ", "\"point\": ["),
            "state: point: expected a list of 7 numbers, got 6");
  EXPECT_EQ(error("\"point\": [0.3", "\"point\": [null"),
            "state: point[0]: expected a number, got null");
  EXPECT_EQ(stepper.state(), before);
}

TEST(State, of_another_method_is_refused_with_both_names) {
  GradientStepper gradient(3);
  EXPECT_EQ(error_of([&] { gradient.restore(PaperOptimizer(3).state()); }),
            "state: method does not match: this search has gradient, the state has paper");
}

TEST(State, of_other_options_is_refused_with_the_option_and_both_values) {
  GradientOptions options;
  options.learning_rate = 0.05;
  GradientStepper slower(3, options);
  EXPECT_EQ(error_of([&] { slower.restore(GradientStepper(3).state()); }),
            "state: learning_rate does not match: this search has 0.05, the state has 0.1");
  PaperOptions paper_options;
  paper_options.sweep = {2.0};
  PaperOptimizer paper(3, paper_options);
  EXPECT_EQ(error_of([&] { paper.restore(PaperOptimizer(3).state()); }),
            "state: sweep does not match: this search has a list of 1 numbers, the state has a "
            "list of 12 numbers");
  CmaEsOptions cma_options;
  cma_options.seed = 0xfffffffffffffffeu;  // as a double equal to 2^64 - 1
  CmaEsOptimizer cma(3, cma_options);
  cma_options.seed = 0xffffffffffffffffu;
  EXPECT_EQ(error_of([&] { cma.restore(CmaEsOptimizer(3, cma_options).state()); }),
            "state: seed does not match: this search has 18446744073709551614, the state has "
            "18446744073709551615");
}

TEST(StateJson, carries_every_double_to_the_last_bit) {
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
  writer.losses("values", values, 13, 13);
  writer.loss("missing", kNan);
  StateReader reader(writer.json());
  Vector back;
  double missing = 0;
  reader.losses("values", back, 13, 13);
  reader.loss("missing", missing);
  reader.end();
  EXPECT_EQ(back, values);
  EXPECT_TRUE(std::signbit(back[1]));
  EXPECT_TRUE(std::isnan(missing));
}

TEST(StateJson, is_json_with_few_digits) {
  StateWriter writer;
  writer.word("name", "cma-es");
  writer.flag("yes", true);
  writer.numbers("numbers", {-0.1, 2, -0.0, kInfinity}, 4);
  writer.numbers("none", {}, 0);
  EXPECT_EQ(writer.json(),
            "{\n"
            "  \"format\": \"zerotuning-search 2\",\n"
            "  \"name\": \"cma-es\",\n"
            "  \"yes\": true,\n"
            "  \"numbers\": [-0.1, 2.0, -0.0, \"Infinity\"],\n"
            "  \"none\": []\n"
            "}\n");
}

TEST(StateJson, is_read_in_any_order_and_layout) {
  StateReader reader(
      "{\"b\":[1,2E0 ,\t\"-Infinity\"],\r\n\"a\":7,\"format\":\"zerotuning-search 2\"}");
  int64_t a = 0;
  Vector b;
  reader.integer("a", a, 0, 9);
  reader.losses("b", b, 0, 3);
  reader.end();
  EXPECT_EQ(a, 7);
  EXPECT_EQ(b, (Vector{1, 2, -kInfinity}));
}

TEST(StateJson, names_the_field_that_is_wrong) {
  StateWriter writer;
  writer.integer("step", 31, 0, 31);
  writer.word("scale", "large");
  int64_t step = 0;
  double scale = 0;
  Vector scales;
  StateReader reader(writer.json());
  EXPECT_EQ(error_of([&] { reader.number("rate", scale); }), "state: field 'rate' is missing");
  EXPECT_EQ(error_of([&] { StateReader(reader).integer("step", step, 0, 30); }),
            "state: step: expected an integer from 0 to 30, got 31");
  EXPECT_EQ(error_of([&] { StateReader(reader).numbers("step", scales, 1); }),
            "state: step: expected a list of 1 numbers, got 31");
  reader.integer("step", step, 0, 31);
  EXPECT_EQ(error_of([&] { reader.end(); }), "state: unexpected field 'scale'");
  EXPECT_EQ(error_of([&] { reader.number("scale", scale); }),
            "state: scale: expected a number, got \"large\"");
}

TEST(StateJson, errors_give_the_character_where_a_text_is_no_json_object) {
  EXPECT_EQ(error_of([] { StateReader(""); }),
            "state: no JSON object of numbers, strings and lists: expected '{' at character 1, got "
            "the end");
  EXPECT_EQ(error_of([] { StateReader("{\"a\": [[1]]}"); }),
            "state: no JSON object of numbers, strings and lists: expected a value at character 8, "
            "got '[1]]}'");
  EXPECT_EQ(
      error_of([] { StateReader("{\"a"); }),
      "state: no JSON object of numbers, strings and lists: expected '\"' at character 4, got "
      "the end");
}

}  // namespace
}  // namespace zerotuning::search::testing
