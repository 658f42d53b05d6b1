// The library that throws, in the place of the operators and the search.
#include <cxxabi.h>

#include <sstream>
#include <stdexcept>

extern "C" __attribute__((visibility("default"))) void throw_formatted(double value) {
  std::ostringstream message;
  message << "got " << value;
  throw std::invalid_argument(message.str());
}

// The function of the C++ runtime that this library throws with.
extern "C" __attribute__((visibility("default"))) void* throwing_runtime() {
  return reinterpret_cast<void*>(&abi::__cxa_throw);
}
