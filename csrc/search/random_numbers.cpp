// xoshiro256**, uniform and normal numbers.
#include "search/random_numbers.h"

#include <cmath>

namespace zerotuning::search {
namespace {

uint64_t rotate_left(uint64_t value, int count) {
  return (value << count) | (value >> (64 - count));
}

}  // namespace

RandomNumbers::RandomNumbers(uint64_t seed) : state_{} {
  for (uint64_t& word : state_) {  // splitmix64
    seed += 0x9e3779b97f4a7c15u;
    uint64_t mixed = seed;
    mixed = (mixed ^ (mixed >> 30)) * 0xbf58476d1ce4e5b9u;
    mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111ebu;
    word = mixed ^ (mixed >> 31);
  }
}

uint64_t RandomNumbers::next_bits() {
  const uint64_t result = rotate_left(state_[1] * 5, 7) * 9;
  const uint64_t shifted = state_[1] << 17;
  state_[2] ^= state_[0];
  state_[3] ^= state_[1];
  state_[1] ^= state_[2];
  state_[0] ^= state_[3];
  state_[2] ^= shifted;
  state_[3] = rotate_left(state_[3], 45);
  return result;
}

double RandomNumbers::uniform() { return static_cast<double>(next_bits() >> 11) * 0x1p-53; }

double RandomNumbers::normal() {
  constexpr double kTwoPi = 6.283185307179586476925286766559;
  const double radius = std::sqrt(-2 * std::log(1 - uniform()));  // 1 - u lies in (0, 1]
  return radius * std::cos(kTwoPi * uniform());
}

}  // namespace zerotuning::search
