// Adam on log gamma.
#include "search/gradient_stepper.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <utility>

#include "search/argument_checks.h"

namespace zerotuning::search {
namespace {

constexpr double kPi = 3.14159265358979323846;

GradientOptions checked(GradientOptions options) {
  require(options.steps >= 1, "steps", "at least 1", static_cast<double>(options.steps));
  require(options.learning_rate > 0 && std::isfinite(options.learning_rate), "learning_rate",
          "positive and finite", options.learning_rate);
  require(options.beta1 >= 0 && options.beta1 < 1, "beta1", "in [0, 1)", options.beta1);
  require(options.beta2 >= 0 && options.beta2 < 1, "beta2", "in [0, 1)", options.beta2);
  require(options.epsilon > 0 && std::isfinite(options.epsilon), "epsilon", "positive and finite",
          options.epsilon);
  require(options.l2_penalty >= 0 && std::isfinite(options.l2_penalty), "l2_penalty",
          "finite and not negative", options.l2_penalty);
  require(options.max_abs_log_scale > 0 && std::isfinite(options.max_abs_log_scale),
          "max_abs_log_scale", "positive and finite", options.max_abs_log_scale);
  require(options.average_decay >= 0 && options.average_decay < 1, "average_decay", "in [0, 1)",
          options.average_decay);
  return options;
}

int64_t checked_dimension(int64_t dimension) {
  require(dimension >= 1, "dimension", "at least 1", static_cast<double>(dimension));
  return dimension;
}

}  // namespace

GradientStepper::State::State(size_t dimension)
    : point(dimension, 0.0), mean_gradient(point), mean_square(point), average(point) {}

GradientStepper::GradientStepper(int64_t dimension, GradientOptions options)
    : dimension_(checked_dimension(dimension)),
      options_(checked(std::move(options))),
      state_(static_cast<size_t>(dimension)) {
  state_.point = checked_start(options_.start, dimension, options_.max_abs_log_scale);
}

std::vector<double> GradientStepper::averaged_point() const {
  if (state_.steps_done == 0) return state_.point;
  std::vector<double> point = state_.average;
  const auto count = static_cast<double>(state_.steps_done);
  const double weight = 1 - std::pow(options_.average_decay, count);
  for (double& value : point) value /= weight;
  return point;
}

double GradientStepper::learning_rate() const {
  if (options_.schedule == Schedule::constant) return options_.learning_rate;
  const double progress =
      static_cast<double>(state_.steps_done) / static_cast<double>(options_.steps);
  return options_.learning_rate * 0.5 * (1 + std::cos(kPi * progress));
}

void GradientStepper::check_gradient(const std::vector<double>& gradient) const {
  if (gradient.size() != state_.point.size()) {
    throw std::invalid_argument("gradient must have " + std::to_string(dimension_) +
                                " numbers, got " + std::to_string(gradient.size()));
  }
  for (size_t i = 0; i < gradient.size(); ++i) {
    if (!std::isfinite(gradient[i])) {
      throw std::invalid_argument("gradient[" + std::to_string(i) + "] must be finite, got " +
                                  decimal(gradient[i]));
    }
  }
}

void GradientStepper::step(const std::vector<double>& gradient) {
  if (finished()) {
    throw std::invalid_argument("all " + std::to_string(options_.steps) +
                                " steps are done: no further step is possible");
  }
  check_gradient(gradient);
  const auto count = static_cast<double>(state_.steps_done + 1);
  const double correction1 = 1 - std::pow(options_.beta1, count);
  const double correction2 = 1 - std::pow(options_.beta2, count);
  const double rate = learning_rate();
  const double bound = options_.max_abs_log_scale;
  for (size_t i = 0; i < gradient.size(); ++i) {
    double& x = state_.point[i];
    double& mean = state_.mean_gradient[i];
    double& square = state_.mean_square[i];
    double& average = state_.average[i];
    const double slope = gradient[i] + options_.l2_penalty * x;
    mean = options_.beta1 * mean + (1 - options_.beta1) * slope;
    square = options_.beta2 * square + (1 - options_.beta2) * slope * slope;
    const double direction =
        (mean / correction1) / (std::sqrt(square / correction2) + options_.epsilon);
    x = std::clamp(x - rate * direction, -bound, bound);
    average = options_.average_decay * average + (1 - options_.average_decay) * x;
  }
  ++state_.steps_done;
}

void GradientStepper::write_heading(StateWriter& writer) const {
  writer.word("method", "gradient");
  writer.integer("dimension", dimension_, 1, dimension_);
  writer.integer("steps", options_.steps, 1, options_.steps);
  writer.number("learning_rate", options_.learning_rate);
  writer.number("beta1", options_.beta1);
  writer.number("beta2", options_.beta2);
  writer.number("epsilon", options_.epsilon);
  writer.number("l2_penalty", options_.l2_penalty);
  writer.number("max_abs_log_scale", options_.max_abs_log_scale);
  writer.word("schedule", options_.schedule == Schedule::cosine ? "cosine" : "constant");
  writer.number("average_decay", options_.average_decay);
  writer.numbers("start", options_.start, 0, dimension_);
}

template <class Archive, class MaybeConstState>
void GradientStepper::list_state(Archive& archive, MaybeConstState& state) const {
  archive.integer("steps_done", state.steps_done, 0, options_.steps);
  archive.numbers("point", state.point, dimension_);
  archive.numbers("mean_gradient", state.mean_gradient, dimension_);
  archive.numbers("mean_square", state.mean_square, dimension_);
  archive.numbers("average_point", state.average, dimension_);
}

std::string GradientStepper::state() const {
  StateWriter writer;
  write_heading(writer);
  list_state(writer, state_);
  return writer.json();
}

void GradientStepper::restore(const std::string& state) {
  StateWriter expected;
  write_heading(expected);
  StateReader reader(state);
  reader.same(expected);
  State restored(state_.point.size());
  list_state(reader, restored);
  reader.end();
  for (size_t i = 0; i < restored.point.size(); ++i) {
    require(std::fabs(restored.point[i]) <= options_.max_abs_log_scale, "state: point",
            "within max_abs_log_scale", restored.point[i]);
    require(restored.mean_square[i] >= 0, "state: mean_square", "not negative",
            restored.mean_square[i]);
  }
  state_ = std::move(restored);
}

}  // namespace zerotuning::search
