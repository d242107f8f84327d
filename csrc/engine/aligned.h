// Scratch memory on cache-line boundaries, and on huge pages where it is large.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace gdlib {

// Throws std::bad_alloc.
void* allocate_aligned(std::size_t bytes);
void deallocate_aligned(void* memory, std::size_t bytes);

template <class T>
struct CacheAligned {
  using value_type = T;
  CacheAligned() = default;
  template <class U>
  CacheAligned(const CacheAligned<U>&) {}
  T* allocate(std::size_t n) { return static_cast<T*>(allocate_aligned(n * sizeof(T))); }
  void deallocate(T* p, std::size_t n) { deallocate_aligned(p, n * sizeof(T)); }
  // Leaves new elements as they are: scratch is written before it is read.
  template <class U>
  void construct(U* p) { ::new (static_cast<void*>(p)) U; }
  template <class U, class... A>
  void construct(U* p, A&&... a) { ::new (static_cast<void*>(p)) U(static_cast<A&&>(a)...); }
  bool operator==(const CacheAligned&) const { return true; }
  bool operator!=(const CacheAligned&) const { return false; }
};

template <class T>
using AlignedVector = std::vector<T, CacheAligned<T>>;

// Scratch of the calling thread, for one product at a time: a call ends the use of what the last one gave. Kept for the next, as a step of
// training asks for the same sizes again. One memory for all threads, cut by each product as it needs, passes lines from core to core:
// 784-512-10 took 1.1 times as long where that is slow.
template <class T>
T* own_scratch(std::size_t elements) {
  static thread_local AlignedVector<T> scratch;
  if (scratch.size() < elements) scratch = AlignedVector<T>(elements);
  return scratch.data();
}

}  // namespace gdlib
