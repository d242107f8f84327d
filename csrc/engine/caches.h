// The sizes of this machine's caches, which blocks of data are cut to.
#pragma once

#include <cstddef>

namespace gdlib {

struct CacheSizes {
  std::size_t l1;  // bytes of one core's data cache
  std::size_t l2;  // bytes of one core's second level
};

// Asked of the operating system once; where it does not say, the smallest in use: 32 KiB and 256 KiB.
const CacheSizes& cache_sizes();

}  // namespace gdlib
