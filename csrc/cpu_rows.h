#pragma once

// Working memory of the CPU kernels, and rows of any dtype brought into it.

#include <cstdint>
#include <cstdlib>

#include "cpu_vector.h"

namespace pyvitfast::PVF_CPU_CAPABILITY {

// Working memory of a range of tasks. Memory that no task touches is never asked for: large blocks
// come from the system, page by page.
template <typename A>
class Scratch {
   public:
    Scratch() = default;
    explicit Scratch(int64_t count) { reserve(count); }
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    A* reserve(int64_t count) {
        if (count > count_) {
            std::free(data_);
            data_ = static_cast<A*>(std::aligned_alloc(64, (count * sizeof(A) + 63) / 64 * 64));
            count_ = count;
        }
        return data_;
    }
    A* data() const { return data_; }

   private:
    A* data_ = nullptr;
    int64_t count_ = 0;
};

template <typename A, typename T>
PVF_INLINE void widen_row(const T* from, int64_t count, A* to) {
    int64_t i = 0;
    if constexpr (sizeof(T) == 2) {
        for (; i + kLanes <= count; i += kLanes) {
            store_unaligned(to + i, load_floats(from + i));
        }
    }
    for (; i < count; ++i) {
        to[i] = static_cast<A>(to_float(from[i]));
    }
}

template <typename A, typename T>
PVF_INLINE void narrow_row(const A* from, int64_t count, T* to) {
    for (int64_t i = 0; i < count; ++i) {
        to[i] = from_float<T>(static_cast<Accumulate<T>>(from[i]));
    }
}

}  // namespace pyvitfast::PVF_CPU_CAPABILITY
