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

// Threads that a loop started here may use: GDLIB_NUM_THREADS, else the CPUs that affinity and the cgroup quota leave. 1 inside a task; 1
// in a forked child, where the threads do not exist.
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

// A loop that takes one thread fewer cycles is never worth sharing: four times what that costs, as a thread that spins takes part within
// 0.5 us (at 4 GHz).
constexpr double least_shared_cycles = 8'000;

// Threads that a loop is worth sharing among, given about how many cycles it takes one thread: 1 where handing it out, or waking a thread
// for it, costs too much of that.
int threads_for(double cycles);

// Runs task(i, worker) for i from 0 to count - 1; worker < threads names the thread, the caller being 0. What a task throws is thrown here.
// Tasks are handed out in order, to whoever is free: a core that is shared with others takes fewer, and a thread that has no core holds
// nobody up, unless it lost it in the middle of a task. While another caller's loop has the threads, all tasks run on the calling one.
// Every task's writes are visible afterwards. A caller with memory for each worker asks for `threads` once: it may change between two
// calls.
void parallel_for(std::size_t count, int threads, Visitor<std::size_t, std::size_t> task);

// Finds out, again and again, whether the steps of a run are faster on all threads or on the calling one alone: with cores that have no
// cache in common, or a host that withholds one, small steps are slower on two threads than on one. What it has found stays for the
// thread's next run of such steps; one run at a time. Steps of more than 0.4 ms, which make up for all that, it leaves alone.
class StepPacer {
 public:
  // `step_cycles`: about what a step takes.
  explicit StepPacer(double step_cycles);
  ~StepPacer();
  StepPacer(const StepPacer&) = delete;
  StepPacer& operator=(const StepPacer&) = delete;

  void step_done();

 private:
  using Clock = std::chrono::steady_clock;
  enum class Phase { settled, trying_shared, trying_alone };

  struct Trials {
    double step_cycles = 0.0;
    Phase phase = Phase::settled;
    bool pays = true;  // to share
    double shared_rate = 0.0;  // steps per second
    int windows_left = 0, windows_to_keep = 0;
  };

  static Trials& kept();
  void end_window(double steps_per_second);
  void enter(Phase phase);

  Trials& trials_;
  Clock::time_point begin_;  // of the window, or of the time before it
  int steps_ = 0;
  bool warming_up_ = true;
};

}  // namespace gdlib
