// Functions whose optimum is known, and the loop that runs a search on them.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "search/optimizer.h"

namespace zerotuning::search::testing {

using Vector = std::vector<double>;
using Loss = std::function<double(const Vector&)>;
using Gradient = std::function<Vector(const Vector&)>;

// A loss on the fit part, its gradient (null: none), and the loss on the held-out part.
struct Problem {
  Loss fit;
  Gradient gradient;
  Loss held_out;
};

inline Problem same_on_both_parts(Loss loss, Gradient gradient = nullptr) {
  return {loss, gradient, loss};
}

inline Outcome evaluate(const Problem& problem, const Evaluation& wanted) {
  const Loss& loss = wanted.part == Part::fit ? problem.fit : problem.held_out;
  return {loss(wanted.point), wanted.gradient ? problem.gradient(wanted.point) : Vector()};
}

inline std::vector<Outcome> answer(const Problem& problem, const Optimizer& optimizer) {
  std::vector<Outcome> outcomes;
  for (const Evaluation& wanted : optimizer.ask()) outcomes.push_back(evaluate(problem, wanted));
  return outcomes;
}

// Evaluations that a search asked for.
struct Counts {
  int64_t asks = 0, fit = 0, gradient = 0, held_out = 0;
};

inline void count(const Optimizer& optimizer, Counts& counts) {
  ++counts.asks;
  for (const Evaluation& wanted : optimizer.ask()) {
    (wanted.part == Part::fit ? counts.fit : counts.held_out) += 1;
    counts.gradient += wanted.gradient ? 1 : 0;
  }
}

// Runs the search until it is finished, or until done().
inline Counts run(
    Optimizer& optimizer, const Problem& problem,
    const std::function<bool()>& done = [] { return false; }) {
  Counts counts;
  while (!optimizer.finished() && !done()) {
    count(optimizer, counts);
    optimizer.tell(answer(problem, optimizer));
  }
  return counts;
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
  Problem problem() const {
    return same_on_both_parts(*this, [self = *this](const Vector& x) { return self.gradient(x); });
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
