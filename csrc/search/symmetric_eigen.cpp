// Householder tridiagonalisation and implicit QL.
#include "search/symmetric_eigen.h"

#include <cmath>
#include <cstddef>
#include <limits>
#include <utility>

namespace zerotuning::search {
namespace {

// T = Q^T A Q with T tridiagonal.
struct Tridiagonal {
  std::vector<double> diagonal;      // [n]
  std::vector<double> off_diagonal;  // [n]: T(i, i+1); the last is 0
  std::vector<double> rows;          // [n, n]: Q^T
};

double dot(const double* a, const double* b, size_t count) {
  double sum = 0;
  for (size_t i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

void add_scaled(double* target, double factor, const double* source, size_t count) {
  for (size_t i = 0; i < count; ++i) target[i] += factor * source[i];
}

std::vector<double> symmetric_from_lower(const std::vector<double>& matrix, size_t n) {
  std::vector<double> full = matrix;
  for (size_t i = 0; i < n; ++i) {
    for (size_t j = i + 1; j < n; ++j) full[i * n + j] = matrix[j * n + i];
  }
  return full;
}

// Turns x [count] into a v for which (I - beta v v^T) x = (alpha, 0, ..., 0). Returns beta: 0 if x
// has that form already.
double make_reflector(double* x, size_t count, double& alpha) {
  double scale = 0;
  for (size_t i = 1; i < count; ++i) scale = std::fmax(scale, std::fabs(x[i]));
  alpha = x[0];
  if (scale == 0) return 0;
  scale = std::fmax(scale, std::fabs(x[0]));
  for (size_t i = 0; i < count; ++i) x[i] /= scale;  // squares neither overflow nor vanish
  const double norm = std::sqrt(dot(x, x, count));
  alpha = x[0] > 0 ? -norm : norm;
  x[0] -= alpha;  // no cancellation: the signs differ
  alpha *= scale;
  return 2 / dot(x, x, count);
}

// A <- H A H for H = I - beta v v^T on the trailing block of `count` rows that starts at `block`:
//   p = beta A v;   w = p - (beta/2 p.v) v;   A <- A - v w^T - w v^T
void reflect_block(double* block, size_t n, size_t count, const double* v, double beta,
                   std::vector<double>& w) {
  for (size_t i = 0; i < count; ++i) w[i] = beta * dot(block + i * n, v, count);
  add_scaled(w.data(), -0.5 * beta * dot(w.data(), v, count), v, count);
  for (size_t i = 0; i < count; ++i) {
    double* row = block + i * n;
    for (size_t j = 0; j < count; ++j) row[j] -= v[i] * w[j] + w[i] * v[j];
  }
}

// Step k brings row k into tridiagonal form and leaves its v in that row, right of the diagonal.
Tridiagonal tridiagonalise(std::vector<double> a, size_t n) {
  Tridiagonal result{std::vector<double>(n), std::vector<double>(n), std::vector<double>(n * n)};
  std::vector<double> betas(n, 0.0);
  std::vector<double> workspace(n);
  for (size_t k = 0; k + 1 < n; ++k) {
    double* v = &a[k * n + k + 1];
    const size_t count = n - k - 1;
    betas[k] = make_reflector(v, count, result.off_diagonal[k]);
    if (betas[k] != 0) reflect_block(&a[(k + 1) * n + k + 1], n, count, v, betas[k], workspace);
  }
  for (size_t k = 0; k < n; ++k) result.diagonal[k] = a[k * n + k];
  // Q^T = H_{n-2} ... H_0, multiplied from the left end, so that a step touches its block only.
  for (size_t i = 0; i < n; ++i) result.rows[i * n + i] = 1;
  for (size_t k = n - 1; k-- > 0;) {
    if (betas[k] == 0) continue;
    const double* v = &a[k * n + k + 1];
    const size_t count = n - k - 1;
    for (size_t i = k + 1; i < n; ++i) {
      double* row = &result.rows[i * n + k + 1];
      add_scaled(row, -betas[k] * dot(row, v, count), v, count);
    }
  }
  return result;
}

// First index >= low after which T splits into blocks: its off-diagonal element is negligible.
size_t block_end(const Tridiagonal& t, size_t low) {
  size_t i = low;
  for (; i + 1 < t.diagonal.size(); ++i) {
    const double neighbours = std::fabs(t.diagonal[i]) + std::fabs(t.diagonal[i + 1]);
    if (!(std::fabs(t.off_diagonal[i]) > std::numeric_limits<double>::epsilon() * neighbours))
      break;
  }
  return i;
}

void rotate(double* row, double* next_row, double cosine, double sine, size_t n) {
  for (size_t k = 0; k < n; ++k) {
    const double old = next_row[k];
    next_row[k] = sine * row[k] + cosine * old;
    row[k] = cosine * row[k] - sine * old;
  }
}

// One implicit QL step on the block low..high with Wilkinson's shift: rotations chase a bulge from
// the lower end up.
void ql_step(Tridiagonal& t, size_t low, size_t high) {
  std::vector<double>& d = t.diagonal;
  std::vector<double>& e = t.off_diagonal;
  const size_t n = d.size();
  const double half_gap = (d[low + 1] - d[low]) / (2 * e[low]);
  double bulge_diagonal =
      d[high] - d[low] + e[low] / (half_gap + std::copysign(std::hypot(half_gap, 1), half_gap));
  double sine = 1;
  double cosine = 1;
  double shift = 0;
  for (size_t i = high; i-- > low;) {
    const double bulge = sine * e[i];
    const double side = cosine * e[i];
    e[i + 1] = std::hypot(bulge, bulge_diagonal);
    if (e[i + 1] == 0) {  // the block splits here
      d[i + 1] -= shift;
      e[high] = 0;
      return;
    }
    sine = bulge / e[i + 1];
    cosine = bulge_diagonal / e[i + 1];
    const double shifted = d[i + 1] - shift;
    const double change = (d[i] - shifted) * sine + 2 * cosine * side;
    shift = sine * change;
    d[i + 1] = shifted + shift;
    bulge_diagonal = cosine * change - side;
    rotate(&t.rows[i * n], &t.rows[(i + 1) * n], cosine, sine, n);
  }
  d[low] -= shift;
  e[low] = bulge_diagonal;
  e[high] = 0;
}

}  // namespace

SymmetricEigen symmetric_eigen(const std::vector<double>& matrix, int64_t n) {
  const auto size = static_cast<size_t>(n);
  Tridiagonal t = tridiagonalise(symmetric_from_lower(matrix, size), size);
  constexpr int kMaxSteps = 100;  // two or three for each value are usual
  for (size_t low = 0; low < size; ++low) {
    for (int step = 0; step < kMaxSteps; ++step) {
      const size_t high = block_end(t, low);
      if (high == low) break;
      ql_step(t, low, high);
    }
  }
  return {std::move(t.diagonal), std::move(t.rows)};
}

}  // namespace zerotuning::search
