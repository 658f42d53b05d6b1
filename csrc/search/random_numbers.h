// Random numbers that are the same on every platform and whose state can be saved.
#pragma once

#include <array>
#include <cstdint>

namespace zerotuning::search {

// xoshiro256** 1.0 (Blackman and Vigna, "Scrambled linear pseudorandom number generators", 2021),
// its 256 bits filled from a 64-bit seed by splitmix64 as its authors advise.
// std::normal_distribution is not used: what it returns is left to each standard library, and its
// state cannot be saved portably.
class RandomNumbers {
 public:
  explicit RandomNumbers(uint64_t seed);

  uint64_t next_bits();
  // Uniform in [0, 1), a multiple of 2^-53.
  double uniform();
  // Standard normal: the Box-Muller transform, its cosine half only: nothing is carried along.
  double normal();

  const std::array<uint64_t, 4>& state() const { return state_; }
  std::array<uint64_t, 4>& state() { return state_; }

 private:
  std::array<uint64_t, 4> state_;
};

}  // namespace zerotuning::search
