#include "caches.h"

#include <unistd.h>
#ifdef __x86_64__
#include <cpuid.h>
#endif

#include <cstdio>
#include <string>

namespace gdlib {
namespace {

#ifdef _SC_LEVEL2_CACHE_SIZE
constexpr int level_2 = _SC_LEVEL2_CACHE_SIZE, level_3 = _SC_LEVEL3_CACHE_SIZE;
#else
constexpr int level_2 = -1, level_3 = -1;  // no name that sysconf knows
#endif

// What Linux says of the first CPU's cache of a level, which holds data; 0 where it says nothing.
std::size_t listed_bytes(int level) {
  const auto read = [](int index, const char* what, const char* format, auto*... values) {
    const std::string path = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/" + what;
    std::FILE* file = std::fopen(path.c_str(), "r");
    if (!file) return 0;
    const int found = std::fscanf(file, format, values...);
    std::fclose(file);
    return found;
  };
  int of_index = 0;
  for (int index = 0; read(index, "level", "%d", &of_index) == 1; ++index) {
    std::size_t size = 0;
    char unit = 0;
    if (of_index == level && read(index, "size", "%zu%c", &size, &unit) == 2)
      return unit == 'K' ? size << 10 : unit == 'M' ? size << 20 : size;
  }
  return 0;
}

// sysconf is asked second: on some processors it gives the L3 of the whole socket, of which a core reaches a part (320 MiB for 32).
std::size_t ask(int level, int name, std::size_t otherwise) {
  if (const std::size_t bytes = listed_bytes(level)) return bytes;
  const long bytes = sysconf(name);
  return bytes > 0 ? static_cast<std::size_t>(bytes) : otherwise;
}

// Or a later one.
bool is_zen_5() {
#ifdef __x86_64__
  static const bool is = [] {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid(0, &eax, &ebx, &ecx, &edx) || ecx != signature_AMD_ecx) return false;
    constexpr unsigned zen_5 = 0x1a;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && ((eax >> 8) & 0xf) + ((eax >> 20) & 0xff) >= zen_5;  // the family, and its extension
  }();
  return is;
#else
  return false;
#endif
}

}  // namespace

std::size_t l2_bytes() {
  static const std::size_t bytes = ask(2, level_2, 256 << 10);
  return bytes;
}

std::size_t l3_bytes() {
  static const std::size_t bytes = ask(3, level_3, 32 << 20);
  return bytes;
}

bool gains_by_requests() { return is_zen_5(); }

bool outruns_l2() { return is_zen_5(); }

}  // namespace gdlib
