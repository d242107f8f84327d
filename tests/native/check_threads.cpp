#include <atomic>
#include <chrono>
#include <new>
#include <thread>

#include "../../csrc/engine/parallel.h"
#include "check.h"

namespace {

// Every task of a loop runs once, and what it writes is seen, also after rests in which threads fall asleep, and from several callers at
// once; loops inside tasks run on their thread.
bool run_loops(int threads) {
  bool good = gdlib::thread_count() == threads;
  for (std::size_t loop = 0; loop < 300; ++loop) {
    std::vector<std::size_t> out(2 + loop % 40);  // no atomics: the loop's end publishes
    gdlib::parallel_for(out.size(), threads, [&](std::size_t i, std::size_t worker) {
      const std::size_t alone = gdlib::thread_count() == 1;
      gdlib::parallel_for(3, gdlib::thread_count(), [&](std::size_t k, std::size_t) { out[i] += alone * (loop + i + k); });
      if (worker >= static_cast<std::size_t>(threads)) out[i] = 0;
    });
    for (std::size_t i = 0; i < out.size(); ++i) good = good && out[i] == 3 * (loop + i) + 3;
    if (loop % 100 == 99) std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return good && gdlib::thread_count() == threads;
}

}  // namespace

void check_threads(int threads) {
  const std::string name = "loops on threads " + std::to_string(threads);
  gdlib::set_thread_count(threads);
  expect(run_loops(threads), name);
  bool other_good = false;
  std::thread other([&] { other_good = run_loops(threads); });
  expect(run_loops(threads), name + " beside another caller's");
  other.join();
  expect(other_good, name + " of that other caller");

  int thrown = 0;
  for (int loop = 0; loop < 20; ++loop) {
    std::atomic<int> tasks{0};
    try {
      gdlib::parallel_for(10, threads, [&](std::size_t i, std::size_t) {
        ++tasks;
        if (i % 3 == 1) throw std::bad_alloc();
      });
    } catch (const std::bad_alloc&) {
      thrown += tasks == 10;
    }
  }
  expect(thrown == 20 && run_loops(threads), name + " after one that throws");

  // A loop of 25 us is not shared after a rest, but after a long loop, with which the team has woken.
  constexpr double some_cycles = 100'000, many_cycles = 1'000'000;
  const auto rested_for = [](double cycles) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    return gdlib::threads_for(cycles);
  };
  rested_for(some_cycles);
  expect(rested_for(some_cycles) == 1, name + " after a rest");
  expect(rested_for(many_cycles) == threads && gdlib::threads_for(some_cycles) == threads, name + " after a long loop");

  // Short steps are tried both ways.
  bool good = true, shared = false, alone = false;
  {
    gdlib::StepPacer pacer(threads);
    for (std::size_t step = 0; step < 10'000'000 && !(shared && alone); ++step) {
      (gdlib::thread_count() == 1 ? alone : shared) = true;
      std::atomic<int> tasks{0};
      gdlib::parallel_for(2, gdlib::thread_count(), [&](std::size_t, std::size_t) { ++tasks; });
      good = good && tasks == 2;
      pacer.step_done();
    }
  }
  expect(good && shared && alone && gdlib::thread_count() == threads, name + " whose steps are paced");
}
