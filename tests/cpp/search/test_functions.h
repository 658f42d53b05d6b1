// Functions whose optimum is known, and the loops that run a search on them.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "search/gradient_stepper.h"
#include "search/optimizer.h"

namespace zerotuning::search::testing {

using Vector = std::vector<double>;
using Loss = std::function<double(const Vector&)>;
using Gradient = std::function<Vector(const Vector&)>;

inline std::vector<double> losses_asked_for(const Optimizer& optimizer, const Loss& loss) {
  std::vector<double> losses;
  for (const Vector& point : optimizer.ask()) losses.push_back(loss(point));
  return losses;
}

// Runs the search until it is finished, or until done(). Returns the number of evaluations.
inline int64_t run(
    Optimizer& optimizer, const Loss& loss,
    const std::function<bool()>& done = [] { return false; }) {
  int64_t evaluations = 0;
  while (!optimizer.finished() && !done()) {
    const std::vector<double> losses = losses_asked_for(optimizer, loss);
    evaluations += static_cast<int64_t>(losses.size());
    optimizer.tell(losses);
  }
  return evaluations;
}

// Takes all steps and returns the last point.
inline Vector run(GradientStepper& stepper, const Gradient& gradient) {
  while (!stepper.finished()) stepper.step(gradient(stepper.point()));
  return stepper.point();
}

// The finalist with the least loss; x = 0 if none is better.
inline Vector best_finalist(const Optimizer& optimizer, const Loss& loss) {
  Vector best(static_cast<size_t>(optimizer.dimension()), 0.0);
  for (const Vector& point : optimizer.finalists()) {
    if (loss(point) < loss(best)) best = point;
  }
  return best;
}

inline double distance(const Vector& a, const Vector& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return std::sqrt(sum);
}

// sum_i curvature_i (x_i - optimum_i)^2 / 2
struct Quadratic {
  Vector curvature, optimum;

  double operator()(const Vector& x) const {
    double sum = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      sum += curvature[i] * (x[i] - optimum[i]) * (x[i] - optimum[i]) / 2;
    }
    return sum;
  }
  Vector gradient(const Vector& x) const {
    Vector slope(x.size());
    for (size_t i = 0; i < x.size(); ++i) slope[i] = curvature[i] * (x[i] - optimum[i]);
    return slope;
  }
  // The gradient as a function of its own.
  Gradient slope() const {
    return [self = *this](const Vector& x) { return self.gradient(x); };
  }
};

// Curvatures from 1 to `condition`, logarithmic; an optimum of mixed signs with |x_i| <= 1.
inline Quadratic quadratic(size_t n, double condition) {
  Quadratic result{Vector(n), Vector(n)};
  for (size_t i = 0; i < n; ++i) {
    const double share = n > 1 ? static_cast<double>(i) / static_cast<double>(n - 1) : 0;
    result.curvature[i] = std::pow(condition, share);
    result.optimum[i] = std::cos(1.0 + 2.0 * static_cast<double>(i));
  }
  return result;
}

// sum_i 100 (x_{i+1} - x_i^2)^2 + (1 - x_i)^2: least, 0, at x = (1, ..., 1).
inline double rosenbrock(const Vector& x) {
  double sum = 0;
  for (size_t i = 0; i + 1 < x.size(); ++i) {
    const double valley = x[i + 1] - x[i] * x[i];
    sum += 100 * valley * valley + (1 - x[i]) * (1 - x[i]);
  }
  return sum;
}

inline Vector rosenbrock_gradient(const Vector& x) {
  Vector slope(x.size(), 0.0);
  for (size_t i = 0; i + 1 < x.size(); ++i) {
    const double valley = x[i + 1] - x[i] * x[i];
    slope[i] += -400 * x[i] * valley - 2 * (1 - x[i]);
    slope[i + 1] += 200 * valley;
  }
  return slope;
}

}  // namespace zerotuning::search::testing
