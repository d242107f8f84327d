#include "random.h"

#include <algorithm>

#include "../dispatch/dispatch.h"

namespace gdlib {
namespace {

// Below 64 numbers the bijection has too few keys to reach all orders evenly.
constexpr std::uint32_t smallest_bits = 6;

ShuffleKeys make_keys(std::uint64_t seed, std::uint32_t bits) {
  ShuffleKeys keys;
  for (int r = 0; r < ShuffleKeys::rounds; ++r) {
    const std::uint64_t random = random_bits(seed, static_cast<std::uint64_t>(r));
    keys.multiplier[r] = static_cast<std::uint32_t>(random) | 1u;
    keys.addend[r] = static_cast<std::uint32_t>(random >> 32);
  }
  keys.mask = bits == 32 ? ~0u : (1u << bits) - 1u;
  keys.shift = (bits + 1) / 2;
  return keys;
}

}  // namespace

void shuffle_order(std::uint64_t seed, std::uint32_t rows, AlignedVector<std::uint32_t>& order, Interrupt& interrupt) {
  std::uint32_t bits = smallest_bits;
  while (bits < 32 && (std::uint64_t{1} << bits) < rows) ++bits;
  const ShuffleKeys keys = make_keys(seed, bits);
  order.resize(std::size_t{rows} + 16);
  const std::uint64_t numbers = std::uint64_t{1} << bits;
  constexpr std::uint64_t block = 1u << 20;  // about 1 ms, after which an interrupt is seen; 2^32 would not fit the kernel's count
  std::size_t kept = 0;
  for (std::uint64_t first = 0; first < numbers && !interrupt.check(); first += block)
    kept += kernels().shuffle(keys, static_cast<std::uint32_t>(first), static_cast<std::uint32_t>(std::min(block, numbers - first)), rows,
                              order.data() + kept);
  order.resize(rows);
}

}  // namespace gdlib
