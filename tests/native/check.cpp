#include "check.h"

#include <algorithm>
#include <cstdio>

#include "../../csrc/dispatch/dispatch.h"
#include "../../csrc/engine/parallel.h"

namespace {

int passed = 0, failed = 0;

}  // namespace

void expect(bool good, const std::string& what) {
  ++(good ? passed : failed);
  if (!good) std::printf("failed: %s, on %s\n", what.c_str(), gdlib::kernels().isa);
}

// native_check [ISA ...]: all of this machine, and the threads; or these alone, for a slow emulator.
int main(int count, char** words) {
  std::vector<std::string> isas(words + 1, words + count);
  gdlib::initialize_threads();
  if (isas.empty()) {
    if (gdlib::openmp_enabled())
      for (const int threads : {2, 3, 8, 2}) check_threads(threads);
    isas = gdlib::available_isas();
  }
  std::vector<gdlib::AlignedVector<std::uint32_t>> orders;
  for (const std::string& isa : isas) {
    gdlib::select_isa(isa);
    check_training<float>();
    check_training<double>();
    check_kernels<float>();
    check_kernels<double>();
    orders.emplace_back();
    gdlib::Interrupt interrupt(nullptr);
    gdlib::shuffle_order(1, 1000, orders.back(), interrupt);
    expect(std::equal(orders.back().begin(), orders.back().end(), orders.front().begin()), "order");
    std::printf("%s checked\n", isa.c_str());
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
