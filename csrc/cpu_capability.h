#pragma once

#include <string>
#include <vector>

namespace pyvitfast {

// The instruction sets the CPU kernels are compiled for, in ascending order.
enum class CpuCapability { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

const char* cpu_capability_name(CpuCapability capability);

// What this processor can run, best last.
std::vector<CpuCapability> supported_cpu_capabilities();

// The best supported one, or the one PYVITFAST_CPU_CAPABILITY names; throws std::runtime_error when
// that one is unknown or not supported. Read once.
CpuCapability cpu_capability();

}  // namespace pyvitfast
