// The state of a search as JSON: one flat object, exact to the last bit.
//
//   {
//     "format": "zerotuning-search 2",
//     "method": "gradient",
//     "point": [0.1, -1.0]
//   }
//
// Doubles are written with as few digits as give the same bits again. Doubles that JSON lacks are
// the strings "NaN", "Infinity" and "-Infinity". The order of the fields has no meaning.
// StateWriter and StateReader have the same member functions, so that one list of fields serves
// both ways.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace zerotuning::search {

// A JSON scalar, or a list of scalars, as JSON writes them: strings stand within quotes.
struct StateValue {
  bool is_list = false;
  std::vector<std::string> scalars;
};

// Some functions have bounds as arguments for StateReader's sake. StateWriter ignores the bounds.
class StateWriter {
 public:
  using Fields = std::vector<std::pair<std::string, StateValue>>;

  const Fields& fields() const { return fields_; }
  // The JSON object of the format's name and all fields.
  std::string json() const;

  // value: letters, digits, spaces and hyphens.
  void word(const char* name, const std::string& value);
  void flag(const char* name, bool value);
  void integer(const char* name, int64_t value, int64_t least, int64_t most);
  void seed(const char* name, uint64_t value);
  void bits(const char* name, const std::array<uint64_t, 4>& value);
  void number(const char* name, double value);
  void numbers(const char* name, const std::vector<double>& values, int64_t least_count,
               int64_t most_count);
  void numbers(const char* name, const std::vector<double>& values, int64_t count);
  void loss(const char* name, double value);
  void losses(const char* name, const std::vector<double>& values, int64_t least_count,
              int64_t most_count);

 private:
  void scalar(const char* name, std::string value);
  void list(const char* name, std::vector<std::string> values);

  Fields fields_;
};

// Every function throws std::invalid_argument, naming the field, when the state lacks the field or
// its value is of another kind, count or range.
class StateReader {
 public:
  // Checks that the text is a JSON object of this format.
  explicit StateReader(const std::string& json);

  // Reads every field of `expected`. If a field has another value, the error gives both values.
  void same(const StateWriter& expected);
  void integer(const char* name, int64_t& value, int64_t least, int64_t most);
  void bits(const char* name, std::array<uint64_t, 4>& value);
  // Finite numbers.
  void number(const char* name, double& value);
  void numbers(const char* name, std::vector<double>& values, int64_t least_count,
               int64_t most_count);
  void numbers(const char* name, std::vector<double>& values, int64_t count);
  // Numbers that may be infinite: the loss of an evaluation that failed.
  void loss(const char* name, double& value);
  void losses(const char* name, std::vector<double>& values, int64_t least_count,
              int64_t most_count);
  // All fields must have been read.
  void end() const;

 private:
  StateValue take(const char* name);
  std::string take_scalar(const char* name);
  std::vector<std::string> take_list(const char* name, int64_t least_count, int64_t most_count);

  std::map<std::string, StateValue> fields_;  // fields that are not read yet
};

}  // namespace zerotuning::search
