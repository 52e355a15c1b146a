#pragma once

// Vectors of 8 lanes for the CPU kernels. One source serves every instruction set: the compiler
// splits a vector that is wider than the registers. Everything here is always_inline, so that no
// copy compiled for a wide instruction set can be linked into the baseline.

#include <cstdint>
#include <cstring>

#include "portable/vec.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

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

// By intrinsics where they exist: g++ 12 widens a vector half by half and glues the parts together.
PVF_INLINE Words load_words(const uint16_t* from) {
#if defined(__AVX2__)
    const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return reinterpret_cast<Words>(_mm256_cvtepu16_epi32(narrow));
#else
    return __builtin_convertvector(load_unaligned<Shorts>(from), Words);
#endif
}

PVF_INLINE Doubles widen(Floats value) {
#if defined(__AVX512F__)
    return reinterpret_cast<Doubles>(_mm512_cvtps_pd(reinterpret_cast<__m256>(value)));
#else
    return __builtin_convertvector(value, Doubles);
#endif
}

PVF_INLINE Floats load_floats(const BFloat16* from) {
    return reinterpret_cast<Floats>(load_words(&from->bits) << 16);
}

PVF_INLINE Floats load_floats(const Half* from) {
#if defined(__F16C__)
    const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(&from->bits));
    return reinterpret_cast<Floats>(_mm256_cvtph_ps(narrow));
#else
    const Words bits = load_words(&from->bits);
    const Words sign = (bits & 0x8000u) << 16;
    const Words magnitude = (bits & 0x7fffu) << 13;
    // 2^112 moves the half exponent to the float exponent and renormalises subnormals exactly.
    const Floats scaled = reinterpret_cast<Floats>(magnitude) * 0x1p112f;
    const Words special = reinterpret_cast<Words>(magnitude >= (0x7c00u << 13));
    const Words wide = reinterpret_cast<Words>(scaled) | (special & 0x7f800000u);
    return reinterpret_cast<Floats>(wide | sign);
#endif
}

template <typename T>
PVF_INLINE Doubles load_doubles(const T* from) {
    return widen(load_floats(from));
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
