// Checks of arguments that the searches share. All errors are std::invalid_argument.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace zerotuning::search {

// The number in decimals, the same in every locale, for an error message.
std::string decimal(double value);

// Throws "<name> must be <expected>, got <value>" unless `valid`.
void require(bool valid, const char* name, const std::string& expected, double value);

// A start point: empty stands for x = 0; else [dimension], finite, within the bound.
std::vector<double> checked_start(const std::vector<double>& start, int64_t dimension,
                                  double max_abs_log_scale);

}  // namespace zerotuning::search
