"""This machine's limits, measured: read bandwidth of memory, and peak rate of fused multiply-adds.

A few lines of C++ are compiled for this very CPU when they are first needed; without a compiler the limits stay unknown, and shares of
them are left out. Deliberately no table of data sheets: a limit counts only if it was reached here, in the same run.
"""

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Contender, Group, Run, UnavailableError
from gdlib.config import get_config, set_num_threads

SOURCE = r"""
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <thread>
#include <utility>
#include <vector>
#if defined(__AVX__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__)  // bytes of a vector; independent chains: enough to hide the latency of all units, few enough for the registers
constexpr int kBytes = 64, kChains = 24;
#elif defined(__AVX__)
constexpr int kBytes = 32, kChains = 12;
#else
constexpr int kBytes = 16, kChains = 24;
#endif
static volatile std::uint64_t sink;
typedef std::uint64_t Words __attribute__((vector_size(kBytes), aligned(8), may_alias));

// Threads that wait awake, and have been spread over the cores before the clock starts: what starting and moving them costs is no limit.
class Team {
 public:
  explicit Team(int threads) {
    for (int t = 1; t < threads; ++t) others_.emplace_back([this, t] { follow(t); });
  }
  ~Team() {
    run(nullptr);
    for (std::thread& other : others_) other.join();
  }
  int threads() const { return static_cast<int>(others_.size()) + 1; }
  void run(std::function<void(int)> work) {
    work_ = std::move(work);
    left_ = threads() - 1;
    ++turn_;
    if (work_) work_(0);
    while (left_) {}
  }

 private:
  void follow(int t) {
    for (long seen = 0;; ++seen) {
      while (turn_ == seen) {}
      const bool last = !work_;
      if (!last) work_(t);
      --left_;
      if (last) return;
    }
  }
  std::function<void(int)> work_;  // none: the end
  std::atomic<int> left_{0};
  std::atomic<long> turn_{0};
  std::vector<std::thread> others_;
};
static Team* team;

template <class T> static void multiply_add(long steps) {
  typedef T Lanes __attribute__((vector_size(kBytes)));
  Lanes chains[kChains], factor = Lanes{} + T(0.5), term = Lanes{} + T(1);
  for (int i = 0; i < kChains; ++i) chains[i] = Lanes{} + T(i);
  for (long step = 0; step < steps; ++step)
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) chains[i] = chains[i] * factor + term;
  for (int i = 1; i < kChains; ++i) chains[0] += chains[i];
  sink = static_cast<std::uint64_t>(chains[0][0]);
}

// Each thread reads its part as so many sequences side by side: more of them keep more of the prefetchers busy, or disturb them.
template <int kSequences> static void read_sequences(const char* data, std::size_t bytes) {
  const int threads = team->threads();
  team->run([=](int t) {
    constexpr int kTogether = 16 / kSequences;
    const std::size_t sequence = bytes / threads / kSequences / (kTogether * kBytes) * (kTogether * kBytes);
    const char* part = data + t * kSequences * sequence;
    Words sums[16] = {};
    for (std::size_t at = 0; at < sequence; at += kTogether * kBytes)
      for (int s = 0; s < kSequences; ++s)
        for (int i = 0; i < kTogether; ++i)
          sums[s * kTogether + i] ^= *reinterpret_cast<const Words*>(part + s * sequence + at + i * kBytes);
    for (int i = 1; i < 16; ++i) sums[0] ^= sums[i];
    sink = sums[0][0];
  });
}

static inline void store_past_caches(std::uint64_t* to, Words value) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), reinterpret_cast<__m512i>(value));
#elif defined(__AVX__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(value));
#else
  *reinterpret_cast<Words*>(to) = value;
#endif
}

// Each thread's part of `count` words, from the first that begins a vector: body(words), one vector after the other.
template <class Body> static void each_vector(std::uint64_t* data, std::size_t count, Body body) {
  const int threads = team->threads();
  constexpr std::size_t lanes = kBytes / 8;
  std::uint64_t* const begin = data + (kBytes - reinterpret_cast<std::uintptr_t>(data) % kBytes) % kBytes / 8;
  const std::size_t part = (count - lanes) / threads / lanes * lanes;
  team->run([=](int t) {
    for (std::uint64_t* at = begin + t * part; at < begin + (t + 1) * part; at += lanes) body(at);
  });
}

extern "C" {
void copy_past_caches(const std::uint64_t* from, std::uint64_t* to, std::size_t count) {
  each_vector(to, count, [=](std::uint64_t* at) { store_past_caches(at, *reinterpret_cast<const Words*>(from + (at - to))); });
}
void change_in_place(std::uint64_t* data, std::size_t count) {
  each_vector(data, count, [](std::uint64_t* at) { *reinterpret_cast<Words*>(at) ^= Words{} + 1; });
}
void begin_team(int threads) { team = new Team(threads); }
void end_team() { delete team; }
void read_once_1(const char* data, std::size_t bytes) { read_sequences<1>(data, bytes); }
void read_once_4(const char* data, std::size_t bytes) { read_sequences<4>(data, bytes); }
void fma_float32(long steps) { team->run([=](int) { multiply_add<float>(steps); }); }
void fma_float64(long steps) { team->run([=](int) { multiply_add<double>(steps); }); }
long flops_float32() { return 2L * kChains * (kBytes / 4); }  // of a step
long flops_float64() { return 2L * kChains * (kBytes / 8); }
}
"""
FLOPS_PER_CALL = 2**31  # for each thread, about 20 ms
THREADS = int(get_config()["threads"])  # what affinity and the cgroup leave: gdlib's, and then every peer's
THREAD_COUNTS = sorted({1, THREADS})


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled loops. Raises UnavailableError without a compiler."""
    compiler = next((found for name in (os.environ.get("CXX", "c++"), "g++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        raise UnavailableError("no C++ compiler here")
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder, "limits.cpp"), Path(folder, "limits.so")
        source.write_text(SOURCE)
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-funroll-loops", "-std=c++17", "-pthread", "-shared", "-fPIC"]
        done = subprocess.run([compiler, *flags, "-o", str(built), str(source)], capture_output=True, text=True)
        if done.returncode:
            raise UnavailableError(f"{Path(compiler).name} fails: {done.stderr.strip().splitlines()[0]}")
        return ctypes.CDLL(str(built))


@contextmanager
def team(threads: int) -> Iterator[None]:
    """While it lasts, the loops run on so many threads, which wait awake."""
    library().begin_team(threads)
    try:
        yield
    finally:
        library().end_team()


def free_bytes() -> int:
    """Memory to be had without swapping; 4 GiB where the system does not say."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 4 * 2**30)


@functools.cache
def large_bytes() -> int:
    """Far more than a cache holds: 4 times the last level (0 where the system does not say), 1 to 2 GiB, at most half of free memory."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    cache = max((int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]] for size in sizes), default=0)
    return min(2 * 2**30, max(2**30, 4 * cache), free_bytes() // 2)


@functools.cache
def large_array() -> np.ndarray[Any, Any]:
    return np.ones(large_bytes() // 8, np.uint64)  # written, so that every page has memory of its own


def reading(name: str, array: Callable[[Any], np.ndarray[Any, Any]], threads: int, work: float = 1.0) -> list[Contender]:
    """One pass over all bytes of the array that belongs to a problem, as a limit: in both of its forms, the faster of which counts."""

    def prepare(problem: Any, sequences: int) -> Run:
        data, call = array(problem), getattr(library(), f"read_once_{sequences}")
        return lambda: call(ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(data.nbytes))

    def contender(sequences: int) -> Contender:
        form = "one sequence a thread" if sequences == 1 else f"{sequences} sequences a thread"
        return Contender(name, functools.partial(prepare, sequences=sequences), work, form, functools.partial(team, threads), limit=True)

    return [contender(sequences) for sequences in (1, 4)]


def bandwidth(threads: int, wanted: float) -> list[Contender]:
    """The time of `wanted` bytes at the read bandwidth of memory."""
    return reading(f"read bandwidth, {plural(threads)}", lambda _: large_array(), threads, large_bytes() / wanted)


def writing(threads: int, wanted: float) -> list[Contender]:
    """The time of `wanted` bytes, half of which are written: copied past the caches, or changed in place. The faster form counts."""

    def prepare(_: Any, in_place: bool) -> Run:
        data = large_array()
        half, begin = data.size // 2, data.ctypes.data
        word, count = ctypes.c_void_p, ctypes.c_size_t
        if in_place:
            return lambda: library().change_in_place(word(begin), count(data.size))
        return lambda: library().copy_past_caches(word(begin), word(begin + 8 * half), count(half))

    def contender(in_place: bool) -> Contender:
        form, work = ("changed in place", 2 * large_bytes() / wanted) if in_place else ("copied", large_bytes() / wanted)
        name, around = f"read and write bandwidth, {plural(threads)}", functools.partial(team, threads)
        return Contender(name, functools.partial(prepare, in_place=in_place), work, form, around, limit=True)

    return [contender(in_place) for in_place in (False, True)]


def fma_peak(dtype: str, threads: int, wanted: float) -> Contender:
    """The time of `wanted` floating-point operations at the peak of fused multiply-adds, two each."""

    def prepare(_: Any) -> Run:
        call = getattr(library(), f"fma_{dtype}")
        steps = ctypes.c_long(FLOPS_PER_CALL // getattr(library(), f"flops_{dtype}")())
        return lambda: call(steps)

    name, work = f"FMA peak, {dtype}, {plural(threads)}", FLOPS_PER_CALL * threads / wanted
    return Contender(name, prepare, work, around=functools.partial(team, threads), limit=True)


@contextmanager
def gdlib_threads(count: int) -> Iterator[None]:
    set_num_threads(count)
    try:
        yield
    finally:
        set_num_threads(THREADS)


def fresh_interpreter(code: str) -> str:
    """What a new Python process with this one's import path prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # a user's second start finds the bytecode of the first
    return subprocess.run([sys.executable, "-P", "-c", code], env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def plural(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"


BANDWIDTH = Group("Read bandwidth", "GB", [form for threads in THREAD_COUNTS for form in bandwidth(threads, 1e9)], bytes=1e9, rate="GB")
PEAKS = {
    dtype: Group(f"FMA peak, {dtype}", "GFLOP", [fma_peak(dtype, threads, 1e9) for threads in THREAD_COUNTS], flops=1e9, rate="GFLOP")
    for dtype in ("float32", "float64")
}
GROUPS = [BANDWIDTH, *PEAKS.values()]
