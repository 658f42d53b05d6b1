// The text in which an optimiser's state is written and read back, exact to the last bit.
//
//   zerotuning-search 1            version of this format
//   method gradient                then one line a field: its name, then its numbers
//   position 2 0x18000000000000p-52 -0x1p+0
//   end 0123456789abcdef           FNV-1a sum of all that stands above: shows a cut or changed text
//
// Doubles are written as C hexadecimal floating literals with an integer mantissa: exact, and
// independent of the locale. The writer and the reader have the same member functions, so that one
// list of fields serves both ways.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace zerotuning::search {

// The bounds that some functions take are the reader's; the writer has them for the common list.
class StateWriter {
 public:
  // All the lines written so far.
  const std::string& text() const { return text_; }
  // A complete state: the version line, the lines written so far, the end line.
  std::string sealed() const;

  void word(const char* name, const std::string& value);
  void number(const char* name, double value);
  void integer(const char* name, int64_t value, int64_t least, int64_t most);
  void flag(const char* name, bool value);
  void numbers(const char* name, const std::vector<double>& values, int64_t least_count,
               int64_t most_count);
  void numbers(const char* name, const std::vector<double>& values, int64_t count);
  void bits(const char* name, const std::array<uint64_t, 4>& value);

 private:
  std::string text_;
};

// Every function throws std::invalid_argument, naming the line and the field, when the text does
// not hold what is asked for: another field, count of numbers, or integer out of its bounds.
class StateReader {
 public:
  // Checks the version line and the sum in the end line.
  explicit StateReader(const std::string& sealed);

  // Reads as many lines as `expected` (of a StateWriter) has; a line that differs is an error that
  // names the field and gives both values.
  void same(const std::string& expected);
  void number(const char* name, double& value);
  void integer(const char* name, int64_t& value, int64_t least, int64_t most);
  void flag(const char* name, bool& value);
  void numbers(const char* name, std::vector<double>& values, int64_t least_count,
               int64_t most_count);
  void numbers(const char* name, std::vector<double>& values, int64_t count);
  void bits(const char* name, std::array<uint64_t, 4>& value);
  // All lines must have been read.
  void end() const;

 private:
  std::vector<std::string> field(const char* name, int64_t least_words, int64_t most_words);

  std::vector<std::string> lines_;
  size_t next_ = 0;
};

}  // namespace zerotuning::search
