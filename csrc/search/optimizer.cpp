// The part that the ask/tell searches share: the checks of tell(), saving and restoring.
#include "search/optimizer.h"

#include <cmath>
#include <limits>
#include <stdexcept>
#include <utility>

#include "search/argument_checks.h"

namespace zerotuning::search {

Optimizer::Optimizer(int64_t dimension) : dimension_(dimension) {
  require(dimension >= 1, "dimension", "at least 1", static_cast<double>(dimension));
}

void Optimizer::tell(std::vector<double> losses) {
  if (losses.size() != asked_.size()) {
    throw std::invalid_argument("losses must have " + std::to_string(asked_.size()) +
                                " numbers, one for each point of the last ask(), got " +
                                std::to_string(losses.size()));
  }
  if (finished()) return;
  for (double& loss : losses) {
    if (!std::isfinite(loss)) loss = std::numeric_limits<double>::infinity();
  }
  update(losses);
  plan_next();
}

void Optimizer::write_heading(StateWriter& writer) const {
  writer.word("method", method());
  writer.integer("dimension", dimension_, 1, dimension_);
  write_options(writer);
}

std::string Optimizer::state() const {
  StateWriter writer;
  write_heading(writer);
  write(writer);
  return writer.json();
}

void Optimizer::restore(const std::string& state) {
  StateWriter expected;
  write_heading(expected);
  StateReader reader(state);
  reader.same(expected);
  read(reader);
  plan_next();
}

}  // namespace zerotuning::search
