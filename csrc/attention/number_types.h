// 16-bit floating point as plain structs, with conversions that compilers vectorise.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

// Always inlined: these functions are compiled for several instruction sets, and the linker must
// not use one instruction set's copy for another.
#define ZEROTUNING_INLINE inline __attribute__((always_inline))

namespace zerotuning::attention {

enum class DType { float64, float32, bfloat16, float16 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

namespace detail {
template <typename To, typename From>
ZEROTUNING_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
}  // namespace detail

ZEROTUNING_INLINE double widen(double x) { return x; }
ZEROTUNING_INLINE float widen(float x) { return x; }
ZEROTUNING_INLINE float widen(BFloat16 x) {
  return detail::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}
ZEROTUNING_INLINE float widen(Float16 x) {
  // Moves exponent and mantissa to their places in float32; the product with 2^112 corrects the
  // exponent's bias, for subnormal numbers too.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const float scaled = detail::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special =
      (x.bits & 0x7c00) == 0x7c00 ? (magnitude | 0x7f800000u) : detail::bit_cast<uint32_t>(scaled);
  return detail::bit_cast<float>(special | sign);
}

template <typename T>
T narrow(typename std::conditional<std::is_same<T, double>::value, double, float>::type x);

template <>
ZEROTUNING_INLINE double narrow<double>(double x) {
  return x;
}
template <>
ZEROTUNING_INLINE float narrow<float>(float x) {
  return x;
}
template <>
ZEROTUNING_INLINE BFloat16 narrow<BFloat16>(float x) {
  const uint32_t bits = detail::bit_cast<uint32_t>(x);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  return {static_cast<uint16_t>(nan ? 0x7fc0 : rounded >> 16)};
}
template <>
ZEROTUNING_INLINE Float16 narrow<Float16>(float x) {
  const uint32_t bits = detail::bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude >= 0x7f800000) {  // infinity or NaN
    half = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  } else if (magnitude >= 0x477ff000) {  // rounds beyond 65504
    half = 0x7c00;
  } else if (magnitude <
             0x38800000) {  // subnormal: adding 0.5 aligns the mantissa and rounds to even
    half = detail::bit_cast<uint32_t>(detail::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  return {static_cast<uint16_t>(half | sign)};
}

// The type of sums of products of T.
template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

}  // namespace zerotuning::attention
