// Threads: the only place with OpenMP. Results are the same bits for every thread count: tasks whose sums meet depend, in number and order, on
// the sizes alone, and threads only decide who runs which. (Blocks of a matrix product do not meet; they may follow the threads.)
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <functional>
#include <utility>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace gdlib {

// Threads that a parallel call may use: GDLIB_NUM_THREADS, else the CPUs that affinity and the cgroup quota leave. 1 in a forked child,
// whose copy of the OpenMP pool has no threads and would wait for them for ever.
int thread_count();

// Throws std::invalid_argument below 1.
void set_thread_count(int count);

// Reads GDLIB_NUM_THREADS and registers the fork handler; throws std::invalid_argument for a bad value.
void initialize_threads();

bool openmp_enabled();

// Asked now and then while a call computes: has the caller been interrupted? `poll` runs on the calling thread only, at most every 50 ms
// (a fourth of the 0.2 s within which Ctrl-C is answered).
class Interrupt {
 public:
  explicit Interrupt(std::function<bool()> poll) : poll_(std::move(poll)), next_(Clock::now() + interval) {}

  bool requested() const { return requested_.load(std::memory_order_relaxed); }

  // Cheap enough for every task of a parallel loop; not for every step of a tiny model.
  bool check() {
    if (requested() || !on_calling_thread()) return requested();
    const auto now = Clock::now();
    if (now >= next_) {
      next_ = now + interval;
      if (poll_ && poll_()) requested_.store(true, std::memory_order_relaxed);  // a flag alone: no other data is published by it
    }
    return requested();
  }

  // The same between pieces of work that may be tiny, on the calling thread: the clock is asked about every 100,000 multiply-adds (10 to
  // 50 us).
  bool check_after(std::size_t multiply_adds) {
    work_ += multiply_adds;
    if (work_ < 100'000) return requested();
    work_ = 0;
    return check();
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds interval{50};

  static bool on_calling_thread() {
#if defined(_OPENMP)
    return omp_get_thread_num() == 0;
#else
    return true;
#endif
  }

  std::function<bool()> poll_;
  Clock::time_point next_;
  std::size_t work_ = 0;
  std::atomic<bool> requested_{false};
};

// Runs task(i, worker) for i from 0 to count - 1, in any order; worker < limit names the thread. A task must not throw. A caller with
// memory for each worker asks for the limit once: it may change between two calls.
template <class Task>
void parallel_for(std::size_t count, const Task& task, int limit = thread_count()) {
#if defined(_OPENMP)
  const int threads = count < static_cast<std::size_t>(limit) ? static_cast<int>(count) : limit;
  if (threads > 1) {
    // Dynamic: a core that is shared with others takes fewer tasks. The barrier at the end publishes every task's writes.
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (std::size_t i = 0; i < count; ++i) task(i, static_cast<std::size_t>(omp_get_thread_num()));
    return;
  }
#else
  static_cast<void>(limit);
#endif
  for (std::size_t i = 0; i < count; ++i) task(i, std::size_t{0});
}

}  // namespace gdlib
