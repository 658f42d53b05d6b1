// A smooth map of the line onto [-bound, bound]: bounds for a search that knows none.
#pragma once

namespace zerotuning::search {

// With margin = min(bound, (1 + bound)/20), x = map(y) is y itself up to bound - margin; from there
// a parabola that is level where it reaches the bound, at y = bound + margin,
//   x = bound - (bound + margin - y)^2 / (4 margin)
// and beyond that the mirror image of what came before; the same below 0. So does pycma, Hansen's
// reference implementation of CMA-ES ("BoundTransform"). Moving candidates to the nearest point
// within the bounds instead shrinks the covariance across a bound and ends the search early.
class BoundedInterval {
 public:
  explicit BoundedInterval(double bound);

  // y -> x in [-bound, bound]; y finite.
  double map(double free) const;
  // A y with map(y) = x; |x| <= bound.
  double inverse(double bounded) const;

 private:
  double bound_;
  double margin_;
};

}  // namespace zerotuning::search
