#include "caches.h"

#include <unistd.h>

namespace gdlib {
namespace {

std::size_t ask([[maybe_unused]] int name, std::size_t otherwise) {
  const long bytes = sysconf(name);
  return bytes > 0 ? static_cast<std::size_t>(bytes) : otherwise;
}

CacheSizes ask_all() {
  constexpr std::size_t least_l1 = 32 << 10, least_l2 = 256 << 10;
#if defined(_SC_LEVEL1_DCACHE_SIZE) && defined(_SC_LEVEL2_CACHE_SIZE)
  return {ask(_SC_LEVEL1_DCACHE_SIZE, least_l1), ask(_SC_LEVEL2_CACHE_SIZE, least_l2)};
#else
  return {least_l1, least_l2};
#endif
}

}  // namespace

const CacheSizes& cache_sizes() {
  static const CacheSizes sizes = ask_all();
  return sizes;
}

}  // namespace gdlib
