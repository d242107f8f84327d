// A pseudo-random order without state: number i goes to mix(i), a keyed bijection of the numbers below a power of two; values that are not
// rows are left out. Unsigned 32-bit integers only: the same order on every machine.

namespace gdlib {
namespace {

size_t shuffle(const ShuffleKeys& keys, uint32_t first, uint32_t count, uint32_t rows, uint32_t* order) {
  const Vector16u step = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Vector16u mask = step * 0 + keys.mask;  // once: GCC 12 writes it lane by lane where it is wider than a register, twice the time
  size_t kept = 0;
  for (uint32_t i = 0; i < count; i += 16) {
    Vector16u v = step + (first + i);
    // Each line is a bijection below 2^bits: an odd multiplier has an inverse, and a right shift can be undone from the top.
    for (int r = 0; r < ShuffleKeys::rounds; ++r) {
      v = (v * keys.multiplier[r] + keys.addend[r]) & mask;
      v ^= v >> keys.shift;
    }
    kept += append_below(v, rows, order + kept);
  }
  return kept;
}

}  // namespace
}  // namespace gdlib
