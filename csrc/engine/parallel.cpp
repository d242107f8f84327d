#include "parallel.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace gdlib {
namespace {

std::atomic<int> configured{1};  // relaxed: a number on its own, set from any thread
constexpr int most_threads = 1024;  // OpenMP ends the process when the system cannot start as many as it is asked for
bool forked = false;

// CPUs of the cgroup's quota (version 2), rounded up; a large number where there is none.
int cgroup_cpus() {
  std::FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "r");
  if (!file) return 1 << 20;
  long quota = 0, period = 0;
  const int read = std::fscanf(file, "%ld %ld", &quota, &period);  // "max 100000" reads nothing: no quota
  std::fclose(file);
  if (read != 2 || quota <= 0 || period <= 0) return 1 << 20;
  return static_cast<int>((quota + period - 1) / period);
}

int available_cpus() {
#if defined(_OPENMP)
  const int by_affinity = omp_get_num_procs();
#else
  const int by_affinity = 1;
#endif
  return std::max(1, std::min(by_affinity, cgroup_cpus()));
}

int parse_threads(const char* text) {
  char* end = nullptr;
  const long value = std::strtol(text, &end, 10);
  if (end == text || *end != '\0' || value < 1 || value > most_threads)
    throw std::invalid_argument("GDLIB_NUM_THREADS is '" + std::string(text) +
                                "'; it takes a whole number from 1 to " + std::to_string(most_threads) + ". Unset it to use every CPU.");
  return static_cast<int>(value);
}

}  // namespace

void initialize_threads() {
  const char* text = std::getenv("GDLIB_NUM_THREADS");
  configured.store(text && *text ? parse_threads(text) : available_cpus(), std::memory_order_relaxed);
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
}

int thread_count() { return forked ? 1 : configured.load(std::memory_order_relaxed); }

void set_thread_count(int count) {
  if (count < 1 || count > most_threads)
    throw std::invalid_argument("the number of threads is " + std::to_string(count) + "; it must be from 1 to " +
                                std::to_string(most_threads) + ".");
  configured.store(count, std::memory_order_relaxed);
}

bool openmp_enabled() {
#if defined(_OPENMP)
  return true;
#else
  return false;
#endif
}

}  // namespace gdlib
