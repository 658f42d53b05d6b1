// Eigenvalues and eigenvectors of a symmetric matrix.
#pragma once

#include <cstdint>
#include <vector>

namespace zerotuning::search {

struct SymmetricEigen {
  std::vector<double> values;   // [n], in no particular order
  std::vector<double> vectors;  // [n, n] row-major; row j is the unit eigenvector of values[j]
};

// A = V^T diag(values) V, V = vectors. matrix: [n, n] row-major; only its lower triangle is read;
// finite numbers.
//
// Householder reflections bring A to a tridiagonal T, implicit QL steps with Wilkinson's shift make
// T diagonal (Golub and Van Loan, Matrix Computations, 4th edition, algorithms 8.3.1 and 8.3.3 in
// its QL form). About 9 n^3 operations; backward stable: the error of a value is a small multiple
// of 2^-53 |A|.
SymmetricEigen symmetric_eigen(const std::vector<double>& matrix, int64_t n);

}  // namespace zerotuning::search
