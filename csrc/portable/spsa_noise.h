// The noise of SPSA directions out of Philox words, in the same bits everywhere.
#pragma once

#include "portable/philox.h"
#include "portable/quantizer.h"

namespace pyvitfast {

enum class Noise : int32_t {
    kUniform = 0,
    kRademacher = 1,
    kTriangular = 2,
    kLogistic = 3,
    kNormal = 4
};

namespace spsa {

PVF_HOST_DEVICE float square_root(float x) {
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(x);
#else
    return __builtin_sqrtf(x);
#endif
}

// An odd multiple of 2^-24 in (-1, 1): exact, symmetric, never 0.
PVF_HOST_DEVICE float fraction(uint32_t word) {
    return static_cast<float>(2 * (static_cast<int32_t>(word) >> 8) + 1) * 0x1p-24f;
}

PVF_HOST_DEVICE float with_sign_of(float magnitude, float sign) {
    return bits_float(float_bits(magnitude) | (float_bits(sign) & 0x80000000u));
}

// Natural logarithm of a positive normal number. Every step is a rounding of its own, so unlike the
// libraries' functions it has the same bits everywhere.
PVF_HOST_DEVICE float logarithm(float x) {
    const uint32_t shifted = float_bits(x) - 0x3f3504f3u;  // mantissa from sqrt(1/2) on
    const auto exponent = static_cast<float>(static_cast<int32_t>(shifted) >> 23);
    const float f = bits_float((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
    const float square = product(f, f);
    float p = 7.0376836292e-2f;
    p = fused(p, f, -1.1514610310e-1f);
    p = fused(p, f, 1.1676998740e-1f);
    p = fused(p, f, -1.2420140846e-1f);
    p = fused(p, f, 1.4249322787e-1f);
    p = fused(p, f, -1.6668057665e-1f);
    p = fused(p, f, 2.0000714765e-1f);
    p = fused(p, f, -2.4999993993e-1f);
    p = fused(p, f, 3.3333331174e-1f);
    float y = product(product(p, f), square);
    y = fused(exponent, -2.12194440e-4f, y);
    y = fused(-0.5f, square, y);
    return fused(exponent, 0.693359375f, f + y);
}

struct SineCosine {
    float sine;
    float cosine;
};

// Of pi x for |x| <= 1.
PVF_HOST_DEVICE SineCosine sine_cosine_pi(float x) {
    const float quarter = nearest(x + x);
    const float angle = product(fused(quarter, -0.5f, x), 3.14159265f);
    const float square = product(angle, angle);
    float s = fused(square, 2.7557319e-6f, -1.9841270e-4f);
    s = fused(square, s, 8.3333333e-3f);
    s = fused(square, s, -1.6666667e-1f);
    s = fused(product(square, angle), s, angle);
    float c = fused(square, 2.4801587e-5f, -1.3888889e-3f);
    c = fused(square, c, 4.1666667e-2f);
    c = fused(square, c, -0.5f);
    c = fused(square, c, 1.0f);
    const auto turn = static_cast<uint32_t>(static_cast<int32_t>(quarter)) & 3u;
    const uint32_t sine = select_bits((turn & 1u) != 0, float_bits(c), float_bits(s));
    const uint32_t cosine = select_bits((turn & 1u) != 0, float_bits(s), float_bits(c));
    return {bits_float(sine ^ (turn & 2u) << 30), bits_float(cosine ^ ((turn + 1u) & 2u) << 30)};
}

PVF_HOST_DEVICE float uniform(uint32_t word) { return product(fraction(word), 1.73205078f); }

PVF_HOST_DEVICE float triangular(uint32_t word) {
    const float f = fraction(word);
    const float size = bits_float(float_bits(f) & 0x7fffffffu);
    return with_sign_of(product(1.0f - square_root(1.0f - size), 2.44948983f), f);
}

// atanh(f) / (pi / sqrt(12)).
PVF_HOST_DEVICE float logistic(uint32_t word) {
    const float f = fraction(word);
    const float size = bits_float(float_bits(f) & 0x7fffffffu);
    const float log = logarithm(quotient(1.0f + size, 1.0f - size));
    return with_sign_of(product(log, 0.551328895f), f);
}

// Box and Muller: two values of two words.
PVF_HOST_DEVICE SineCosine normal(uint32_t first, uint32_t second) {
    const float log = logarithm(uniform_float(first));
    // Rounding may leave the logarithm of 1 a little above 0.
    const float radius = square_root(log < 0.0f ? product(-2.0f, log) : 0.0f);
    const SineCosine at = sine_cosine_pi(fraction(second));
    return {product(radius, at.sine), product(radius, at.cosine)};
}

PVF_HOST_DEVICE float rademacher(uint32_t word, uint32_t bit) {
    return bits_float(0x3f800000u | (word >> bit & 1u) << 31);
}

PVF_HOST_DEVICE Vec<uint32_t, 4> words(uint64_t seed, uint64_t block, uint32_t tensor,
                                       uint32_t direction) {
    return philox(seed, block, uint64_t{direction} << 32 | tensor);
}

// Elements 4 quad .. 4 quad + 3 of a tensor's noise.
PVF_HOST_DEVICE Vec<float, 4> quad_of(Noise kind, uint64_t seed, int64_t quad, uint32_t tensor,
                                      uint32_t direction) {
    const auto at = static_cast<uint64_t>(quad);
    const Vec<uint32_t, 4> w =
        words(seed, kind == Noise::kRademacher ? at >> 5 : at, tensor, direction);
    Vec<float, 4> out;
    if (kind == Noise::kNormal) {
        const SineCosine a = normal(w[0], w[1]);
        const SineCosine b = normal(w[2], w[3]);
        return {{a.cosine, a.sine, b.cosine, b.sine}};
    }
    if (kind == Noise::kRademacher) {
        const uint32_t word = at & 16u ? (at & 8u ? w[3] : w[2]) : (at & 8u ? w[1] : w[0]);
        const uint32_t bit = static_cast<uint32_t>(at & 7u) * 4;
        PVF_UNROLL
        for (int i = 0; i < 4; ++i) {
            out[i] = rademacher(word, bit + static_cast<uint32_t>(i));
        }
        return out;
    }
    PVF_UNROLL
    for (int i = 0; i < 4; ++i) {
        out[i] = kind == Noise::kUniform      ? uniform(w[i])
                 : kind == Noise::kTriangular ? triangular(w[i])
                                              : logistic(w[i]);
    }
    return out;
}

// Whether the coin of a direction shows -1.
PVF_HOST_DEVICE bool is_negative(uint64_t seed, uint32_t direction) {
    return words(seed, ~uint64_t{0}, 0xffffffffu, direction)[0] >> 31 != 0;
}

// What multiplies the scaled gradient: sqrt(beta) / its norm; 0 where that is not a usable number.
PVF_HOST_DEVICE float guidance(double sqnorm, double sqrt_beta) {
    const bool usable = sqnorm > 0.0 && sqnorm < static_cast<double>(__builtin_inf());
#if defined(__CUDA_ARCH__)
    const double norm = __dsqrt_rn(sqnorm);
#else
    const double norm = __builtin_sqrt(sqnorm);
#endif
    return usable ? static_cast<float>(sqrt_beta / norm) : 0.0f;
}

// The direction at one element. Without guidance the gradient, which may be NaN, plays no part.
PVF_HOST_DEVICE float direction_at(float guidance, float scaled_grad, float spread, float noise) {
    const float along = guidance != 0.0f ? product(guidance, scaled_grad) : 0.0f;
    return fused(spread, noise, along);
}

}  // namespace spsa
}  // namespace pyvitfast
