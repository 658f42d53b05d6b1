// What all searches share: the checks of tell(), saving and restoring, the best point.
#include "search/optimizer.h"

#include <cmath>
#include <locale>
#include <sstream>
#include <stdexcept>

namespace zerotuning::search {
namespace {

std::string decimal(double value) {
  std::ostringstream stream;
  stream.imbue(std::locale::classic());
  stream << value;
  return stream.str();
}

void check_gradient(const std::string& where, const Evaluation& asked, const Outcome& outcome) {
  const size_t expected = asked.gradient ? asked.point.size() : 0;
  const size_t got = outcome.gradient.size();
  if (got != expected) {
    throw std::invalid_argument(where + ".gradient must have " + std::to_string(expected) +
                                " numbers" + (asked.gradient ? "" : " (it was not asked for)") +
                                ", got " + std::to_string(got));
  }
  for (size_t i = 0; i < got; ++i) {
    if (!std::isfinite(outcome.gradient[i])) {
      throw std::invalid_argument(where + ".gradient[" + std::to_string(i) +
                                  "] must be finite, got " + decimal(outcome.gradient[i]));
    }
  }
}

void check_outcomes(const std::vector<Evaluation>& asked, const std::vector<Outcome>& outcomes) {
  if (outcomes.size() != asked.size()) {
    throw std::invalid_argument("outcomes must be " + std::to_string(asked.size()) +
                                ", one for each evaluation asked for, got " +
                                std::to_string(outcomes.size()));
  }
  for (size_t i = 0; i < asked.size(); ++i) {
    const std::string where = "outcomes[" + std::to_string(i) + "]";
    if (!std::isfinite(outcomes[i].loss)) {
      throw std::invalid_argument(where + ".loss (" + part_name(asked[i].part) +
                                  ") must be finite, got " + decimal(outcomes[i].loss));
    }
    check_gradient(where, asked[i], outcomes[i]);
  }
}

}  // namespace

const char* part_name(Part part) { return part == Part::fit ? "fit" : "held_out"; }

void Incumbent::set_baseline(double loss_at_zero) { loss = baseline = loss_at_zero; }

void Incumbent::consider(const std::vector<double>& candidate, double candidate_loss) {
  if (candidate_loss < loss) {
    point = candidate;
    loss = candidate_loss;
  }
}

Optimizer::Optimizer(int64_t dimension) : dimension_(dimension) {
  require(dimension >= 1, "dimension", "at least 1", static_cast<double>(dimension));
}

void Optimizer::tell(const std::vector<Outcome>& outcomes) {
  check_outcomes(pending_, outcomes);
  if (finished()) return;
  learn(pending_, outcomes);
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
  return writer.sealed();
}

void Optimizer::restore(const std::string& state) {
  StateWriter expected;
  write_heading(expected);
  StateReader reader(state);
  reader.same(expected.text());
  read(reader);
  plan_next();
}

void require(bool valid, const char* name, const std::string& expected, double value) {
  if (!valid) {
    throw std::invalid_argument(std::string(name) + " must be " + expected + ", got " +
                                decimal(value));
  }
}

std::vector<double> checked_start(const std::vector<double>& start, int64_t dimension,
                                  double max_abs_log_scale) {
  if (start.empty()) return std::vector<double>(static_cast<size_t>(dimension), 0.0);
  require(static_cast<int64_t>(start.size()) == dimension, "start",
          "empty or " + std::to_string(dimension) + " numbers long",
          static_cast<double>(start.size()));
  for (const double value : start) {
    require(std::fabs(value) <= max_abs_log_scale, "start",
            "within max_abs_log_scale = " + decimal(max_abs_log_scale) + " of 0", value);
  }
  return start;
}

}  // namespace zerotuning::search
