// The identity, bent smoothly at the bounds and mirrored beyond.
#include "search/bounded_interval.h"

#include <algorithm>
#include <cmath>

namespace zerotuning::search {

BoundedInterval::BoundedInterval(double bound)
    : bound_(bound), margin_(std::min(bound, (1 + bound) / 20)) {}

double BoundedInterval::map(double free) const {
  const double mirror = bound_ + margin_;  // the map is mirrored at its odd multiples
  if (std::fabs(free) > mirror) {
    free = std::remainder(free, 4 * mirror);  // in [-2 mirror, 2 mirror]
    if (std::fabs(free) > mirror) free = std::copysign(2 * mirror, free) - free;
  }
  if (std::fabs(free) <= bound_ - margin_) return free;
  const double rest = mirror - std::fabs(free);
  return std::copysign(bound_ - rest * rest / (4 * margin_), free);
}

double BoundedInterval::inverse(double bounded) const {
  if (std::fabs(bounded) <= bound_ - margin_) return bounded;
  const double rest = std::sqrt(4 * margin_ * (bound_ - std::fabs(bounded)));
  return std::copysign(bound_ + margin_ - rest, bounded);
}

}  // namespace zerotuning::search
