// The only file with OpenMP, which starts the threads and places them. Who runs which task is settled here.
#include "parallel.h"

#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <limits>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

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
thread_local bool paced = false;    // whether a StepPacer tries if sharing pays
thread_local bool shared = false;   // whether a loop has been shared since the StepPacer's last look

// For the time of a loop on its calling thread.
struct InTask {
  InTask() { in_task = true; }
  ~InTask() { in_task = false; }
};

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

// Where a thread of the team sleeps. It must not wake on its caller's CPU, where it would wait behind it: the kernel wakes a thread where
// it ran last, and may take milliseconds to see that another CPU is idle.
class Bed {
 public:
  void sleep(std::unique_lock<std::mutex>& lock) { awake_.wait(lock); }

  // Called by another thread.
  void wake() {
#if defined(__linux__)
    const int cpu = sched_getcpu();
    if (cpu >= 0 && !moved_ && sched_getaffinity(sleeper_, sizeof allowed_, &allowed_) == 0) {
      cpu_set_t others = allowed_;
      CPU_CLR(static_cast<std::size_t>(cpu), &others);
      moved_ = CPU_COUNT(&others) > 0 && sched_setaffinity(sleeper_, sizeof others, &others) == 0;
    }
#endif
    awake_.notify_one();
  }

  void get_up() {
#if defined(__linux__)
    if (moved_) sched_setaffinity(0, sizeof allowed_, &allowed_);
    moved_ = false;
#endif
  }

 private:
  std::condition_variable awake_;
#if defined(__linux__)
  const pid_t sleeper_ = static_cast<pid_t>(syscall(SYS_gettid));
  cpu_set_t allowed_;  // where it may run: restored as soon as it does
  bool moved_ = false;
#endif
};

// Lets the calling thread, and those that it starts, run where the process's first thread may.
[[maybe_unused]] void take_cpus_of_process() {
#if defined(__linux__)
  cpu_set_t cpus;
  if (sched_getaffinity(getpid(), sizeof cpus, &cpus) == 0) sched_setaffinity(0, sizeof cpus, &cpus);
#endif
}

// Threads that work on one loop after the other, for the life of the process. OpenMP starts and places them, in parallel regions that do
// not end. Who calls takes tasks like they do, and waits for the tasks that others have taken: not, as at the end of a region, for every
// thread, which takes milliseconds where one has lost its core to a thread of another library that spins.
class Team {
 public:
  // Runs the loop, unless it is at work for another caller. Throws what a task has thrown, once all are finished.
  bool run(std::size_t count, int threads, Visitor<std::size_t, std::size_t> task) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    start(threads - 1);
    task_ = task;
    count_ = count;
    finished_.store(0, std::memory_order_relaxed);  // published, as the lines above, with the loop's first state
    // Sequentially consistent, as a sleeper's place and its look at the state are: one of the two sees the other.
    state_.store(state_of(count, threads));
    const std::size_t own = take_tasks(0, [&] { wake(static_cast<std::size_t>(threads)); });
    // Acquires what the others' tasks have written. One that has taken none is not waited for: it finds none left.
    for (Patience patience; finished_.load(std::memory_order_acquire) != count - own;) patience.wait();
    const std::exception_ptr failure = std::exchange(failure_, nullptr);
    failed_.store(false, std::memory_order_relaxed);
    busy_.store(false, std::memory_order_release);
    if (failure) std::rethrow_exception(failure);
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
    // Where OpenMP binds threads to places, thread 0 of a region is where the process's first thread is: it stays idle, as do those whose
    // places earlier regions have taken. Elsewhere all run where the process may: they are born with the CPUs of this caller.
    try {
      std::thread([this, first = workers_ + 1, wanted] {
        if (omp_get_proc_bind() == omp_proc_bind_false) take_cpus_of_process();
#pragma omp parallel num_threads(wanted + 1)
        if (omp_get_thread_num() >= first)
          serve(static_cast<std::size_t>(omp_get_thread_num()));
        else
          for (;;) pause();
      }).detach();
    } catch (const std::system_error&) {
      return;  // the system has no more threads now: those that are there will do
    }
#endif
    workers_ = wanted;
  }

  // Wakes sleepers that may take tasks. One that is just falling asleep, or waking, is not waited for: the caller comes again before its
  // next task.
  void wake(std::size_t threads) {
    if (first_sleeper_.load() >= threads) return;
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return;
    while (!beds_.empty() && beds_.begin()->first < threads) {
      beds_.begin()->second->wake();
      beds_.erase(beds_.begin());
    }
    first_sleeper_.store(beds_.empty() ? nobody : beds_.begin()->first);
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
        beds_[worker] = &bed;
        first_sleeper_.store(beds_.begin()->first);
        if (idle()) bed.sleep(lock);
        beds_.erase(worker);
        first_sleeper_.store(beds_.empty() ? nobody : beds_.begin()->first);
        bed.get_up();
        patience = Patience();
      }
      const std::size_t taken = take_tasks(worker, [] {});
      finished_.fetch_add(taken, std::memory_order_release);
    }
  }

  // Returns how many it has run. Whatever loop a task is taken from by the exchange is the one that runs, and its fields, which the
  // exchange acquires, stay until that task is finished. `before` is called before each.
  template <class Before>
  std::size_t take_tasks(std::size_t worker, const Before& before) {
    std::size_t taken = 0;
    std::uint64_t state = state_.load(std::memory_order_relaxed);
    while (tasks_left(state, worker)) {
      before();
      const std::size_t left = tasks_left(state, worker);
      if (!state_.compare_exchange_weak(state, state - 1, std::memory_order_acquire, std::memory_order_relaxed)) continue;
      try {
        task_(count_ - left, worker);
      } catch (...) {
        if (!failed_.exchange(true, std::memory_order_relaxed)) failure_ = std::current_exception();  // published with the task's end
      }
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
  std::atomic<bool> failed_{false};
  std::exception_ptr failure_;  // of whoever has set the flag
  // On lines of their own: threads that wait read one, those that finish write the other.
  alignas(64) std::atomic<std::uint64_t> state_{0};
  alignas(64) std::atomic<std::size_t> finished_{0};  // by the others
  static constexpr std::size_t nobody = std::numeric_limits<std::size_t>::max();
  alignas(64) std::atomic<std::size_t> first_sleeper_{nobody};
  std::mutex mutex_;
  std::map<std::size_t, Bed*> beds_;  // of the sleepers that nobody has woken, by worker
};

// Never destroyed: its threads outlive every static object.
Team& the_team() {
  static Team* const team = new Team;
  return *team;
}

// What sharing a loop costs, in cycles of a thread (at 4 GHz), where nobody finds out on these cores, two that share no cache at the worst:
// there 9 us of work took 21, 12 took 17, and from 18 on two threads are faster.
constexpr double cost_of_sharing_untried = 15'000;
constexpr double cost_of_waking = 100'000;  // half of the 50 us until one that sleeps does: the caller works meanwhile

using Clock = std::chrono::steady_clock;
thread_local Clock::time_point asked;  // when this thread last called awake(); the latest there is, since it has had a long loop shared

// Whether the team's threads may be awake still. Who asks again soon, within five times what they spin for, has them woken.
bool awake() {
  constexpr std::chrono::milliseconds soon{1};
  const auto before = std::exchange(asked, Clock::now());
  return asked - before < soon;
}

}  // namespace

int threads_for(double cycles) {
  constexpr double least = 4.0;  // times what it costs
  if (cycles < least_shared_cycles) return 1;  // whatever else holds, which short calls need not look at
  const int threads = thread_count();
  if (threads == 1 || (!paced && cycles < least * cost_of_sharing_untried)) return 1;
  if (cycles < least * cost_of_waking) return awake() ? threads : 1;
  asked = Clock::time_point::max();  // what comes next finds them awake
  return threads;
}

void parallel_for(std::size_t count, int threads, Visitor<std::size_t, std::size_t> task) {
  threads = static_cast<int>(std::min(count, static_cast<std::size_t>(threads)));
  const auto run_all = [&] {
    for (std::size_t i = 0; i < count; ++i) task(i, 0);
  };
  if (threads <= 1) return run_all();
  shared = true;
  const InTask inside;
  if (!the_team().run(count, threads, task)) run_all();
}

StepPacer::StepPacer(double step_cycles) : trials_(kept()), begin_(Clock::now()) {
  if (trials_.step_cycles != step_cycles) trials_ = {step_cycles};
  paced = true;
  enter(trials_.phase);
}

StepPacer::~StepPacer() { alone = paced = false; }

StepPacer::Trials& StepPacer::kept() {
  static thread_local Trials trials;
  return trials;
}

void StepPacer::step_done() {
  if (!alone && !std::exchange(shared, false)) return;  // steps that share nothing need no look at the clock
  constexpr std::chrono::microseconds caches_change_hands{50}, threads_wake{500}, window{200}, longest_step{400};
  const auto warm_up = trials_.phase == Phase::trying_shared && !trials_.pays ? threads_wake : caches_change_hands;
  const auto now = Clock::now();
  const Clock::duration taken = now - begin_;
  ++steps_;
  if (warming_up_ ? taken < warm_up : taken < window || (steps_ == 1 && taken < longest_step)) return;
  if (warming_up_) {
    warming_up_ = false;
  } else if (steps_ == 1) {
    trials_.pays = true;
    enter(Phase::settled);
  } else {
    end_window(steps_ / std::chrono::duration<double>(taken).count());
  }
  begin_ = now;
  steps_ = 0;
}

void StepPacer::end_window(double steps_per_second) {
  // Windows between two trials, 2 ms to 0.2 s: a wrong choice does not last, and trials cost little. 10 ms at most where the rates are
  // within 10 % of each other: so they are where the other thread had no core, too.
  constexpr int least = 10, most = 1000, most_if_close = 50;
  Trials& t = trials_;
  if (t.phase == Phase::settled) {
    if (--t.windows_left <= 0) enter(Phase::trying_shared);
  } else if (t.phase == Phase::trying_shared) {
    t.shared_rate = steps_per_second;
    enter(Phase::trying_alone);
  } else {
    const double gain = t.shared_rate / steps_per_second;
    const bool same = t.pays == (gain >= 1.0);
    t.windows_to_keep = same ? std::clamp(2 * t.windows_to_keep, least, std::abs(gain - 1.0) < 0.1 ? most_if_close : most) : least;
    t.windows_left = t.windows_to_keep;
    t.pays = gain >= 1.0;
    enter(Phase::settled);
  }
}

void StepPacer::enter(Phase phase) {
  warming_up_ = phase != trials_.phase || phase != Phase::settled;  // caches change hands, a thread may have to wake
  trials_.phase = phase;
  alone = phase == Phase::trying_alone || (phase == Phase::settled && !trials_.pays);
}

void initialize_threads() {
  const char* text = std::getenv("GDLIB_NUM_THREADS");
  configured.store(text && *text ? parse_threads(text) : available_cpus(), std::memory_order_relaxed);
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
}

int thread_count() {
  return in_task || alone || forked || !openmp_enabled() ? 1 : configured.load(std::memory_order_relaxed);
}

void set_thread_count(int count) {
  if (count < 1 || count > most_threads)
    throw std::invalid_argument("the number of threads is " + std::to_string(count) + "; it must be from 1 to " +
                                std::to_string(most_threads) + ".");
  configured.store(count, std::memory_order_relaxed);
}

#if defined(_OPENMP)
bool openmp_enabled() { return true; }
#else
bool openmp_enabled() { return false; }
#endif

}  // namespace gdlib
