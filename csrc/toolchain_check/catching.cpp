// The library that catches, in the place of torch and Python.
#include <cstring>
#include <exception>
#include <stdexcept>

// 0 if the exception arrives with its type and its text, also when it is thrown again.
extern "C" __attribute__((visibility("default"))) int catch_from(void (*throw_formatted)(double)) {
  try {
    throw_formatted(2.5);
  } catch (const std::invalid_argument&) {
    try {
      std::rethrow_exception(std::current_exception());
    } catch (const std::logic_error& error) {
      return std::strcmp(error.what(), "got 2.5") == 0 ? 0 : 1;
    }
  } catch (...) {
    return 2;
  }
  return 3;
}
