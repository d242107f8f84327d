// The lane type of the ISA that this translation unit is compiled for; the only file with intrinsics.
//
// GCC and Clang vector extensions carry the arithmetic; an intrinsic stands here only where they have no word for it: masked tails, fused
// multiply-add, compress, stores past the caches. Everything has internal linkage, so that no code compiled with wide flags can be linked
// into another unit.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace gdlib {
namespace {

#if defined(__AVX512F__)
constexpr size_t lane_bytes = 64;
#elif defined(__AVX2__)
constexpr size_t lane_bytes = 32;
#else
constexpr size_t lane_bytes = 16;
#endif

// Vectors that a kernel can keep without memory.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr size_t vector_registers = 32;
#else
constexpr size_t vector_registers = 16;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(lane_bytes)));
  typedef T unaligned __attribute__((vector_size(lane_bytes), aligned(alignof(T)), may_alias));
};
template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
constexpr size_t lanes = lane_bytes / sizeof(T);

template <class T>
inline Vector<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}

template <class T>
inline void store(T* p, Vector<T> v) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v;
}

template <class T>
inline Vector<T> broadcast(T value) {
  return value - Vector<T>{};
}

template <class T>
inline Vector<T> zero() {
  return Vector<T>{};
}

// Tails: the first `count` lanes, 0 < count < lanes; absent lanes read as zero and are not touched in memory.
#if defined(__AVX512F__)
inline Vector<float> load_partial(const float* p, size_t count) {
  return (Vector<float>)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1u), p);
}
inline Vector<double> load_partial(const double* p, size_t count) {
  return (Vector<double>)_mm512_maskz_loadu_pd((__mmask8)((1u << count) - 1), p);
}
inline void store_partial(float* p, Vector<float> v, size_t count) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1u), (__m512)v);
}
inline void store_partial(double* p, Vector<double> v, size_t count) {
  _mm512_mask_storeu_pd(p, (__mmask8)((1u << count) - 1), (__m512d)v);
}
inline void store_nontemporal(float* p, Vector<float> v) { _mm512_stream_ps(p, (__m512)v); }
inline void store_nontemporal(double* p, Vector<double> v) { _mm512_stream_pd(p, (__m512d)v); }
inline Vector<float> fma(Vector<float> a, Vector<float> b, Vector<float> c) {
  return (Vector<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
inline Vector<double> fma(Vector<double> a, Vector<double> b, Vector<double> c) {
  return (Vector<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif defined(__AVX2__)
inline __m256i tail_mask(size_t count, float) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256i tail_mask(size_t count, double) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x((long long)count), _mm256_setr_epi64x(0, 1, 2, 3));
}
inline Vector<float> load_partial(const float* p, size_t count) {
  return (Vector<float>)_mm256_maskload_ps(p, tail_mask(count, 0.0f));
}
inline Vector<double> load_partial(const double* p, size_t count) {
  return (Vector<double>)_mm256_maskload_pd(p, tail_mask(count, 0.0));
}
inline void store_partial(float* p, Vector<float> v, size_t count) {
  _mm256_maskstore_ps(p, tail_mask(count, 0.0f), (__m256)v);
}
inline void store_partial(double* p, Vector<double> v, size_t count) {
  _mm256_maskstore_pd(p, tail_mask(count, 0.0), (__m256d)v);
}
inline void store_nontemporal(float* p, Vector<float> v) { _mm256_stream_ps(p, (__m256)v); }
inline void store_nontemporal(double* p, Vector<double> v) { _mm256_stream_pd(p, (__m256d)v); }
inline Vector<float> fma(Vector<float> a, Vector<float> b, Vector<float> c) {
  return (Vector<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
inline Vector<double> fma(Vector<double> a, Vector<double> b, Vector<double> c) {
  return (Vector<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#else
template <class T>
inline Vector<T> load_partial(const T* p, size_t count) {
  Vector<T> v{};
  for (size_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
}
template <class T>
inline void store_partial(T* p, Vector<T> v, size_t count) {
  for (size_t i = 0; i < count; ++i) p[i] = v[i];
}
template <class T>
inline void store_nontemporal(T* p, Vector<T> v) {
  store(p, v);
}
#if defined(__ARM_NEON) && defined(GDLIB_NEON)
inline Vector<float> fma(Vector<float> a, Vector<float> b, Vector<float> c) {
  return (Vector<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
inline Vector<double> fma(Vector<double> a, Vector<double> b, Vector<double> c) {
  return (Vector<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
#else
// The portable table rounds twice: what every machine can do, and the same bits on each.
template <class V>
inline V fma(V a, V b, V c) {
  return a * b + c;
}
#endif
#endif

// Nontemporal stores are in memory before any later store.
inline void fence_nontemporal() {
#if defined(__AVX512F__) || defined(__AVX2__)
  _mm_sfence();
#endif
}

template <class T>
inline Vector<T> load_up_to(const T* p, size_t count) {
  return count >= lanes<T> ? load(p) : load_partial(p, count);
}

template <class T>
inline void store_up_to(T* p, Vector<T> v, size_t count) {
  if (count >= lanes<T>)
    store(p, v);
  else
    store_partial(p, v, count);
}

// body(i, count) for each vector of n elements, which begins at i and has `count`: but for the last all its lanes, as the compiler knows.
template <class T, class Body>
inline void each_vector(size_t n, const Body& body) {
  size_t i = 0;
  for (; i + lanes<T> <= n; i += lanes<T>) body(i, lanes<T>);
  if (i < n) body(i, n - i);
}

// into[i] = value(i, count), vector by vector. `nontemporal`, lines go to memory without being read first and without a place in the
// caches, where the ISA can: their addresses are multiples of a vector's bytes, and their order has to be made sure of.
template <class T, class Value>
inline void fill_vectors(size_t n, T* into, bool nontemporal, const Value& value) {
  size_t i = 0;
  if (nontemporal) {
    const size_t before = (size_t)(-(uintptr_t)into % lane_bytes) / sizeof(T);
    if (before < n) {
      if (before) store_partial(into, value(0, before), before);
      for (i = before; i + lanes<T> <= n; i += lanes<T>) store_nontemporal(into + i, value(i, lanes<T>));
      fence_nontemporal();
    }
  }
  for (; i + lanes<T> <= n; i += lanes<T>) store(into + i, value(i, lanes<T>));
  if (i < n) store_partial(into + i, value(i, n - i), n - i);
}

// The first `count` lanes, 0 <= count <= lanes.
#if defined(__AVX512F__) || defined(__AVX2__)
template <class T>
inline Vector<T> load_first(const T* p, size_t count) {
  return load_partial(p, count);
}
#else
template <class T>
inline Vector<T> load_first(const T* p, size_t count) {
  return count == lanes<T> ? load(p) : load_partial(p, count);
}
#endif

// Asks for the cache line of p before it is written. __builtin_prefetch asks for a copy to read unless told that the CPU can do better, and
// taking the line from another core is then still to come. CPUs with AVX2 know the instruction, or take it for nothing.
inline void prefetch_to_write(const void* p) {
#if defined(__AVX2__)
  asm volatile("prefetchw %0" : : "m"(*(const char*)p));
#else
  __builtin_prefetch(p, 1);
#endif
}

// One lane of a vector, chosen at run time.
#if defined(__AVX512F__)
template <class T>
struct Lane {
  __mmask16 mask;
  explicit Lane(size_t number) : mask((__mmask16)(1u << number)) {}
  Vector<float> replaced(Vector<float> v, float value) const {
    return (Vector<float>)_mm512_mask_broadcastss_ps((__m512)v, mask, _mm_set_ss(value));
  }
  Vector<double> replaced(Vector<double> v, double value) const {
    return (Vector<double>)_mm512_mask_broadcastsd_pd((__m512d)v, (__mmask8)mask, _mm_set_sd(value));
  }
};
#else
template <class T>
struct Lane {
  Vector<T> chosen{};  // 1 in that lane; comparing it gives the mask
  explicit Lane(size_t number) { chosen[number] = T(1); }
  Vector<T> replaced(Vector<T> v, T value) const { return chosen != zero<T>() ? broadcast(value) : v; }
};
#endif

// A vector's lanes of two vectors side by side, from one on that is chosen at run time.
template <class T>
struct Window;
#if defined(__AVX512F__)
template <>
struct Window<float> {
  __m512i lane;
  explicit Window(size_t first)
      : lane(_mm512_add_epi32(_mm512_set1_epi32((int)first), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15))) {}
  Vector<float> of(Vector<float> low, Vector<float> high) const {
    return (Vector<float>)_mm512_permutex2var_ps((__m512)low, lane, (__m512)high);
  }
};
template <>
struct Window<double> {
  __m512i lane;
  explicit Window(size_t first) : lane(_mm512_add_epi64(_mm512_set1_epi64((long long)first), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7))) {}
  Vector<double> of(Vector<double> low, Vector<double> high) const {
    return (Vector<double>)_mm512_permutex2var_pd((__m512d)low, lane, (__m512d)high);
  }
};
#endif

// The compiler has to take the array for changed: what is read from it next comes from memory.
template <class T, size_t N>
inline void keep_in_memory(T (&array)[N]) {
  asm volatile("" : "+m"(array));
}

// The same address, but the compiler cannot tell what it was computed from: of many addresses a fixed distance apart it would keep each in
// a register, or spill it.
template <class T>
inline const T* as_computed(const T* address) {
  asm("" : "+r"(address));
  return address;
}

template <auto Value>
struct Constant {
  static constexpr auto value = Value;
};

template <int... I>
struct Sequence {};
template <int N, int... I>
struct MakeSequence : MakeSequence<N - 1, N - 1, I...> {};
template <int... I>
struct MakeSequence<0, I...> {
  using type = Sequence<I...>;
};

// Lane l of the result: a[l] + a[l ^ S] where bit S of l is clear, b[l] + b[l ^ S] where it is set.
template <int S, class V, int... L>
inline V add_across(V a, V b, Sequence<L...>) {
  constexpr int n = sizeof...(L);
  return __builtin_shufflevector(a, b, ((L & S) ? L + n : L)...) +
         __builtin_shufflevector(a, b, ((L & S) ? (L ^ S) + n : (L ^ S))...);
}

// Lane l of the result is the sum over all lanes of leaf(l), for l from First to First + Count - 1. The additions form the same tree for
// every l; leaves are asked for in order, so that few vectors are alive at a time.
template <int First, int Count, class Leaf>
inline auto sum_each(const Leaf& leaf) {
  if constexpr (Count == 1) {
    return leaf(First);
  } else {
    constexpr int half = Count / 2;
    const auto a = sum_each<First, half>(leaf);
    const auto b = sum_each<First + half, half>(leaf);
    return add_across<half>(a, b, typename MakeSequence<(int)(sizeof(a) / sizeof(a[0]))>::type{});
  }
}

template <class T, int S = 1>
inline T sum_lanes(Vector<T> v) {
  if constexpr (S == (int)lanes<T>) {
    return v[0];
  } else {
    return sum_lanes<T, 2 * S>(add_across<S>(v, v, typename MakeSequence<(int)lanes<T>>::type{}));
  }
}

typedef uint32_t Vector16u __attribute__((vector_size(64)));

// append_below: appends to `out` the elements of v that are below `limit`, in order; returns how many. Writes up to 16 elements.
#if defined(__AVX512F__)
inline size_t append_below(Vector16u v, uint32_t limit, uint32_t* out) {
  const __mmask16 keep = _mm512_cmplt_epu32_mask((__m512i)v, _mm512_set1_epi32((int)limit));
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(keep, (__m512i)v));
  return (size_t)__builtin_popcount(keep);
}
#elif defined(__AVX2__)
// For each set of 8 lanes: their numbers, the lowest first, and how many they are.
struct LanesOfMask {
  uint8_t number[256][8] = {};
  uint8_t count[256] = {};
  constexpr LanesOfMask() {
    for (int mask = 0; mask < 256; ++mask)
      for (uint8_t lane = 0; lane < 8; ++lane)
        if (mask >> lane & 1) number[mask][count[mask]++] = lane;
  }
};
constexpr LanesOfMask lanes_of_mask;

// What AVX-512 has a word for; lane by lane, an order takes twice as long.
inline size_t append_below(Vector16u v, uint32_t limit, uint32_t* out) {
  typedef uint32_t Half __attribute__((vector_size(32)));
  const auto append = [&](Half half, uint32_t* to) __attribute__((always_inline)) {
    const int keep = _mm256_movemask_ps((__m256)(half < limit));
    const __m256i numbers = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)lanes_of_mask.number[keep]));
    _mm256_storeu_si256((__m256i*)to, _mm256_permutevar8x32_epi32((__m256i)half, numbers));
    return (size_t)lanes_of_mask.count[keep];
  };
  const size_t low = append(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7), out);
  return low + append(__builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15), out + low);
}
#else
inline size_t append_below(Vector16u v, uint32_t limit, uint32_t* out) {
  size_t kept = 0;
  for (int i = 0; i < 16; ++i) {
    out[kept] = v[i];
    kept += v[i] < limit;
  }
  return kept;
}
#endif

}  // namespace
}  // namespace gdlib
