// The settings and counters for callers without C++: ctypes on the shared library.
#include <exception>
#include <string>

#include "emulator/emulator.h"

#define PVF_EXPORT extern "C" __attribute__((visibility("default")))

// Returns null, or the error as text that stays valid until the next call.
PVF_EXPORT const char* pyvitfast_emulator_configure(const char* name, const char* value) {
    static std::string error;
    try {
        pyvitfast::emulator_configure(name, value);
        return nullptr;
    } catch (const std::exception& e) {
        error = e.what();
        return error.c_str();
    }
}

PVF_EXPORT void pyvitfast_emulator_reset_counters() { pyvitfast::emulator_reset_counters(); }

// The text stays valid until the next call.
PVF_EXPORT const char* pyvitfast_emulator_counters_json() {
    static std::string json;
    json = pyvitfast::emulator_counters_json();
    return json.c_str();
}
