#pragma once

// Vectors of 8 lanes for the CPU kernels. One source serves every instruction set: the compiler
// splits a vector that is wider than the registers. Everything here is always_inline, so that no
// copy compiled for a wide instruction set can be linked into the baseline.

#include <cstdint>
#include <cstring>

#include "portable/vec.h"

#define PVF_INLINE static inline __attribute__((always_inline))

namespace pyvitfast::PVF_CPU_CAPABILITY {

constexpr int kLanes = 8;
using Doubles = double __attribute__((vector_size(64)));
using Floats = float __attribute__((vector_size(32)));
using Words = uint32_t __attribute__((vector_size(32)));
using Shorts = uint16_t __attribute__((vector_size(16)));
using LongWords = uint64_t __attribute__((vector_size(64)));

template <typename V, typename T>
PVF_INLINE V load_unaligned(const T* from) {
    V value;
    std::memcpy(&value, from, sizeof(V));
    return value;
}

template <typename V, typename T>
PVF_INLINE void store_unaligned(T* to, V value) {
    std::memcpy(to, &value, sizeof(V));
}

PVF_INLINE Floats load_floats(const float* from) { return load_unaligned<Floats>(from); }

PVF_INLINE Floats load_floats(const BFloat16* from) {
    const Words bits = __builtin_convertvector(load_unaligned<Shorts>(from), Words) << 16;
    return reinterpret_cast<Floats>(bits);
}

PVF_INLINE Floats load_floats(const Half* from) {
    const Words bits = __builtin_convertvector(load_unaligned<Shorts>(from), Words);
    const Words sign = (bits & 0x8000u) << 16;
    const Words magnitude = (bits & 0x7fffu) << 13;
    // 2^112 moves the half exponent to the float exponent and renormalises subnormals exactly.
    const Floats scaled = reinterpret_cast<Floats>(magnitude) * 0x1p112f;
    const Words special = reinterpret_cast<Words>(magnitude >= (0x7c00u << 13));
    const Words wide = reinterpret_cast<Words>(scaled) | (special & 0x7f800000u);
    return reinterpret_cast<Floats>(wide | sign);
}

template <typename T>
PVF_INLINE Doubles load_doubles(const T* from) {
    return __builtin_convertvector(load_floats(from), Doubles);
}

PVF_INLINE Doubles load_doubles(const double* from) { return load_unaligned<Doubles>(from); }

// Lanes are added in order, so the sum has the same bits on every instruction set.
PVF_INLINE double sum_lanes(Doubles value) {
    double total = value[0];
    for (int lane = 1; lane < kLanes; ++lane) {
        total += value[lane];
    }
    return total;
}

template <typename T>
PVF_INLINE double to_double(T value) {
    return static_cast<double>(to_float(value));
}

PVF_INLINE double to_double(double value) { return value; }

}  // namespace pyvitfast::PVF_CPU_CAPABILITY
