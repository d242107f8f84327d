// The only file with OpenMP, which starts the threads and places them. Who runs which task is settled here.
#include "parallel.h"

#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

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

thread_local bool in_task = false;  // loops inside a task run on its thread
thread_local bool alone = false;    // and those of a run that a StepPacer has told so
thread_local bool shared = false;   // whether a loop has been shared since the StepPacer's last look

// Waits, at first without leaving the core, for a loop that begins or ends within microseconds, then with a chance for others, whose task
// may be what it waits for.
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
  static constexpr int turns_at_once = 2500;  // about 50 us: who leaves a core to a thread that spins gets it back milliseconds later
  int turns_ = 0;
  std::chrono::steady_clock::time_point since_;
};

// The CPUs of a thread that sleeps. It must not wake on its caller's, where it would wait behind it: the kernel wakes a thread where it ran
// last, and may take milliseconds to see that another CPU is idle.
class Bed {
 public:
  Bed() {
#if defined(__linux__)
    known_ = sched_getaffinity(0, sizeof allowed_, &allowed_) == 0;
#endif
  }

  // Called by any thread.
  void move_away_from([[maybe_unused]] int cpu) {
#if defined(__linux__)
    if (!known_ || cpu < 0 || cpu == away_from_) return;
    cpu_set_t others = allowed_;
    CPU_CLR(static_cast<std::size_t>(cpu), &others);
    if (CPU_COUNT(&others) > 0 && sched_setaffinity(sleeper_, sizeof others, &others) == 0) away_from_ = cpu;
#endif
  }

  void get_up() {
#if defined(__linux__)
    if (away_from_ >= 0 && sched_setaffinity(0, sizeof allowed_, &allowed_) == 0) away_from_ = -1;
#endif
  }

 private:
#if defined(__linux__)
  const pid_t sleeper_ = static_cast<pid_t>(syscall(SYS_gettid));
  cpu_set_t allowed_;
  bool known_ = false;
  int away_from_ = -1;
#endif
};

int current_cpu() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// Threads that work on one loop after the other, for the life of the process. OpenMP starts and places them, in parallel regions that do not
// end. Who calls takes tasks like they do, and waits for the tasks that others have taken: not, as at the end of a region, for every thread,
// which takes milliseconds where one has lost its core to a thread of another library that spins.
class Team {
 public:
  // Runs the loop, unless it is at work for another caller.
  bool run(std::size_t count, int threads, Visitor<std::size_t, std::size_t> task) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    start(threads - 1);
    task_ = task;
    count_ = count;
    finished_.store(0, std::memory_order_relaxed);  // published, as the lines above, with the loop's first state
    announce(state_of(count, threads));
    const std::size_t own = take_tasks(0);
    // Acquires what the others' tasks have written. One that has taken none is not waited for: it finds none left.
    for (Patience patience; finished_.load(std::memory_order_acquire) != count - own;) patience.wait();
    busy_.store(false, std::memory_order_release);
    return true;
  }

 private:
  // A loop's state: how many threads may take tasks (16 bits), and the tasks that nobody has taken.
  static constexpr int task_bits = 48;
  static std::uint64_t state_of(std::size_t tasks, int threads) { return static_cast<std::uint64_t>(threads) << task_bits | tasks; }
  static std::size_t tasks_left(std::uint64_t state, std::size_t worker) {
    return worker < state >> task_bits ? state & ((std::uint64_t{1} << task_bits) - 1) : 0;
  }

  void start(int wanted) {
    if (wanted <= workers_) return;
#if defined(_OPENMP)
    const int first = workers_ + 1, more = wanted - workers_;
    try {
      std::thread([this, first, more] {
#pragma omp parallel num_threads(more)
        serve(static_cast<std::size_t>(first + omp_get_thread_num()));
      }).detach();
    } catch (const std::system_error&) {
      // The system has no more threads: those that are there will do.
    }
#endif
    workers_ = wanted;
  }

  void announce(std::uint64_t state) {
    // Sequentially consistent, as a sleeper's count and its look at the state are: one of the two sees the other.
    state_.store(state);
    if (sleepers_.load() == 0) return;
    // A thread that is just falling asleep, or waking, is not waited for: it may miss this loop.
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return;
    for (Bed* const bed : beds_) bed->move_away_from(current_cpu());
    awake_.notify_all();
  }

  void serve(std::size_t worker) {
    constexpr std::chrono::microseconds rest{200};  // what it spins for the next loop: four times what waking it costs
    in_task = true;
    const auto idle = [&] { return tasks_left(state_.load(), worker) == 0; };
    Bed bed;
    for (;;) {
      for (Patience patience; idle(); patience.wait()) {
        if (!patience.over(rest)) continue;
        std::unique_lock<std::mutex> lock(mutex_);
        beds_.push_back(&bed);
        ++sleepers_;
        awake_.wait(lock, [&] { return !idle(); });
        --sleepers_;
        beds_.erase(std::find(beds_.begin(), beds_.end(), &bed));
        bed.get_up();
      }
      finished_.fetch_add(take_tasks(worker), std::memory_order_release);
    }
  }

  // Returns how many it has run. Whatever loop a task is taken from by the exchange is the one that runs, and its fields, which the exchange
  // acquires, stay until that task is finished.
  std::size_t take_tasks(std::size_t worker) {
    std::size_t taken = 0;
    std::uint64_t state = state_.load(std::memory_order_relaxed);
    while (const std::size_t left = tasks_left(state, worker)) {
      if (!state_.compare_exchange_weak(state, state - 1, std::memory_order_acquire, std::memory_order_relaxed)) continue;
      task_(count_ - left, worker);
      ++taken;
      state = state_.load(std::memory_order_relaxed);
    }
    return taken;
  }

  // Of the caller, one at a time.
  std::atomic<bool> busy_{false};
  int workers_ = 0;
  // The loop that runs.
  std::size_t count_ = 0;
  Visitor<std::size_t, std::size_t> task_;
  // On lines of their own: threads that wait read one, those that finish write the other.
  alignas(64) std::atomic<std::uint64_t> state_{0};
  alignas(64) std::atomic<std::size_t> finished_{0};  // by the others
  alignas(64) std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable awake_;
  std::vector<Bed*> beds_;  // of the sleepers
};

// Never destroyed: its threads outlive every static object.
Team& the_team() {
  static Team* const team = new Team;
  return *team;
}

// What sharing a loop costs, in cycles of a thread (at 4 GHz).
constexpr double cost_of_sharing = 2'000;   // a thread that spins takes part within 0.5 us
constexpr double cost_of_waking = 100'000;  // 25 us until one that sleeps does

// Whether the team's threads may be awake still. Who asks again soon has them woken.
bool awake() {
  using Clock = std::chrono::steady_clock;
  constexpr std::chrono::milliseconds soon{1};
  static thread_local Clock::time_point asked;
  const auto before = std::exchange(asked, Clock::now());
  return asked - before < soon;
}

}  // namespace

int threads_for(double cycles) {
  constexpr double least = 4.0;  // times what it costs
  const int threads = thread_count();
  if (threads == 1 || cycles < least * cost_of_sharing) return 1;
  return cycles >= least * cost_of_waking || awake() ? threads : 1;
}

void parallel_for(std::size_t count, int threads, Visitor<std::size_t, std::size_t> task) {
  threads = static_cast<int>(std::min(count, static_cast<std::size_t>(threads)));
  const auto run_all = [&] {
    for (std::size_t i = 0; i < count; ++i) task(i, 0);
  };
  if (threads <= 1) return run_all();
  in_task = shared = true;
  if (!the_team().run(count, threads, task)) run_all();
  in_task = false;
}

StepPacer::StepPacer(double step_cycles) : trials_(kept()), begin_(Clock::now()) {
  if (trials_.step_cycles != step_cycles) trials_ = {step_cycles};
  enter(trials_.phase, trials_.alone);
}

StepPacer::~StepPacer() { alone = false; }

StepPacer::Trials& StepPacer::kept() {
  static thread_local Trials trials;
  return trials;
}

void StepPacer::step_done() {
  if (!alone && !std::exchange(shared, false)) return;  // steps that share nothing need no look at the clock
  constexpr std::chrono::microseconds warm_up{50}, window{200}, longest_step{400};
  const auto now = Clock::now();
  const Clock::duration taken = now - begin_;
  ++steps_;
  if (warming_up_ ? taken < warm_up : taken < window || (steps_ == 1 && taken < longest_step)) return;
  if (warming_up_) {
    warming_up_ = false;
  } else if (steps_ == 1) {
    enter(Phase::settled, false);
  } else {
    end_window(steps_ / std::chrono::duration<double>(taken).count());
  }
  begin_ = now;
  steps_ = 0;
}

void StepPacer::end_window(double steps_per_second) {
  // Windows between two trials, 2 ms to 0.2 s: a wrong choice does not last, and trials cost little.
  constexpr int least = 10, most = 1000;
  Trials& t = trials_;
  if (t.phase == Phase::settled) {
    if (--t.windows_left <= 0) enter(Phase::trying_shared, false);
  } else if (t.phase == Phase::trying_shared) {
    t.shared_rate = steps_per_second;
    enter(Phase::trying_alone, true);
  } else {
    const bool pays = t.shared_rate >= steps_per_second;
    t.windows_to_keep = pays == t.pays ? std::clamp(2 * t.windows_to_keep, least, most) : least;
    t.windows_left = t.windows_to_keep;
    t.pays = pays;
    enter(Phase::settled, !pays);
  }
}

void StepPacer::enter(Phase phase, bool work_alone) {
  warming_up_ = phase != trials_.phase || phase != Phase::settled;  // caches change hands, a thread may have to wake
  trials_.phase = phase;
  trials_.alone = alone = work_alone;
}

void initialize_threads() {
  const char* text = std::getenv("GDLIB_NUM_THREADS");
  configured.store(text && *text ? parse_threads(text) : available_cpus(), std::memory_order_relaxed);
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
}

int thread_count() {
  if (in_task || alone || forked) return 1;
#if defined(_OPENMP)
  return configured.load(std::memory_order_relaxed);
#else
  return 1;
#endif
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
