#include "cpu_capability.h"

#include <cstdlib>
#include <stdexcept>

namespace pyvitfast {

const char* cpu_capability_name(CpuCapability capability) {
    switch (capability) {
        case CpuCapability::kAvx512:
            return "avx512";
        case CpuCapability::kAvx2:
            return "avx2";
        default:
            return "baseline";
    }
}

std::vector<CpuCapability> supported_cpu_capabilities() {
    std::vector<CpuCapability> found{CpuCapability::kBaseline};
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        found.push_back(CpuCapability::kAvx2);
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
            found.push_back(CpuCapability::kAvx512);
        }
    }
#endif
    return found;
}

static CpuCapability choose_cpu_capability() {
    const auto supported = supported_cpu_capabilities();
    const char* forced = std::getenv("PYVITFAST_CPU_CAPABILITY");
    if (forced == nullptr || *forced == '\0') {
        return supported.back();
    }
    std::string names;
    for (const auto capability : supported) {
        if (std::string(forced) == cpu_capability_name(capability)) {
            return capability;
        }
        names.append(names.empty() ? "" : ", ").append(cpu_capability_name(capability));
    }
    throw std::runtime_error("pyvitfast: PYVITFAST_CPU_CAPABILITY must be one of " + names +
                             " on this processor, got '" + forced + "'");
}

CpuCapability cpu_capability() {
    static const CpuCapability chosen = choose_cpu_capability();
    return chosen;
}

}  // namespace pyvitfast
