// The emulator's settings and counters for Python, through ctypes.

#include <algorithm>
#include <cstring>
#include <exception>

#include "emulator/emulator.h"

#define PVF_EXPORT extern "C" __attribute__((visibility("default")))

// 0, or 1 for an unknown name or value.
PVF_EXPORT int pyvitfast_emulator_configure(const char* name, const char* value) {
    try {
        pyvitfast::emulator_configure(name, value);
        return 0;
    } catch (const std::exception&) {
        return 1;
    }
}

PVF_EXPORT void pyvitfast_emulator_reset_counters() { pyvitfast::emulator_reset_counters(); }

// Writes the counters as JSON with a closing zero and returns the size needed for that.
PVF_EXPORT size_t pyvitfast_emulator_counters(char* buffer, size_t size) {
    const std::string text = pyvitfast::emulator_counters_json();
    if (size > 0) {
        const size_t length = std::min(size - 1, text.size());
        std::memcpy(buffer, text.data(), length);
        buffer[length] = '\0';
    }
    return text.size() + 1;
}
