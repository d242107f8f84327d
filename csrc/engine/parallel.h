// Threads. Results are the same bits for every thread count: tasks whose sums meet depend, in number and order, on the sizes alone, and
// threads only decide who runs which. (Blocks of a matrix product do not meet; they may follow the threads.)
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <functional>
#include <thread>
#include <utility>

#include "visitor.h"

namespace gdlib {

// Threads that a loop started here may use: those of the team that runs this code, else GDLIB_NUM_THREADS, else the CPUs that affinity and
// the cgroup quota leave. 1 inside a task; 1 in a forked child, whose copy of the OpenMP pool has no threads and would wait for them for
// ever.
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

  bool on_calling_thread() const { return std::this_thread::get_id() == caller_; }

  std::function<bool()> poll_;
  const std::thread::id caller_ = std::this_thread::get_id();
  Clock::time_point next_;
  std::size_t work_ = 0;
  std::atomic<bool> requested_{false};
};

// Runs task(i, worker) for i from 0 to count - 1; worker < limit names the thread. A task must not throw. Tasks are handed out in order, to
// whoever is free: a core that is shared with others takes fewer, and a thread that has no core holds nobody up, unless it lost it in the
// middle of a task. Every task's writes are visible afterwards. A caller with memory for each worker asks for the limit once: it may change
// between two calls.
void parallel_for(std::size_t count, Visitor<std::size_t, std::size_t> task, int limit = thread_count());

// Runs body(), on the calling thread; what it throws is thrown here. Its parallel loops are handed to one team of threads, which costs 0.3
// us a loop where starting a team for each would cost some microseconds. Nothing is started for few multiply-adds (between two loops).
void with_team(std::size_t multiply_adds, Visitor<> body);

// What sharing a loop that starts here costs a thread, in cycles.
double cycles_to_share();

// Finds out, again and again, whether the steps of a run are faster on the team or on the calling thread alone: with cores that have no
// cache in common, or a host that withholds one, small steps are slower on two threads than on one. Lives inside with_team's body, on its
// thread; without a team, and for steps of more than 0.2 ms, which make up for all that, it changes nothing.
class StepPacer {
 public:
  StepPacer();
  ~StepPacer();
  StepPacer(const StepPacer&) = delete;
  StepPacer& operator=(const StepPacer&) = delete;

  void step_done();

 private:
  using Clock = std::chrono::steady_clock;
  enum class Phase { settled, trying_shared, trying_alone };

  void end_window(double steps_per_second);
  void enter(Phase phase, bool alone);

  Phase phase_ = Phase::settled;
  Clock::time_point begin_;  // of the window
  int steps_ = 0;            // of the window; negative while it warms up
  double shared_rate_ = 0.0;
  bool pays_ = true;
  int windows_to_keep_ = least_windows, windows_left_ = least_windows;

  // Between two trials, 4 ms to 0.2 s: a wrong choice does not last, and trials cost little.
  static constexpr int least_windows = 20, most_windows = 1000;
};

}  // namespace gdlib
