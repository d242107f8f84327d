// CPU features -> kernel table. Compiled with baseline flags: it must run on the oldest machine.
//
// The built-in feature tests of GCC and Clang read CPUID once and also ask the operating system (XGETBV) whether it saves the wide
// registers. target_clones and ifunc are not used: they fail on musl and under the sanitizers.
#include "dispatch.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <utility>

namespace gdlib {

extern const Kernels kernels_scalar;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
#endif

namespace {

// Features that some table needs, and whether this machine has them.
const std::vector<std::pair<std::string, bool>>& features() {
  static const std::vector<std::pair<std::string, bool>> list = {
#if defined(__x86_64__)
      {"avx2", __builtin_cpu_supports("avx2")},         {"fma", __builtin_cpu_supports("fma")},
      {"avx512f", __builtin_cpu_supports("avx512f")},   {"avx512bw", __builtin_cpu_supports("avx512bw")},
      {"avx512dq", __builtin_cpu_supports("avx512dq")}, {"avx512vl", __builtin_cpu_supports("avx512vl")},
#elif defined(__aarch64__)
      {"neon", true},  // part of the baseline
#endif
  };
  return list;
}

struct Candidate {
  const Kernels* kernels;
  std::vector<std::string> needs;  // every feature that the table's compiler flags imply

  bool supported() const {
    const std::vector<std::string> found = cpu_features();
    return std::all_of(needs.begin(), needs.end(),
                       [&](const std::string& need) { return std::find(found.begin(), found.end(), need) != found.end(); });
  }
};

const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> list = {
      {&kernels_scalar, {}},
#if defined(__x86_64__)
      {&kernels_avx2, {"avx2", "fma"}},
      {&kernels_avx512, {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma"}},
#elif defined(__aarch64__)
      {&kernels_neon, {"neon"}},
#endif
  };
  return list;
}

const Kernels* current = nullptr;

}  // namespace

std::vector<std::string> cpu_features() {
  std::vector<std::string> names;
  for (const auto& [name, present] : features())
    if (present) names.push_back(name);
  return names;
}

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
