// The covariance matrix C of CMA-ES: full, or its diagonal alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace zerotuning::search {

// C = B diag(D)^2 B^T. Only refresh() computes the decomposition anew: C may be some updates ahead
// of B and D, as in Hansen's tutorial (arXiv 1604.00772, appendix B.2). The diagonal form has n
// numbers and needs no decomposition (Ros and Hansen, "A simple modification in CMA-ES achieving
// linear time and space complexity", 2008).
class Covariance {
 public:
  // Starts as the identity.
  Covariance(int64_t dimension, bool diagonal);

  // C^{1/2} z = B D z: a standard normal z becomes a draw from N(0, C). z, result: [dimension].
  std::vector<double> shape(const std::vector<double>& normal) const;
  // C^{-1/2} y = B D^{-1} B^T y.
  std::vector<double> whiten(const std::vector<double>& step) const;
  // y^T C^{-1} y, a squared length in units of the deviation.
  double squared_length(const std::vector<double>& step) const;

  // C <- keep * C
  void scale(double keep);
  // C <- C + weight * y y^T
  void add(double weight, const std::vector<double>& step);
  // Computes B and D of the present C.
  void refresh();

  // Square root of the largest diagonal element of C.
  double largest_deviation() const;
  // Square root of one diagonal element of C.
  double deviation(size_t index) const;
  // Largest over smallest eigenvalue at the last refresh().
  double condition() const;

  // The list of fields, for a StateWriter and a StateReader.
  template <class Archive, class MaybeConstCovariance>
  static void list_fields(Archive& archive, MaybeConstCovariance& covariance) {
    archive.numbers("covariance", covariance.matrix_, covariance.count(covariance.matrix_));
    archive.numbers("deviations", covariance.deviations_, covariance.count(covariance.deviations_));
    archive.numbers("axes", covariance.axes_, covariance.count(covariance.axes_));
  }

 private:
  static int64_t count(const std::vector<double>& values) {
    return static_cast<int64_t>(values.size());
  }
  // D^{-1} B^T y
  std::vector<double> whitened_coordinates(const std::vector<double>& step) const;

  size_t size_;
  bool diagonal_;
  std::vector<double> matrix_;      // full: [n, n], lower triangle in use; diagonal: [n]
  std::vector<double> deviations_;  // D: [n]
  std::vector<double> axes_;        // B^T: [n, n], one axis a row; empty when diagonal
};

}  // namespace zerotuning::search
