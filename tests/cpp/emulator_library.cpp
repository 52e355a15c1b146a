// Entry points for a test that loads the kernels into Python.
#include <string>

#include "emulator_kernels.h"

#define PVF_EXPORT extern "C" __attribute__((visibility("default")))

PVF_EXPORT const char* run_transpose(const float* x, float* out, int size) {
    static std::string error;
    try {
        pyvitfast::testing::transpose(x, out, size, false);
        return nullptr;
    } catch (const pyvitfast::EmulatorError& e) {
        error = e.what();
        return error.c_str();
    }
}
