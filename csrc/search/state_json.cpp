// Writes and reads the state of a search.
#include "search/state_json.h"

#include <charconv>
#include <cmath>
#include <limits>
#include <locale>
#include <sstream>
#include <stdexcept>

namespace zerotuning::search {
namespace {

constexpr char kFormat[] = "\"zerotuning-search 2\"";
constexpr char kNaN[] = "\"NaN\"";
constexpr char kInfinity[] = "\"Infinity\"";
constexpr char kMinusInfinity[] = "\"-Infinity\"";

[[noreturn]] void fail(const std::string& message) {
  throw std::invalid_argument("state: " + message);
}

std::string quoted(const std::string& text) { return "\"" + text + "\""; }

std::string double_text(double value) {
  if (std::isnan(value)) return kNaN;
  if (std::isinf(value)) return value > 0 ? kInfinity : kMinusInfinity;
  std::array<char, 32> buffer{};
  const auto result = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value);
  std::string text(buffer.data(), result.ptr);
  // Other JSON readers parse a number without point and exponent as an integer, which has no -0.
  if (text.find_first_of(".e") == std::string::npos) text += ".0";
  return text;
}

std::vector<std::string> double_texts(const std::vector<double>& values) {
  std::vector<std::string> texts;
  texts.reserve(values.size());
  for (const double value : values) texts.push_back(double_text(value));
  return texts;
}

bool parse_double(const std::string& text, double& value) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  if (text == kNaN || text == kInfinity || text == kMinusInfinity) {
    value = text == kNaN ? std::numeric_limits<double>::quiet_NaN()
                         : (text == kInfinity ? infinity : -infinity);
    return true;
  }
  std::istringstream stream(text);
  stream.imbue(std::locale::classic());
  return static_cast<bool>(stream >> value) &&
         stream.peek() == std::istringstream::traits_type::eof();
}

template <typename Integer>
bool parse_integer(const std::string& text, Integer& value) {
  const char* end = text.data() + text.size();
  const auto result = std::from_chars(text.data(), end, value);
  return result.ec == std::errc() && result.ptr == end && !text.empty();
}

// Splits the text of a flat JSON object into its fields.
class Scanner {
 public:
  explicit Scanner(const std::string& text) : text_(text) {}

  std::map<std::string, StateValue> fields() {
    std::map<std::string, StateValue> fields;
    expect('{');
    for (bool first = true; first || next_is(','); first = false) {
      if (peek() != '"') unexpected("a field's name");
      const std::string quoted_name = scalar();
      const std::string name = quoted_name.substr(1, quoted_name.size() - 2);
      expect(':');
      if (!fields.emplace(name, value()).second) fail("field '" + name + "' appears twice");
    }
    expect('}');
    if (peek() != '\0') unexpected("the end");
    return fields;
  }

 private:
  // The next character that is not white space, '\0' at the end.
  char peek() {
    while (position_ < text_.size() &&
           std::string(" \t\r\n").find(text_[position_]) != std::string::npos)
      ++position_;
    return position_ < text_.size() ? text_[position_] : '\0';
  }

  bool next_is(char character) {
    if (peek() != character) return false;
    ++position_;
    return true;
  }

  void expect(char character) {
    if (!next_is(character)) unexpected(std::string("'") + character + "'");
  }

  [[noreturn]] void unexpected(const std::string& expected) {
    const char got = peek();
    fail("no JSON object of numbers, strings and lists: expected " + expected + " at character " +
         std::to_string(position_ + 1) + ", got " +
         (got == '\0' ? std::string("the end") : "'" + text_.substr(position_, 20) + "'"));
  }

  StateValue value() {
    if (!next_is('[')) return {false, {scalar()}};
    StateValue list{true, {}};
    if (next_is(']')) return list;
    do list.scalars.push_back(scalar());
    while (next_is(','));
    expect(']');
    return list;
  }

  // A string with its quotes (no field contains escapes), or a word of letters and the characters
  // of numbers, such as -1.5e+300 or true.
  std::string scalar() {
    const size_t begin = peek() == '\0' ? text_.size() : position_;
    if (next_is('"')) {
      position_ = text_.find('"', position_);
      if (position_ == std::string::npos) {
        position_ = text_.size();
        unexpected("'\"'");
      }
      ++position_;
    } else {
      const auto belongs = [](char c) {
        return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || c == 'E' || c == '+' ||
               c == '-' || c == '.';
      };
      while (position_ < text_.size() && belongs(text_[position_])) ++position_;
      if (position_ == begin) unexpected("a value");
    }
    return text_.substr(begin, position_ - begin);
  }

  const std::string& text_;
  size_t position_ = 0;
};

bool same_scalar(const std::string& a, const std::string& b) {
  if (a == b) return true;
  // 1e5 and 100000.0 are the same number. Integers are compared by their digits: seeds have more
  // than 53 bits.
  const auto is_double = [](const std::string& text) {
    return text[0] != '"' && text.find_first_of(".eE") != std::string::npos;
  };
  double first = 0;
  double second = 0;
  return (is_double(a) || is_double(b)) && parse_double(a, first) && parse_double(b, second) &&
         first == second;
}

bool same_value(const StateValue& a, const StateValue& b) {
  if (a.is_list != b.is_list || a.scalars.size() != b.scalars.size()) return false;
  for (size_t i = 0; i < a.scalars.size(); ++i) {
    if (!same_scalar(a.scalars[i], b.scalars[i])) return false;
  }
  return true;
}

// For an error message: a string without its quotes, a list as its length.
std::string readable(const StateValue& value) {
  if (value.is_list) return "a list of " + std::to_string(value.scalars.size()) + " numbers";
  const std::string text = value.scalars[0].substr(0, 60);
  return text[0] == '"' ? text.substr(1, text.rfind('"') - 1) : text;
}

}  // namespace

std::string StateWriter::json() const {
  std::string text = std::string("{\n  \"format\": ") + kFormat;
  for (const auto& [name, value] : fields_) {
    text += ",\n  " + quoted(name) + ": " + (value.is_list ? "[" : "");
    for (size_t i = 0; i < value.scalars.size(); ++i) {
      text += (i == 0 ? "" : ", ") + value.scalars[i];
    }
    text += value.is_list ? "]" : "";
  }
  return text + "\n}\n";
}

void StateWriter::scalar(const char* name, std::string value) {
  fields_.emplace_back(name, StateValue{false, {std::move(value)}});
}

void StateWriter::list(const char* name, std::vector<std::string> values) {
  fields_.emplace_back(name, StateValue{true, std::move(values)});
}

void StateWriter::word(const char* name, const std::string& value) { scalar(name, quoted(value)); }

void StateWriter::flag(const char* name, bool value) { scalar(name, value ? "true" : "false"); }

void StateWriter::integer(const char* name, int64_t value, int64_t, int64_t) {
  scalar(name, std::to_string(value));
}

void StateWriter::seed(const char* name, uint64_t value) { scalar(name, std::to_string(value)); }

void StateWriter::bits(const char* name, const std::array<uint64_t, 4>& value) {
  std::vector<std::string> words;
  words.reserve(value.size());
  for (const uint64_t word : value) words.push_back(std::to_string(word));
  list(name, std::move(words));
}

void StateWriter::number(const char* name, double value) { scalar(name, double_text(value)); }

void StateWriter::numbers(const char* name, const std::vector<double>& values, int64_t, int64_t) {
  list(name, double_texts(values));
}

void StateWriter::numbers(const char* name, const std::vector<double>& values, int64_t count) {
  numbers(name, values, count, count);
}

void StateWriter::loss(const char* name, double value) { number(name, value); }

void StateWriter::losses(const char* name, const std::vector<double>& values, int64_t least_count,
                         int64_t most_count) {
  numbers(name, values, least_count, most_count);
}

StateReader::StateReader(const std::string& json) : fields_(Scanner(json).fields()) {
  const std::string format = take_scalar("format");
  if (format != kFormat) fail(std::string("format: expected ") + kFormat + ", got " + format);
}

StateValue StateReader::take(const char* name) {
  const auto found = fields_.find(name);
  if (found == fields_.end()) fail(std::string("field '") + name + "' is missing");
  StateValue value = std::move(found->second);
  fields_.erase(found);
  return value;
}

std::string StateReader::take_scalar(const char* name) {
  StateValue value = take(name);
  if (value.is_list) fail(std::string(name) + ": expected one value, got " + readable(value));
  return std::move(value.scalars[0]);
}

std::vector<std::string> StateReader::take_list(const char* name, int64_t least_count,
                                                int64_t most_count) {
  StateValue value = take(name);
  const std::string expected =
      std::string(name) + ": expected a list of " + std::to_string(least_count) +
      (most_count == least_count ? "" : " to " + std::to_string(most_count)) + " numbers, got ";
  if (!value.is_list) fail(expected + value.scalars[0].substr(0, 60));
  const auto count = static_cast<int64_t>(value.scalars.size());
  if (count < least_count || count > most_count) fail(expected + std::to_string(count));
  return std::move(value.scalars);
}

void StateReader::same(const StateWriter& expected) {
  for (const auto& [name, value] : expected.fields()) {
    const StateValue got = take(name.c_str());
    if (!same_value(got, value)) {
      fail(name + " does not match: this search has " + readable(value) + ", the state has " +
           readable(got));
    }
  }
}

void StateReader::integer(const char* name, int64_t& value, int64_t least, int64_t most) {
  const std::string text = take_scalar(name);
  if (!parse_integer(text, value) || value < least || value > most) {
    fail(std::string(name) + ": expected an integer from " + std::to_string(least) + " to " +
         std::to_string(most) + ", got " + text.substr(0, 60));
  }
}

void StateReader::bits(const char* name, std::array<uint64_t, 4>& value) {
  const std::vector<std::string> texts = take_list(name, 4, 4);
  for (size_t i = 0; i < value.size(); ++i) {
    if (!parse_integer(texts[i], value[i])) {
      fail(std::string(name) + ": expected integers from 0 to 2^64 - 1, got " + texts[i]);
    }
  }
}

void StateReader::loss(const char* name, double& value) {
  const std::string text = take_scalar(name);
  if (!parse_double(text, value)) {
    fail(std::string(name) + ": expected a number, got " + text.substr(0, 60));
  }
}

void StateReader::losses(const char* name, std::vector<double>& values, int64_t least_count,
                         int64_t most_count) {
  const std::vector<std::string> texts = take_list(name, least_count, most_count);
  values.resize(texts.size());
  for (size_t i = 0; i < values.size(); ++i) {
    if (!parse_double(texts[i], values[i])) {
      fail(std::string(name) + "[" + std::to_string(i) + "]: expected a number, got " +
           texts[i].substr(0, 60));
    }
  }
}

void StateReader::number(const char* name, double& value) {
  loss(name, value);
  if (!std::isfinite(value)) {
    fail(std::string(name) + ": expected a finite number, got " + double_text(value));
  }
}

void StateReader::numbers(const char* name, std::vector<double>& values, int64_t least_count,
                          int64_t most_count) {
  losses(name, values, least_count, most_count);
  for (size_t i = 0; i < values.size(); ++i) {
    if (!std::isfinite(values[i])) {
      fail(std::string(name) + "[" + std::to_string(i) + "]: expected a finite number, got " +
           double_text(values[i]));
    }
  }
}

void StateReader::numbers(const char* name, std::vector<double>& values, int64_t count) {
  numbers(name, values, count, count);
}

void StateReader::end() const {
  if (!fields_.empty()) fail("unexpected field '" + fields_.begin()->first.substr(0, 60) + "'");
}

}  // namespace zerotuning::search
