#pragma once

#include <cstdint>

namespace pyvitfast {

// Multiply-adds on values that stay in registers: what the arithmetic units of one core can do.
struct FmaLoop {
    void (*run)(int64_t iterations);
    int64_t flops;  // of one iteration
};

}  // namespace pyvitfast
