// Adam on log gamma with a penalty, a bound and early stopping.
#include "search/gradient_optimizer.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace zerotuning::search {
namespace {

constexpr double kPi = 3.14159265358979323846;

bool is_zero(const std::vector<double>& point) {
  return std::all_of(point.begin(), point.end(), [](double value) { return value == 0; });
}

void check(const GradientOptions& options) {
  const auto integer = [](int64_t value) { return static_cast<double>(value); };
  require(options.steps >= 1, "steps", "at least 1", integer(options.steps));
  require(options.learning_rate > 0 && std::isfinite(options.learning_rate), "learning_rate",
          "positive and finite", options.learning_rate);
  require(options.beta1 >= 0 && options.beta1 < 1, "beta1", "in [0, 1)", options.beta1);
  require(options.beta2 >= 0 && options.beta2 < 1, "beta2", "in [0, 1)", options.beta2);
  require(options.epsilon > 0 && std::isfinite(options.epsilon), "epsilon", "positive and finite",
          options.epsilon);
  require(options.penalty >= 0 && std::isfinite(options.penalty), "penalty",
          "finite and not negative", options.penalty);
  require(options.max_abs_log_scale > 0 && std::isfinite(options.max_abs_log_scale),
          "max_abs_log_scale", "positive and finite", options.max_abs_log_scale);
  require(options.evaluate_every >= 1, "evaluate_every", "at least 1",
          integer(options.evaluate_every));
  require(options.patience >= 0, "patience", "at least 0", integer(options.patience));
  require(options.average >= 0 && options.average < 1, "average", "in [0, 1)", options.average);
}

}  // namespace

GradientOptimizer::State::State(int64_t dimension)
    : point(static_cast<size_t>(dimension), 0.0),
      mean_gradient(point),
      mean_square(point),
      average(point),
      incumbent(dimension) {}

GradientOptimizer::GradientOptimizer(int64_t dimension, GradientOptions options)
    : Optimizer(dimension), options_(std::move(options)), state_(dimension) {
  check(options_);
  state_.point = checked_start(options_.start, dimension, options_.max_abs_log_scale);
  plan_next();
}

std::string GradientOptimizer::progress() const {
  return "step " + std::to_string(steps_done()) + "/" + std::to_string(options_.steps) +
         (stopped_early() ? ", stopped early" : "");
}

int64_t GradientOptimizer::steps_done() const { return std::min(state_.step, options_.steps); }

bool GradientOptimizer::stopped_early() const {
  return options_.patience > 0 && state_.step < options_.steps &&
         state_.evaluations_without_improvement >= options_.patience;
}

bool GradientOptimizer::is_due() const {
  return state_.step % options_.evaluate_every == 0 || state_.step == options_.steps;
}

std::vector<Evaluation> GradientOptimizer::plan() const {
  std::vector<Evaluation> wanted;
  if (stopped_early() || state_.step > options_.steps) return wanted;
  const bool stepping = state_.step < options_.steps;
  if (stepping) wanted.push_back({state_.point, Part::fit, true});
  if (state_.step == 0 && !is_zero(state_.point)) {
    wanted.push_back({zeros(), judging_part(), false});
  }
  if (!stepping || (options_.held_out && is_due())) {
    wanted.push_back({state_.point, judging_part(), false});
  }
  if (options_.average > 0 && state_.step > 0 && is_due()) {
    wanted.push_back({averaged_point(), judging_part(), false});
  }
  return wanted;
}

void GradientOptimizer::learn(const std::vector<Evaluation>& asked,
                              const std::vector<Outcome>& outcomes) {
  judge(asked, outcomes);
  if (stopped_early()) return;
  if (asked.front().gradient) take_step(outcomes.front().gradient);
  ++state_.step;
}

void GradientOptimizer::judge(const std::vector<Evaluation>& asked,
                              const std::vector<Outcome>& outcomes) {
  double lowest = std::numeric_limits<double>::infinity();
  for (size_t i = 0; i < asked.size(); ++i) {
    if (asked[i].part != judging_part()) continue;
    const bool baseline = state_.step == 0 && is_zero(asked[i].point);
    if (baseline) state_.incumbent.set_baseline(outcomes[i].loss);
    if (!baseline || is_zero(state_.point)) lowest = std::min(lowest, outcomes[i].loss);
  }
  if (std::isinf(lowest)) return;  // nothing was due
  for (size_t i = 0; i < asked.size(); ++i) {
    if (asked[i].part == judging_part()) {
      state_.incumbent.consider(asked[i].point, outcomes[i].loss);
    }
  }
  const bool improved = lowest < state_.path_best;
  state_.path_best = std::min(state_.path_best, lowest);
  state_.evaluations_without_improvement =
      improved ? 0 : state_.evaluations_without_improvement + 1;
}

double GradientOptimizer::learning_rate() const {
  if (options_.schedule == Schedule::constant) return options_.learning_rate;
  const double progress = static_cast<double>(state_.step) / static_cast<double>(options_.steps);
  return options_.learning_rate * 0.5 * (1 + std::cos(kPi * progress));
}

void GradientOptimizer::take_step(const std::vector<double>& gradient) {
  const double count = static_cast<double>(state_.step + 1);
  const double correction1 = 1 - std::pow(options_.beta1, count);
  const double correction2 = 1 - std::pow(options_.beta2, count);
  const double rate = learning_rate();
  const double bound = options_.max_abs_log_scale;
  for (size_t i = 0; i < size(); ++i) {
    double& x = state_.point[i];
    double& mean = state_.mean_gradient[i];
    double& square = state_.mean_square[i];
    const double slope = gradient[i] + options_.penalty * x;
    mean = options_.beta1 * mean + (1 - options_.beta1) * slope;
    square = options_.beta2 * square + (1 - options_.beta2) * slope * slope;
    const double direction =
        (mean / correction1) / (std::sqrt(square / correction2) + options_.epsilon);
    x = std::clamp(x - rate * direction, -bound, bound);
    state_.average[i] = options_.average * state_.average[i] + (1 - options_.average) * x;
  }
}

std::vector<double> GradientOptimizer::averaged_point() const {
  std::vector<double> point = state_.average;
  const double weight = 1 - std::pow(options_.average, static_cast<double>(state_.step));
  for (double& value : point) value /= weight;
  return point;
}

void GradientOptimizer::write_options(StateWriter& writer) const {
  constexpr int64_t most = std::numeric_limits<int64_t>::max();
  writer.integer("steps", options_.steps, 1, most);
  writer.number("learning_rate", options_.learning_rate);
  writer.number("beta1", options_.beta1);
  writer.number("beta2", options_.beta2);
  writer.number("epsilon", options_.epsilon);
  writer.number("penalty", options_.penalty);
  writer.number("max_abs_log_scale", options_.max_abs_log_scale);
  writer.word("schedule", options_.schedule == Schedule::cosine ? "cosine" : "constant");
  writer.integer("evaluate_every", options_.evaluate_every, 1, most);
  writer.integer("patience", options_.patience, 0, most);
  writer.flag("held_out", options_.held_out);
  writer.number("average", options_.average);
  writer.numbers("start", options_.start, 0, dimension());
}

template <class Archive, class MaybeConstState>
void GradientOptimizer::list_state(Archive& archive, MaybeConstState& state) const {
  archive.integer("step", state.step, 0, options_.steps + 1);
  archive.numbers("point", state.point, dimension());
  archive.numbers("mean_gradient", state.mean_gradient, dimension());
  archive.numbers("mean_square", state.mean_square, dimension());
  archive.numbers("average_point", state.average, dimension());
  archive.number("path_best", state.path_best);
  archive.integer("evaluations_without_improvement", state.evaluations_without_improvement, 0,
                  options_.steps + 1);
  list_fields(archive, state.incumbent);
}

void GradientOptimizer::write(StateWriter& writer) const { list_state(writer, state_); }

void GradientOptimizer::read(StateReader& reader) {
  State restored(dimension());
  list_state(reader, restored);
  reader.end();
  state_ = std::move(restored);
}

}  // namespace zerotuning::search
