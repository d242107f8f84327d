// CPU features -> kernel table. Compiled with baseline flags: it must run on the oldest machine.
//
// The built-in feature tests of GCC and Clang read CPUID once and also ask the operating system (XGETBV) whether it saves the wide
// registers. target_clones and ifunc are not used: they fail on musl and under the sanitizers.
#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace gdlib {

extern const Kernels kernels_scalar;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
#endif

namespace {

struct Candidate {
  const Kernels* kernels;
  bool (*supported)();  // every feature that the table's compiler flags imply
};

bool always() { return true; }

const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> list = {
      {&kernels_scalar, always},
#if defined(__x86_64__)
      {&kernels_avx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
      {&kernels_avx512,
       [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
       }},
#elif defined(__aarch64__)
      {&kernels_neon, always},  // part of the aarch64 baseline
#endif
  };
  return list;
}

const Kernels* current = nullptr;

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates())
    if (candidate.supported()) names.emplace_back(candidate.kernels->isa);
  return names;
}

void select_isa(const std::string& name) {
  std::string known;
  for (const Candidate& candidate : candidates()) {
    if (!candidate.supported()) continue;
    if (name == candidate.kernels->isa) {
      current = candidate.kernels;
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(candidate.kernels->isa);
  }
  throw std::invalid_argument("GDLIB_ISA is '" + name + "', which this machine or this build does not have; it offers: " + known +
                              ". Unset GDLIB_ISA to take the fastest.");
}

const Kernels& kernels() {
  if (!current) {
    const char* forced = std::getenv("GDLIB_ISA");
    select_isa(forced && *forced ? forced : available_isas().back());
  }
  return *current;
}

template <>
const KernelTable<float>& table<float>() {
  return kernels().f32;
}
template <>
const KernelTable<double>& table<double>() {
  return kernels().f64;
}

}  // namespace gdlib
