// Error messages for arguments out of range.
#include "search/argument_checks.h"

#include <cmath>
#include <locale>
#include <sstream>
#include <stdexcept>

namespace zerotuning::search {

std::string decimal(double value) {
  std::ostringstream stream;
  stream.imbue(std::locale::classic());
  stream << value;
  return stream.str();
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
