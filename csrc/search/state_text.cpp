// Writing and reading the text of an optimiser's state.
#include "search/state_text.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <locale>
#include <sstream>
#include <stdexcept>

namespace zerotuning::search {
namespace {

constexpr char kVersionLine[] = "zerotuning-search 1";

template <typename Integer>
std::string integer_text(Integer value, int base) {
  std::array<char, 32> buffer{};
  const auto result = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value, base);
  return std::string(buffer.data(), result.ptr);
}

template <typename Integer>
bool parse_integer(const char* first, const char* last, int base, Integer& value) {
  const auto result = std::from_chars(first, last, value, base);
  return result.ec == std::errc() && result.ptr == last && first != last;
}

std::string double_text(double value) {
  if (std::isnan(value)) return "nan";
  const std::string sign = std::signbit(value) ? "-" : "";
  if (std::isinf(value)) return sign + "inf";
  if (value == 0) return sign + "0x0p+0";
  int exponent = 0;
  auto mantissa = static_cast<uint64_t>(std::ldexp(std::frexp(std::fabs(value), &exponent), 53));
  exponent -= 53;
  for (; mantissa % 16 == 0; mantissa /= 16) exponent += 4;
  return sign + "0x" + integer_text(mantissa, 16) + "p" + (exponent < 0 ? "" : "+") +
         integer_text(exponent, 10);
}

bool parse_double(const std::string& text, double& value) {
  if (text == "nan") {
    value = std::numeric_limits<double>::quiet_NaN();
    return true;
  }
  const bool negative = !text.empty() && text[0] == '-';
  const std::string magnitude = text.substr(negative ? 1 : 0);
  double parsed = std::numeric_limits<double>::infinity();
  if (magnitude != "inf") {
    const size_t p = magnitude.find('p');
    if (magnitude.compare(0, 2, "0x") != 0 || p == std::string::npos) return false;
    const char* start = magnitude.data();
    uint64_t mantissa = 0;
    int exponent = 0;
    const size_t exponent_at = p + (magnitude.compare(p, 2, "p+") == 0 ? 2 : 1);
    if (!parse_integer(start + 2, start + p, 16, mantissa)) return false;
    if (!parse_integer(start + exponent_at, start + magnitude.size(), 10, exponent)) return false;
    parsed = std::ldexp(static_cast<double>(mantissa), exponent);
  }
  value = negative ? -parsed : parsed;
  return true;
}

// Fowler, Noll and Vo's 64-bit hash, variant 1a.
std::string checksum(const std::string& text) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const char character : text) {
    hash = (hash ^ static_cast<unsigned char>(character)) * 0x100000001b3u;
  }
  const std::string digits = integer_text(hash, 16);
  return std::string(16 - digits.size(), '0') + digits;
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

// The values of a line for an error message: a lone number in decimals, a long list as its length.
std::string readable(const std::string& line) {
  const std::vector<std::string> words = split(line, ' ');
  double value = 0;
  if (words.size() == 2 && parse_double(words[1], value)) {
    std::ostringstream stream;
    stream.imbue(std::locale::classic());
    stream.precision(15);
    stream << value;
    return stream.str();
  }
  if (words.size() > 2) return "a list of " + words[1] + " numbers";
  return words.size() == 2 ? words[1] : line;
}

[[noreturn]] void fail(const std::string& message) {
  throw std::invalid_argument("state: " + message);
}

}  // namespace

std::string StateWriter::sealed() const {
  const std::string body = std::string(kVersionLine) + "\n" + text_;
  return body + "end " + checksum(body) + "\n";
}

void StateWriter::word(const char* name, const std::string& value) {
  text_ += name;
  text_ += ' ';
  text_ += value;
  text_ += '\n';
}

void StateWriter::number(const char* name, double value) { word(name, double_text(value)); }

void StateWriter::integer(const char* name, int64_t value, int64_t, int64_t) {
  word(name, integer_text(value, 10));
}

void StateWriter::flag(const char* name, bool value) { word(name, value ? "true" : "false"); }

void StateWriter::numbers(const char* name, const std::vector<double>& values, int64_t, int64_t) {
  std::string line = integer_text(values.size(), 10);
  for (const double value : values) line += " " + double_text(value);
  word(name, line);
}

void StateWriter::numbers(const char* name, const std::vector<double>& values, int64_t count) {
  numbers(name, values, count, count);
}

void StateWriter::bits(const char* name, const std::array<uint64_t, 4>& value) {
  std::string line = integer_text(value[0], 16);
  for (size_t i = 1; i < value.size(); ++i) line += " " + integer_text(value[i], 16);
  word(name, line);
}

StateReader::StateReader(const std::string& sealed) {
  if (sealed.rfind(std::string(kVersionLine) + "\n", 0) != 0) {
    fail("expected the first line '" + std::string(kVersionLine) + "', got '" +
         sealed.substr(0, std::min(sealed.find('\n'), size_t{60})) + "'");
  }
  const size_t end = sealed.rfind("\nend ");
  if (end == std::string::npos) fail("the text is truncated: its line 'end' is missing");
  const std::string body = sealed.substr(0, end + 1);
  const std::string sum = checksum(body);
  if (sealed.substr(end + 1) != "end " + sum + "\n") {
    fail("the text is truncated or was changed: expected the last line 'end " + sum + "', got '" +
         sealed.substr(end + 1, 60) + "'");
  }
  lines_ = split(body, '\n');
  next_ = 1;
}

std::vector<std::string> StateReader::field(const char* name, int64_t least_words,
                                            int64_t most_words) {
  const std::string where = "line " + std::to_string(next_ + 1) + ": ";
  if (next_ >= lines_.size()) fail(where + "expected '" + name + "', got the end");
  std::vector<std::string> words = split(lines_[next_], ' ');
  if (words.empty() || words[0] != name) {
    fail(where + "expected '" + name + "', got '" + lines_[next_].substr(0, 60) + "'");
  }
  words.erase(words.begin());
  const auto count = static_cast<int64_t>(words.size());
  if (count < least_words || count > most_words) {
    fail(where + "'" + name + "' must have " + std::to_string(least_words) + " to " +
         std::to_string(most_words) + " words, got " + std::to_string(count));
  }
  ++next_;
  return words;
}

void StateReader::same(const std::string& expected) {
  for (const std::string& line : split(expected, '\n')) {
    const std::string name = line.substr(0, line.find(' '));
    const std::string got = next_ < lines_.size() ? lines_[next_] : "";
    if (got.substr(0, got.find(' ')) != name) field(name.c_str(), 0, 0);  // says what is wrong
    if (got != line) {
      fail(name + " does not match: this optimizer has " + readable(line) + ", the state has " +
           readable(got));
    }
    ++next_;
  }
}

void StateReader::number(const char* name, double& value) {
  const std::string word = field(name, 1, 1)[0];
  if (!parse_double(word, value))
    fail(std::string(name) + ": expected a number, got '" + word + "'");
}

void StateReader::integer(const char* name, int64_t& value, int64_t least, int64_t most) {
  const std::string word = field(name, 1, 1)[0];
  const bool parsed = parse_integer(word.data(), word.data() + word.size(), 10, value);
  if (!parsed || value < least || value > most) {
    fail(std::string(name) + ": expected an integer from " + std::to_string(least) + " to " +
         std::to_string(most) + ", got '" + word + "'");
  }
}

void StateReader::flag(const char* name, bool& value) {
  const std::string word = field(name, 1, 1)[0];
  if (word != "true" && word != "false") {
    fail(std::string(name) + ": expected true or false, got '" + word + "'");
  }
  value = word == "true";
}

void StateReader::numbers(const char* name, std::vector<double>& values, int64_t least_count,
                          int64_t most_count) {
  const std::vector<std::string> words = field(name, least_count + 1, most_count + 1);
  int64_t count = 0;
  const bool parsed = parse_integer(words[0].data(), words[0].data() + words[0].size(), 10, count);
  if (!parsed || count + 1 != static_cast<int64_t>(words.size())) {
    fail(std::string(name) + ": announces '" + words[0] + "' numbers, has " +
         std::to_string(words.size() - 1));
  }
  values.resize(static_cast<size_t>(count));
  for (size_t i = 0; i < values.size(); ++i) {
    if (!parse_double(words[i + 1], values[i])) {
      fail(std::string(name) + ": expected a number, got '" + words[i + 1] + "'");
    }
  }
}

void StateReader::numbers(const char* name, std::vector<double>& values, int64_t count) {
  numbers(name, values, count, count);
}

void StateReader::bits(const char* name, std::array<uint64_t, 4>& value) {
  const std::vector<std::string> words = field(name, 4, 4);
  for (size_t i = 0; i < value.size(); ++i) {
    if (!parse_integer(words[i].data(), words[i].data() + words[i].size(), 16, value[i])) {
      fail(std::string(name) + ": expected hexadecimal digits, got '" + words[i] + "'");
    }
  }
}

void StateReader::end() const {
  if (next_ != lines_.size()) {
    fail("line " + std::to_string(next_ + 1) + ": expected the end, got '" +
         lines_[next_].substr(0, 60) + "'");
  }
}

}  // namespace zerotuning::search
