// The numerics of CMA-ES: random numbers, eigendecomposition, constants.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "search/bounded_interval.h"
#include "search/cma_es_parameters.h"
#include "search/random_numbers.h"
#include "search/symmetric_eigen.h"

namespace zerotuning::search {
namespace {

TEST(RandomNumbers, reproduce_the_published_sequence_of_xoshiro256_starstar) {
  RandomNumbers random(0);
  random.state() = {1, 2, 3, 4};
  for (const uint64_t expected : {uint64_t{11520}, uint64_t{0}, uint64_t{1509978240},
                                  uint64_t{1215971899390074240}, uint64_t{1216172134540287360}}) {
    EXPECT_EQ(random.next_bits(), expected);
  }
}

TEST(RandomNumbers, are_seeded_by_splitmix64) {
  const std::array<uint64_t, 4> expected = {0xe220a8397b1dcdafu, 0x6e789e6aa1b965f4u,
                                            0x06c45d188009454fu, 0xf88bb8a8724c81ecu};
  EXPECT_EQ(RandomNumbers(0).state(), expected);
}

TEST(RandomNumbers, have_the_moments_of_the_standard_normal) {
  RandomNumbers random(7);
  constexpr int kCount = 200000;
  double mean = 0;
  double square = 0;
  double fourth = 0;
  for (int i = 0; i < kCount; ++i) {
    const double value = random.normal();
    mean += value / kCount;
    square += value * value / kCount;
    fourth += value * value * value * value / kCount;
  }
  // Five standard errors of each mean.
  EXPECT_NEAR(mean, 0, 5 / std::sqrt(kCount));
  EXPECT_NEAR(square, 1, 5 * std::sqrt(2.0 / kCount));
  EXPECT_NEAR(fourth, 3, 5 * std::sqrt(96.0 / kCount));
}

// Largest |A v - lambda v| over all pairs, and largest |V V^T - I|.
struct Residuals {
  double equation = 0, orthogonality = 0;
};

Residuals residuals(const std::vector<double>& matrix, const SymmetricEigen& eigen, size_t n) {
  Residuals worst;
  for (size_t k = 0; k < n; ++k) {
    const double* v = &eigen.vectors[k * n];
    for (size_t i = 0; i < n; ++i) {
      double product = -eigen.values[k] * v[i];
      double inner = i == k ? -1 : 0;
      for (size_t j = 0; j < n; ++j) {
        product += matrix[std::max(i, j) * n + std::min(i, j)] * v[j];
        inner += v[j] * eigen.vectors[i * n + j];
      }
      worst.equation = std::max(worst.equation, std::fabs(product));
      worst.orthogonality = std::max(worst.orthogonality, std::fabs(inner));
    }
  }
  return worst;
}

TEST(SymmetricEigen, satisfies_its_equation_for_random_matrices_of_any_size_and_scale) {
  RandomNumbers random(3);
  for (const size_t n : {1u, 2u, 3u, 7u, 40u, 121u}) {
    for (const double scale : {1.0, 1e-160, 1e150}) {
      std::vector<double> matrix(n * n);
      for (double& element : matrix) element = scale * random.normal();
      const SymmetricEigen eigen = symmetric_eigen(matrix, static_cast<int64_t>(n));
      const Residuals worst = residuals(matrix, eigen, n);
      EXPECT_LT(worst.equation, 1e-14 * scale * static_cast<double>(n)) << n << " " << scale;
      EXPECT_LT(worst.orthogonality, 1e-14 * std::sqrt(static_cast<double>(n))) << n;
    }
  }
}

TEST(SymmetricEigen, finds_the_known_spectrum_of_the_second_difference_matrix) {
  constexpr size_t n = 50;  // 2 on the diagonal, -1 beside it: 2 - 2 cos(k pi / (n + 1))
  std::vector<double> matrix(n * n, 0.0);
  for (size_t i = 0; i < n; ++i) {
    matrix[i * n + i] = 2;
    if (i > 0) matrix[i * n + i - 1] = -1;
  }
  SymmetricEigen eigen = symmetric_eigen(matrix, n);
  std::sort(eigen.values.begin(), eigen.values.end());
  for (size_t k = 0; k < n; ++k) {
    const double angle = static_cast<double>(k + 1) * std::acos(-1.0) / (n + 1);
    EXPECT_NEAR(eigen.values[k], 2 - 2 * std::cos(angle), 1e-14);
  }
}

TEST(SymmetricEigen, handles_equal_and_zero_eigenvalues) {
  constexpr size_t n = 9;  // all ones: one eigenvalue n, the others 0
  const std::vector<double> ones(n * n, 1.0);
  SymmetricEigen eigen = symmetric_eigen(ones, n);
  EXPECT_LT(residuals(ones, eigen, n).equation, 1e-14);
  EXPECT_LT(residuals(ones, eigen, n).orthogonality, 1e-14);
  std::sort(eigen.values.begin(), eigen.values.end());
  EXPECT_NEAR(eigen.values.front(), 0, 1e-14);
  EXPECT_NEAR(eigen.values.back(), n, 1e-14 * n);
  const std::vector<double> nothing(n * n, 0.0);
  EXPECT_EQ(symmetric_eigen(nothing, n).values, std::vector<double>(n, 0.0));
}

TEST(BoundedInterval, is_the_identity_away_from_the_bound_and_never_leaves_it) {
  const BoundedInterval interval(4);  // margin 0.25
  double previous = interval.map(-4.25);
  EXPECT_EQ(previous, -4);
  for (double free = -4.25; free <= 4.25; free += 0.001) {
    const double bounded = interval.map(free);
    EXPECT_LE(std::fabs(bounded), 4);
    EXPECT_GE(bounded, previous);
    EXPECT_LT(bounded - previous, 0.001 + 1e-9);  // no jump at the seams
    if (std::fabs(free) <= 3.75) {
      EXPECT_EQ(bounded, free);
    }
    previous = bounded;
  }
  EXPECT_NEAR(interval.map(4.25), 4, 1e-15);
}

TEST(BoundedInterval, mirrors_what_lies_beyond) {
  const BoundedInterval interval(4);
  for (const double beyond : {0.1, 1.0, 4.25, 8.4, 8.5}) {
    EXPECT_NEAR(interval.map(4.25 + beyond), interval.map(4.25 - beyond), 1e-12);
    EXPECT_NEAR(interval.map(-4.25 - beyond), interval.map(-4.25 + beyond), 1e-12);
  }
  EXPECT_LE(std::fabs(interval.map(1e300)), 4);
}

TEST(BoundedInterval, has_an_inverse) {
  for (const double bound : {0.01, 0.5, 4.0, 1e3}) {
    const BoundedInterval interval(bound);
    for (const double share : {-1.0, -0.99, -0.5, 0.0, 0.3, 0.96, 1.0}) {
      const double bounded = share * bound;
      EXPECT_NEAR(interval.map(interval.inverse(bounded)), bounded, 1e-14 * bound);
    }
  }
}

TEST(CmaEsParameters, equal_the_tutorials_formulas_written_out_for_ten_dimensions) {
  // n = 10, lambda = 10, mu = 5, by hand from arXiv 1604.00772, table 1.
  const CmaEsParameters parameters = cma_es_parameters(10, default_population(10), false);
  EXPECT_EQ(parameters.population, 10);
  EXPECT_EQ(parameters.parents, 5);
  double raw_sum = 0;
  double raw_squares = 0;
  for (int i = 1; i <= 5; ++i) {
    raw_sum += std::log(5.5 / i);
    raw_squares += std::log(5.5 / i) * std::log(5.5 / i);
  }
  const double mu_eff = raw_sum * raw_sum / raw_squares;
  EXPECT_NEAR(parameters.effective_parents, mu_eff, 1e-12);
  EXPECT_NEAR(parameters.weights[0], std::log(5.5) / raw_sum, 1e-12);
  EXPECT_NEAR(parameters.sigma_path_rate, (mu_eff + 2) / (mu_eff + 15), 1e-12);
  EXPECT_NEAR(parameters.covariance_path_rate, (4 + mu_eff / 10) / (14 + mu_eff / 5), 1e-12);
  EXPECT_NEAR(parameters.rank_one_rate, 2 / (11.3 * 11.3 + mu_eff), 1e-12);
  EXPECT_NEAR(parameters.rank_mu_rate, 2 * (mu_eff + 1 / mu_eff - 1.75) / (144 + mu_eff), 1e-12);
}

TEST(CmaEsParameters, never_let_the_covariance_lose_all_of_its_past) {
  for (const int64_t n : {1, 2, 3, 10, 100, 200, 2000}) {
    for (const bool diagonal : {false, true}) {
      for (const int64_t population : {int64_t{4}, default_population(n), int64_t{100}}) {
        const CmaEsParameters parameters = cma_es_parameters(n, population, diagonal);
        EXPECT_EQ(parameters.weights.size(), static_cast<size_t>(population));
        EXPECT_LE(parameters.rank_one_rate + parameters.rank_mu_rate, 1 + 1e-12);
        double negative = 0;
        for (const double weight : parameters.weights) negative += std::max(0.0, -weight);
        const double dimension = static_cast<double>(n);
        EXPECT_LE(dimension * parameters.rank_mu_rate * negative,
                  1 - parameters.rank_one_rate - parameters.rank_mu_rate + 1e-12);
      }
    }
  }
}

}  // namespace
}  // namespace zerotuning::search
