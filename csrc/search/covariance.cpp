// Updating, decomposing and applying the covariance matrix.
#include "search/covariance.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "search/symmetric_eigen.h"

namespace zerotuning::search {

Covariance::Covariance(int64_t dimension, bool diagonal)
    : size_(static_cast<size_t>(dimension)),
      diagonal_(diagonal),
      matrix_(diagonal ? size_ : size_ * size_, diagonal ? 1.0 : 0.0),
      deviations_(size_, 1.0),
      axes_(diagonal ? 0 : size_ * size_, 0.0) {
  if (diagonal_) return;
  for (size_t i = 0; i < size_; ++i) matrix_[i * size_ + i] = axes_[i * size_ + i] = 1;
}

std::vector<double> Covariance::shape(const std::vector<double>& normal) const {
  std::vector<double> result(size_, 0.0);
  for (size_t axis = 0; axis < size_; ++axis) {
    const double length = deviations_[axis] * normal[axis];
    if (diagonal_) {
      result[axis] = length;
      continue;
    }
    const double* row = &axes_[axis * size_];
    for (size_t i = 0; i < size_; ++i) result[i] += length * row[i];
  }
  return result;
}

std::vector<double> Covariance::whitened_coordinates(const std::vector<double>& step) const {
  std::vector<double> coordinates(size_);
  for (size_t axis = 0; axis < size_; ++axis) {
    double along = diagonal_ ? step[axis] : 0.0;
    for (size_t i = 0; !diagonal_ && i < size_; ++i) along += axes_[axis * size_ + i] * step[i];
    coordinates[axis] = along / deviations_[axis];
  }
  return coordinates;
}

std::vector<double> Covariance::whiten(const std::vector<double>& step) const {
  std::vector<double> coordinates = whitened_coordinates(step);
  if (diagonal_) return coordinates;
  std::vector<double> result(size_, 0.0);
  for (size_t axis = 0; axis < size_; ++axis) {
    for (size_t i = 0; i < size_; ++i) result[i] += coordinates[axis] * axes_[axis * size_ + i];
  }
  return result;
}

double Covariance::squared_length(const std::vector<double>& step) const {
  double sum = 0;
  for (const double coordinate : whitened_coordinates(step)) sum += coordinate * coordinate;
  return sum;
}

void Covariance::scale(double keep) {
  for (double& element : matrix_) element *= keep;
}

void Covariance::add(double weight, const std::vector<double>& step) {
  for (size_t i = 0; i < size_; ++i) {
    const double factor = weight * step[i];
    if (diagonal_) {
      matrix_[i] += factor * step[i];
      continue;
    }
    double* row = &matrix_[i * size_];
    for (size_t j = 0; j <= i; ++j) row[j] += factor * step[j];
  }
}

void Covariance::refresh() {
  std::vector<double> variances = matrix_;
  if (!diagonal_) {
    SymmetricEigen eigen = symmetric_eigen(matrix_, static_cast<int64_t>(size_));
    variances = std::move(eigen.values);
    axes_ = std::move(eigen.vectors);
  }
  // C is positive definite; rounding may still give a smallest eigenvalue at or below 0.
  const double floor = 1e-20 * *std::max_element(variances.begin(), variances.end());
  for (size_t i = 0; i < size_; ++i) deviations_[i] = std::sqrt(std::max(variances[i], floor));
}

double Covariance::deviation(size_t index) const {
  return std::sqrt(std::max(0.0, matrix_[diagonal_ ? index : index * size_ + index]));
}

double Covariance::largest_deviation() const {
  double largest = 0;
  for (size_t i = 0; i < size_; ++i) largest = std::max(largest, deviation(i));
  return largest;
}

double Covariance::condition() const {
  const auto extremes = std::minmax_element(deviations_.begin(), deviations_.end());
  const double ratio = *extremes.second / *extremes.first;
  return ratio * ratio;
}

}  // namespace zerotuning::search
