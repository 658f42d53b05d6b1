// Random numbers that are the same on every platform, from a state that can be saved.
#pragma once

#include <array>
#include <cstdint>

namespace zerotuning::search {

// xoshiro256** 1.0 (Blackman and Vigna, "Scrambled linear pseudorandom number generators", 2021),
// with 256 bits of state filled from a 64-bit seed by splitmix64, as the authors advise. The
// numbers of std::normal_distribution would differ between standard libraries, and its state cannot
// be saved portably.
class RandomNumbers {
 public:
  explicit RandomNumbers(uint64_t seed);

  uint64_t next_bits();
  // Uniform in [0, 1), a multiple of 2^-53.
  double uniform();
  // Standard normal: the cosine half of the Box-Muller transform. The sine half would have to be
  // stored for the next call.
  double normal();

  const std::array<uint64_t, 4>& state() const { return state_; }
  std::array<uint64_t, 4>& state() { return state_; }

 private:
  std::array<uint64_t, 4> state_;
};

}  // namespace zerotuning::search
