// Which kernel table runs: chosen once from the CPU, or forced by name.
#pragma once

#include <string>
#include <vector>

#include "../kernels/kernels.h"

namespace gdlib {

// Features of this CPU and operating system that some table needs.
std::vector<std::string> cpu_features();

// Names of the tables that this CPU and operating system can run, slowest first; the last one is the default.
std::vector<std::string> available_isas();

// The table in use. Chosen on first use: the name in the environment variable GDLIB_ISA, else the fastest available.
const Kernels& kernels();

// Forces a table. Throws std::invalid_argument when the name is unknown or the machine lacks it.
void select_isa(const std::string& name);

template <class T>
const KernelTable<T>& table();

}  // namespace gdlib
