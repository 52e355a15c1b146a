#pragma once

#include <string>

namespace pyvitfast::emulator {

// Demangled name of a function, without its return type and parameters; empty if unknown.
std::string function_name(const void* function);

}  // namespace pyvitfast::emulator
