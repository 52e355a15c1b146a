#pragma once

#include <cstdint>

#include "portable/platform.h"

namespace pyvitfast {

// Storage of one element by its size alone: a store of zero bits is zero in every dtype.
struct alignas(16) Bytes16 {
    uint64_t low;
    uint64_t high;
};

// Calls f with a zero of the storage type of that size; false for a size no dtype has.
template <typename F>
PVF_HOST_DEVICE bool with_storage(int32_t element_size, const F& f) {
    switch (element_size) {
        case 1:
            f(uint8_t{});
            return true;
        case 2:
            f(uint16_t{});
            return true;
        case 4:
            f(uint32_t{});
            return true;
        case 8:
            f(uint64_t{});
            return true;
        case 16:
            f(Bytes16{});
            return true;
        default:
            return false;
    }
}

}  // namespace pyvitfast
