// CMA-ES, for metrics that have no gradient: exact match of generated text, a judge's score.
#pragma once

#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "search/bounded_interval.h"
#include "search/cma_es_parameters.h"
#include "search/covariance.h"
#include "search/optimizer.h"
#include "search/random_numbers.h"

namespace zerotuning::search {

struct CmaEsOptions {
  // First standard deviation, in units of log gamma; > 0, at most max_abs_log_scale.
  double sigma = 0.3;
  // Candidates of a generation, >= 4; 0: 4 + floor(3 ln dimension).
  int64_t population = 0;
  // Seed of the random numbers: the same seed and losses give the same search.
  uint64_t seed = 0;
  // Most evaluations, at least the population.
  int64_t evaluations = 1000;
  // Whether the covariance is diagonal; unset: above 200 dimensions.
  std::optional<bool> diagonal{};
  // > 0; every |x| stays within this bound (bounded_interval.h).
  double max_abs_log_scale = 4.0;
  // >= 0; the search ends when the losses of recent generations lie this close together.
  double tolfun = 1e-10;
  // >= 0; the search ends when every standard deviation is this small.
  double tolx = 1e-6;
  // The first mean; empty: x = 0.
  std::vector<double> start{};
};

// (mu/mu_w, lambda)-CMA-ES with active covariance updates after Hansen, "The CMA Evolution
// Strategy: A Tutorial", arXiv 1604.00772. Only the ranks of the losses count, so that any
// increasing function of the losses gives the same search.
//
// One ask() is one generation. The search ends when the budget does not suffice for another
// generation, or when it has converged. A failed evaluation ranks last.
class CmaEsOptimizer final : public Optimizer {
 public:
  explicit CmaEsOptimizer(int64_t dimension, CmaEsOptions options = {});

  std::string method() const override { return "cma-es"; }
  std::string progress() const override;
  // The mean of the distribution and the best candidate so far; none before the first generation.
  std::vector<Point> finalists() const override;
  // Evaluations done, and the maximum number of them: whole generations within options.evaluations.
  int64_t steps_done() const override;
  int64_t steps_total() const override;

  // The reason for the end of the search: "evaluations", "tolfun", "tolx" or "condition" (the
  // covariance's condition number exceeds 1e14); empty before.
  std::string stop_reason() const;
  int64_t population() const { return parameters_.population; }
  bool diagonal() const { return diagonal_; }
  double sigma() const { return state_.sigma; }
  // The mean of the distribution, within the bounds.
  std::vector<double> mean() const { return bounded(state_.mean); }

 private:
  // The distribution is over y, without bounds; x = interval_.map(y) is evaluated.
  struct State {
    State(int64_t dimension, bool diagonal, uint64_t seed);
    int64_t generation = 0;
    int64_t refreshed = 0;  // generation of the last decomposition
    double sigma = 0;
    std::vector<double> mean, sigma_path, covariance_path;
    Covariance covariance;
    RandomNumbers random;
    std::vector<double> candidates;  // y: [population, dimension] of the present generation
    std::vector<double> history;     // least loss of the recent generations, oldest first
    double recent_range = 0;         // greatest minus least loss of the last generation
    std::vector<double> best_seen;   // x
    double best_seen_loss = std::numeric_limits<double>::infinity();
  };
  template <class Archive, class MaybeConstState>
  void list_state(Archive& archive, MaybeConstState& state) const;

  std::vector<Point> plan() const override;
  void update(const std::vector<double>& losses) override;
  void write_options(StateWriter& writer) const override;
  void write(StateWriter& writer) const override;
  void read(StateReader& reader) override;

  size_t candidate_count() const { return static_cast<size_t>(parameters_.population); }
  size_t history_limit() const;
  std::vector<double> candidate(size_t index) const;
  std::vector<double> bounded(std::vector<double> free) const;
  void draw_candidates();
  void record_losses(const std::vector<double>& losses, const std::vector<size_t>& ranking);
  std::vector<std::vector<double>> ranked_steps(const std::vector<size_t>& ranking) const;
  // The steps of the tutorial's update, in its order.
  std::vector<double> move_mean(const std::vector<std::vector<double>>& steps);
  bool update_paths(const std::vector<double>& mean_step);
  void update_covariance(const std::vector<std::vector<double>>& steps, bool sigma_path_is_short);
  void update_sigma(bool flat);
  void refresh_covariance();

  CmaEsOptions options_;
  bool diagonal_;
  BoundedInterval interval_;
  CmaEsParameters parameters_;
  State state_;
};

}  // namespace zerotuning::search
