// A smooth map of the real line onto [-bound, bound], for a search over unbounded numbers.
#pragma once

namespace zerotuning::search {

// With margin = min(bound, (1 + bound)/20), x = map(y) is y itself up to bound - margin. From there
// to y = bound + margin it is a parabola that is level where it reaches the bound,
//   x = bound - (bound + margin - y)^2 / (4 margin)
// and beyond y = bound + margin the map is mirrored. Below 0 it is odd: map(-y) = -map(y). pycma,
// Hansen's reference implementation of CMA-ES, has the same map ("BoundTransform"). Moving
// candidates to the nearest point within the bounds instead would shrink the covariance across a
// bound and end the search early.
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
