// The constants of CMA-ES that follow from the dimension and the population.
#pragma once

#include <cstdint>
#include <vector>

namespace zerotuning::search {

// Default population: 4 + floor(3 ln n).
int64_t default_population(int64_t dimension);

// Names and defaults: Hansen, "The CMA Evolution Strategy: A Tutorial", arXiv 1604.00772, table 1,
// with negative weights.
struct CmaEsParameters {
  int64_t population;  // lambda
  int64_t parents;     // mu = floor(lambda / 2)
  std::vector<double>
      weights;               // [lambda], best first; the first mu add up to 1, the others are <= 0
  double effective_parents;  // mu_eff = 1 / (w_1^2 + ... + w_mu^2)
  double sigma_path_rate;    // c_sigma
  double sigma_damping;      // d_sigma
  double covariance_path_rate;    // c_c
  double rank_one_rate;           // c_1
  double rank_mu_rate;            // c_mu
  double weight_sum;              // w_1 + ... + w_lambda
  double expected_normal_length;  // E |N(0, I)|
};

// dimension >= 1, population >= 4. diagonal: c_1 and c_mu are (n + 2)/3 times as large (Ros and
// Hansen 2008), because C has n numbers only.
CmaEsParameters cma_es_parameters(int64_t dimension, int64_t population, bool diagonal);

}  // namespace zerotuning::search
