// Short vectors and 16-bit floating point storage types, for device and host code.
#pragma once

#include <cstddef>
#include <cstdint>

#include "portable/platform.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace pyvitfast {

// N elements loaded and stored together; aligned to its size, but to 16 bytes at most, which is the
// widest access of one thread.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vec {
    static_assert(N > 0 && (N & (N - 1)) == 0, "the length of a Vec is a power of two");
    T data[N];

    PVF_HOST_DEVICE T& operator[](int i) { return data[i]; }
    PVF_HOST_DEVICE const T& operator[](int i) const { return data[i]; }
};

// IEEE binary16, stored only: arithmetic is done in float.
struct Half {
    std::uint16_t bits;
};

// The upper half of a float, stored only: arithmetic is done in float.
struct BFloat16 {
    std::uint16_t bits;
};

// The type in which values of T are accumulated.
template <typename T>
struct AccumulateType {
    using type = float;
};
template <>
struct AccumulateType<double> {
    using type = double;
};
template <typename T>
using Accumulate = typename AccumulateType<T>::type;

PVF_HOST_DEVICE std::uint32_t float_bits(float x) { return __builtin_bit_cast(std::uint32_t, x); }
PVF_HOST_DEVICE float bits_float(std::uint32_t x) { return __builtin_bit_cast(float, x); }

// By masks rather than ?:, behind which GCC would hide a float operation that it then must not
// execute speculatively, so that it gives up vectorising.
PVF_HOST_DEVICE std::uint32_t select_bits(bool condition, std::uint32_t a, std::uint32_t b) {
    const std::uint32_t mask = 0u - static_cast<std::uint32_t>(condition);
    return (a & mask) | (b & ~mask);
}

// Exact. float and double are returned unchanged: the name says what the 16-bit types become.
PVF_HOST_DEVICE float to_float(float x) { return x; }
PVF_HOST_DEVICE double to_float(double x) { return x; }

PVF_HOST_DEVICE float to_float(BFloat16 x) {
    return bits_float(static_cast<std::uint32_t>(x.bits) << 16);
}

PVF_HOST_DEVICE float to_float(Half x) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(x.bits));
#else
    const std::uint32_t magnitude = static_cast<std::uint32_t>(x.bits & 0x7fffu) << 13;
    const std::uint32_t exponent = magnitude & (0x7c00u << 13);
    const std::uint32_t normal = magnitude + ((127u - 15u) << 23);
    const std::uint32_t special = normal + ((128u - 16u) << 23);
    // A subnormal becomes 2^-14 * (1 + f), from which 2^-14 is taken off: no operand is a
    // subnormal float, so this holds also when the processor flushes those to zero.
    const std::uint32_t subnormal =
        float_bits(bits_float(normal + (1u << 23)) - bits_float(113u << 23));
    const std::uint32_t finite = select_bits(exponent == 0, subnormal, normal);
    const std::uint32_t result = select_bits(exponent == (0x7c00u << 13), special, finite);
    return bits_float(result | static_cast<std::uint32_t>(x.bits & 0x8000u) << 16);
#endif
}

// Round to nearest, ties to even. NaN stays NaN (its payload may differ between CPU and GPU).
template <typename T>
PVF_HOST_DEVICE T from_float(Accumulate<T> x) {
    return static_cast<T>(x);
}

template <>
PVF_HOST_DEVICE BFloat16 from_float<BFloat16>(float x) {
#if defined(__CUDA_ARCH__)
    return BFloat16{__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
    const std::uint32_t bits = float_bits(x);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const std::uint32_t quiet_nan = (bits >> 16) | 0x40u;
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return BFloat16{static_cast<std::uint16_t>(select_bits(is_nan, quiet_nan, rounded))};
#endif
}

template <>
PVF_HOST_DEVICE Half from_float<Half>(float x) {
#if defined(__CUDA_ARCH__)
    return Half{__half_as_ushort(__float2half_rn(x))};
#else
    const std::uint32_t sign = float_bits(x) & 0x80000000u;
    const std::uint32_t magnitude = float_bits(x) ^ sign;
    // Adding 0.5 puts the last bit of a subnormal half at the end of the float's significand, so
    // the addition itself rounds.
    const std::uint32_t half_one = 126u << 23;
    const std::uint32_t subnormal =
        float_bits(bits_float(magnitude) + bits_float(half_one)) - half_one;
    const std::uint32_t odd = (magnitude >> 13) & 1u;
    const std::uint32_t normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + odd) >> 13;
    const std::uint32_t special = select_bits(magnitude > 0x7f800000u, 0x7e00u, 0x7c00u);
    const std::uint32_t finite = select_bits(magnitude < (113u << 23), subnormal, normal);
    const std::uint32_t result = select_bits(magnitude >= (143u << 23), special, finite);
    return Half{static_cast<std::uint16_t>(result | sign >> 16)};
#endif
}

}  // namespace pyvitfast
