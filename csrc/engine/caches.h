// The sizes of this machine's caches: blocks of data are cut to the second level, and read from memory in other ways than from the third.
// And how its cores are best made to read from them.
#pragma once

#include <cstddef>

namespace gdlib {

// The smallest L1 in use: lines a multiple of a way apart, which is a page too, fall on one set, of which each way holds one.
constexpr std::size_t l1_ways = 8, l1_way_bytes = 4096, l1_bytes = l1_ways * l1_way_bytes;

// Bytes of one core's L2. Asked of the operating system once; where it does not say, the smallest in use: 256 KiB.
std::size_t l2_bytes();

// Bytes of the L3 that cores share; where the system does not say, 32 MiB. Nothing that it decides may show in the bits of a result.
std::size_t l3_bytes();

// Whether a core reads in order from memory faster if it asks for lines of some KiB ahead than if it leaves that to its own prefetching,
// and, where vectors are lines, if it loads them whole: AMD's Zen 5 (and, not measured, later ones), of 100 features 36 GB/s for 21 and of
// 1,000 36 for 20 to 23. Zen 4 loses by requests (21 GB/s for 25), and was not measured by whole lines. Not shown in the bits either.
bool gains_by_requests();

// Whether two multiply-adds in a cycle, of vectors of a line, outrun L2 where each four of them read a line of it: Zen 5 (and, not
// measured, later ones and those of notebooks, which halve the vectors). Shorter vectors, or one multiply-add in a cycle as on a Zen 4,
// take half as many bytes.
bool outruns_l2();

}  // namespace gdlib
