#pragma once

#include <string>
#include <vector>

// Declares the kernel table that each instruction set defines, and picks by the running
// processor's.
#if defined(__x86_64__)
#define PVF_DECLARE_CPU_KERNELS(Table, name) \
    namespace baseline {                     \
    extern const Table name;                 \
    }                                        \
    namespace avx2 {                         \
    extern const Table name;                 \
    }                                        \
    namespace avx512 {                       \
    extern const Table name;                 \
    }
#define PVF_CPU_KERNELS_OF(name)                               \
    (cpu_capability() == CpuCapability::kAvx512 ? avx512::name \
     : cpu_capability() == CpuCapability::kAvx2 ? avx2::name   \
                                                : baseline::name)
#else
#define PVF_DECLARE_CPU_KERNELS(Table, name) \
    namespace baseline {                     \
    extern const Table name;                 \
    }
#define PVF_CPU_KERNELS_OF(name) (baseline::name)
#endif

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
