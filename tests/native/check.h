// What the native checks share: the check for a machine without Python, such as one that an emulator provides. Built and run by
// tests/native/cross_check.sh; ends with a line "N passed, M failed".
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../../csrc/engine/random.h"

// Counts, and prints what is not good.
void expect(bool good, const std::string& what);

template <class T>
std::vector<T> numbers(std::size_t n, std::uint64_t seed) {
  std::vector<T> values(n);
  gdlib::fill_uniform(seed, 1.0, n, values.data());
  return values;
}

// Every kernel of the table against plain loops in double.
template <class T>
void check_kernels();

// Networks, and whole rounds of training.
template <class T>
void check_training();

// Loops on so many threads.
void check_threads(int threads);
