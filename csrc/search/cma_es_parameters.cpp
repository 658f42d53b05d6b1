// Table 1 of Hansen's tutorial.
#include "search/cma_es_parameters.h"

#include <algorithm>
#include <cmath>

namespace zerotuning::search {
namespace {

// (sum of |w|)^2 / sum of w^2
double effective_count(const std::vector<double>& weights, size_t begin, size_t end) {
  double sum = 0;
  double squares = 0;
  for (size_t i = begin; i < end; ++i) {
    sum += std::fabs(weights[i]);
    squares += weights[i] * weights[i];
  }
  return squares > 0 ? sum * sum / squares : 0;
}

void scale_sum_to(std::vector<double>& weights, size_t begin, size_t end, double target_sum) {
  double sum = 0;
  for (size_t i = begin; i < end; ++i) sum += std::fabs(weights[i]);
  for (size_t i = begin; sum > 0 && i < end; ++i) weights[i] *= target_sum / sum;
}

void set_learning_rates(CmaEsParameters& parameters, double n, bool diagonal) {
  const double mu_eff = parameters.effective_parents;
  const double speed = diagonal ? (n + 2) / 3 : 1;
  parameters.sigma_path_rate = (mu_eff + 2) / (n + mu_eff + 5);
  parameters.sigma_damping =
      1 + 2 * std::max(0.0, std::sqrt((mu_eff - 1) / (n + 1)) - 1) + parameters.sigma_path_rate;
  parameters.covariance_path_rate = (4 + mu_eff / n) / (n + 4 + 2 * mu_eff / n);
  parameters.rank_one_rate = std::min(1.0, speed * 2 / ((n + 1.3) * (n + 1.3) + mu_eff));
  const double rank_mu = 2 * (0.25 + mu_eff + 1 / mu_eff - 2) / ((n + 2) * (n + 2) + mu_eff);
  parameters.rank_mu_rate = std::min(1 - parameters.rank_one_rate, speed * rank_mu);
  parameters.expected_normal_length = std::sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n));
}

// The negative weights add up to the least of three bounds (equations 50 to 52). The last bound
// keeps C positive definite.
double negative_sum(const CmaEsParameters& parameters, double n) {
  const double c1 = parameters.rank_one_rate;
  const double c_mu = parameters.rank_mu_rate;
  const auto mu = static_cast<size_t>(parameters.parents);
  const double negative_count = effective_count(parameters.weights, mu, parameters.weights.size());
  const double balanced = 1 + c1 / c_mu;
  const double noise = 1 + 2 * negative_count / (parameters.effective_parents + 2);
  const double positive_definite = (1 - c1 - c_mu) / (n * c_mu);
  return std::min({balanced, noise, positive_definite});
}

}  // namespace

int64_t default_population(int64_t dimension) {
  return 4 + static_cast<int64_t>(std::floor(3 * std::log(static_cast<double>(dimension))));
}

CmaEsParameters cma_es_parameters(int64_t dimension, int64_t population, bool diagonal) {
  CmaEsParameters parameters{};
  parameters.population = population;
  parameters.parents = population / 2;
  const auto lambda = static_cast<size_t>(population);
  const auto mu = static_cast<size_t>(parameters.parents);
  const double middle = std::log((static_cast<double>(population) + 1) / 2);
  for (size_t i = 0; i < lambda; ++i) {
    parameters.weights.push_back(middle - std::log(static_cast<double>(i + 1)));
  }
  parameters.effective_parents = effective_count(parameters.weights, 0, mu);
  const auto n = static_cast<double>(dimension);
  set_learning_rates(parameters, n, diagonal);
  scale_sum_to(parameters.weights, mu, lambda, negative_sum(parameters, n));
  scale_sum_to(parameters.weights, 0, mu, 1);
  for (const double weight : parameters.weights) parameters.weight_sum += weight;
  return parameters;
}

}  // namespace zerotuning::search
