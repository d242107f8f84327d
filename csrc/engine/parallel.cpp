// The only file with OpenMP, which starts the threads of a team and keeps them between two calls. Who runs which task is settled here: the
// barrier of a loop of OpenMP's waits for every thread, also for one that has lost its core and taken no task.
#include "parallel.h"

#include <pthread.h>

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <limits>
#include <mutex>
#include <stdexcept>
#include <string>

#if defined(_OPENMP)
#include <omp.h>
#endif

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

class Team;
thread_local Team* led = nullptr;   // the team whose loops are started on this thread
thread_local bool in_task = false;  // loops inside a task run on its thread

// Waits a little longer at each turn: at first without leaving the core, for a loop that begins or ends within microseconds, then with a
// chance for others, whose task may be what it waits for.
class Patience {
 public:
  // Whether it has waited for `rest` already.
  bool over(std::chrono::microseconds rest) const { return turns_ > turns_at_once && std::chrono::steady_clock::now() - since_ >= rest; }

  void wait() {
    if (++turns_ <= turns_at_once) {
#if defined(__x86_64__) || defined(__i386__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    } else {
      if (turns_ == turns_at_once + 1) since_ = std::chrono::steady_clock::now();
      std::this_thread::yield();
    }
  }

 private:
  static constexpr int turns_at_once = 500;  // about 10 us
  int turns_ = 0;
  std::chrono::steady_clock::time_point since_;
};

// Threads that work on one loop after the other. The calling thread starts a loop and takes tasks of it like the others.
class Team {
 public:
  explicit Team(int size) : size_(size) {}

  // 1 while the calling thread is told to work alone.
  int threads() const { return alone_ ? 1 : size_; }
  void set_alone(bool alone) { alone_ = alone; }

  // On the calling thread.
  void run(std::size_t count, Visitor<std::size_t, std::size_t> task) {
    constexpr std::size_t most = std::numeric_limits<std::uint32_t>::max();
    for (std::size_t begin = 0; begin < count; begin += most) {
      first_ = begin;
      count_ = static_cast<std::uint32_t>(std::min(most, count - begin));
      task_ = task;
      finished_.store(0, std::memory_order_relaxed);  // published, as the lines above, with the loop's first state
      announce(++loop_ << 32 | count_);
      const std::uint32_t own = take_tasks(0);
      // Acquires what the others' tasks have written. One that has taken none is not waited for: it finds none left.
      for (Patience patience; finished_.load(std::memory_order_acquire) != count_ - own;) patience.wait();
    }
  }

  // On the other threads, until the team is dismissed.
  void serve(std::size_t worker) {
    in_task = true;
    while (wait_for_tasks()) finished_.fetch_add(take_tasks(worker), std::memory_order_release);
    in_task = false;
  }

  void dismiss() { announce(dismissed); }

 private:
  static constexpr std::uint64_t dismissed = std::numeric_limits<std::uint64_t>::max();
  static constexpr std::chrono::microseconds rest{200};  // what a thread spins for the next loop: four times what waking it costs

  void announce(std::uint64_t state) {
    // Sequentially consistent, as a sleeper's count and its look at the state are: one of the two sees the other.
    state_.store(state);
    if (sleepers_.load() == 0) return;
    // A thread that is just falling asleep is not waited for: it sleeps through this loop. It must not miss the end.
    std::unique_lock<std::mutex> lock(mutex_, std::defer_lock);
    if (state == dismissed) lock.lock();
    if (lock.owns_lock() || lock.try_lock()) awake_.notify_all();
  }

  // False once the team is dismissed.
  bool wait_for_tasks() {
    const auto idle = [&] { return static_cast<std::uint32_t>(state_.load()) == 0; };
    for (Patience patience; idle(); patience.wait()) {
      if (!patience.over(rest)) continue;
      std::unique_lock<std::mutex> lock(mutex_);
      ++sleepers_;
      awake_.wait(lock, [&] { return !idle(); });
      --sleepers_;
    }
    return state_.load(std::memory_order_relaxed) != dismissed;
  }

  // Returns how many it has run. A state names its loop: it cannot come back, so that what is exchanged is what has been read. The loop's
  // fields stay until its tasks are finished, the one taken here among them; the exchange acquires them.
  std::uint32_t take_tasks(std::size_t worker) {
    std::uint32_t taken = 0;
    std::uint64_t state = state_.load(std::memory_order_relaxed);
    while (static_cast<std::uint32_t>(state) != 0 && state != dismissed) {
      if (!state_.compare_exchange_weak(state, state - 1, std::memory_order_acquire, std::memory_order_relaxed)) continue;
      task_(first_ + (count_ - static_cast<std::uint32_t>(state)), worker);
      ++taken;
      state = state_.load(std::memory_order_relaxed);
    }
    return taken;
  }

  const int size_;
  bool alone_ = false;  // read and written on the calling thread
  std::uint64_t loop_ = 0;
  // The loop that runs.
  std::size_t first_ = 0;
  std::uint32_t count_ = 0;
  Visitor<std::size_t, std::size_t> task_;
  // On lines of their own: threads that wait read one, those that finish write the other.
  alignas(64) std::atomic<std::uint64_t> state_{0};  // the loop's number (32 bits), tasks that nobody has taken (32 bits)
  alignas(64) std::atomic<std::uint32_t> finished_{0};  // by the others
  alignas(64) std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable awake_;
};

void lead_team(int threads, Visitor<> body) {
  Team team(threads);
  std::exception_ptr failure;  // none may leave the parallel region
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  if (omp_get_thread_num() != 0) {
    team.serve(static_cast<std::size_t>(omp_get_thread_num()));
  } else
#endif
  {
    led = &team;
    try {
      body();
    } catch (...) {
      failure = std::current_exception();
    }
    led = nullptr;
    team.dismiss();
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace

void parallel_for(std::size_t count, Visitor<std::size_t, std::size_t> task, int limit) {
  const int threads = static_cast<int>(std::min(count, static_cast<std::size_t>(limit)));
  if (threads <= 1) {
    for (std::size_t i = 0; i < count; ++i) task(i, 0);
  } else if (led) {
    in_task = true;
    led->run(count, task);
    in_task = false;
  } else {
    lead_team(threads, [&] { parallel_for(count, task, threads); });
  }
}

void with_team(std::size_t multiply_adds, Visitor<> body) {
  constexpr std::size_t least = 200'000;  // no loop shares less
  const int threads = thread_count();
  if (threads == 1 || led || multiply_adds < least) return body();
  lead_team(threads, body);
}

double cycles_to_share() {
  // A thread of a team that spins takes part within 0.5 us. One that is started for a loop may sleep, which costs 50.
  return led ? 2'000 : 10'000;
}

StepPacer::StepPacer() : begin_(Clock::now()) {}

StepPacer::~StepPacer() {
  if (led) led->set_alone(false);
}

void StepPacer::step_done() {
  if (!led) return;
  constexpr std::chrono::microseconds window{200};
  const auto now = Clock::now();
  const Clock::duration taken = now - begin_;
  if (++steps_ <= 0) begin_ = now;
  if (steps_ <= 0 || taken < window) return;
  begin_ = now;
  if (steps_ == 1) {  // too long a step to be tried
    enter(Phase::settled, false);
  } else {
    end_window(steps_ / std::chrono::duration<double>(taken).count());
  }
}

void StepPacer::end_window(double steps_per_second) {
  steps_ = 0;
  if (phase_ == Phase::settled) {
    if (--windows_left_ == 0) enter(Phase::trying_shared, false);
  } else if (phase_ == Phase::trying_shared) {
    shared_rate_ = steps_per_second;
    enter(Phase::trying_alone, true);
  } else {
    const bool pays = shared_rate_ >= steps_per_second;
    windows_to_keep_ = pays == pays_ ? std::min(2 * windows_to_keep_, most_windows) : least_windows;
    windows_left_ = windows_to_keep_;
    pays_ = pays;
    enter(Phase::settled, !pays);
  }
}

void StepPacer::enter(Phase phase, bool alone) {
  phase_ = phase;
  led->set_alone(alone);
  steps_ = phase == Phase::settled ? 0 : -4;  // to warm up: caches change hands, a thread may have to wake
}

void initialize_threads() {
  const char* text = std::getenv("GDLIB_NUM_THREADS");
  configured.store(text && *text ? parse_threads(text) : available_cpus(), std::memory_order_relaxed);
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
}

int thread_count() {
  if (in_task || forked) return 1;
  return led ? led->threads() : configured.load(std::memory_order_relaxed);
}

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
