#include "caches.h"

#include <unistd.h>

namespace gdlib {
namespace {

#ifdef _SC_LEVEL2_CACHE_SIZE
constexpr int level_2 = _SC_LEVEL2_CACHE_SIZE, level_3 = _SC_LEVEL3_CACHE_SIZE;
#else
constexpr int level_2 = -1, level_3 = -1;  // no name that sysconf knows
#endif

std::size_t ask(int level, std::size_t otherwise) {
  const long bytes = sysconf(level);
  return bytes > 0 ? static_cast<std::size_t>(bytes) : otherwise;
}

}  // namespace

std::size_t l2_bytes() {
  static const std::size_t bytes = ask(level_2, 256 << 10);
  return bytes;
}

std::size_t l3_bytes() {
  static const std::size_t bytes = ask(level_3, 32 << 20);
  return bytes;
}

}  // namespace gdlib
