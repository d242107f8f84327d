#include "caches.h"

#include <unistd.h>

namespace gdlib {
namespace {

std::size_t ask() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return static_cast<std::size_t>(bytes);
#endif
  return 256 << 10;
}

}  // namespace

std::size_t l2_bytes() {
  static const std::size_t bytes = ask();
  return bytes;
}

}  // namespace gdlib
