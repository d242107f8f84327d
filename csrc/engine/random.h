// Random numbers as pure functions of (seed, position): the same on every platform and for any order of asking.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "aligned.h"
#include "parallel.h"

namespace gdlib {

// SplitMix64's output function (Steele, Lea and Flood 2014) at a counter.
inline std::uint64_t random_bits(std::uint64_t seed, std::uint64_t counter) {
  std::uint64_t z = seed + (counter + 1) * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// out[i] uniform in [-bound, bound), from 53 bits; a float32 one is rounded from that, which can reach the bound.
template <class T>
void fill_uniform(std::uint64_t seed, double bound, std::size_t n, T* out) {
  for (std::size_t i = 0; i < n; ++i) {
    const double unit = static_cast<double>(random_bits(seed, i) >> 11) * 0x1p-53;
    out[i] = static_cast<T>(bound * (2.0 * unit - 1.0));
  }
}

// A pseudo-random order of 0 ... rows - 1, rows at most 2^32 - 1. `order` is resized to `rows` (and a margin that the kernel may scribble
// on). Unfinished once `interrupt` has been requested.
void shuffle_order(std::uint64_t seed, std::uint32_t rows, AlignedVector<std::uint32_t>& order, Interrupt& interrupt);

}  // namespace gdlib
