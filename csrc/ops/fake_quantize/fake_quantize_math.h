#pragma once

#include "ops/fake_quantize/fake_quantize.h"
#include "portable/quantizer.h"

namespace pyvitfast::quantizing {

// torch's own fake quantisation multiplies by the inverse, and the rounded mask stands for it.
template <typename A>
PVF_HOST_DEVICE A ratio_of(A weight, A scale, Mask mask) {
    return mask == Mask::kRounded ? product(weight, quotient(A(1), scale))
                                  : quotient(weight, scale);
}

template <bool kSign, typename A>
PVF_HOST_DEVICE A quantized(A weight, A scale, const QuantizeOptions& options) {
    return product(level_of<kSign>(ratio_of(weight, scale, options.mask), options.levels), scale);
}

// e^x for x <= 0 in rounded steps of its own, for the same bits everywhere.
PVF_HOST_DEVICE float exponential(float x) {
    const float bounded = x < -87.0f ? -87.0f : x;
    const float whole = nearest(product(bounded, 1.44269504f));
    float r = fused(whole, -0.693359375f, bounded);
    r = fused(whole, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = fused(p, r, 1.3981999507e-3f);
    p = fused(p, r, 8.3334519073e-3f);
    p = fused(p, r, 4.1665795894e-2f);
    p = fused(p, r, 1.6666665459e-1f);
    p = fused(p, r, 0.5f);
    const float tail = fused(product(r, r), p, r) + 1.0f;
    const auto exponent = static_cast<uint32_t>(static_cast<int32_t>(whole) + 127);
    return product(tail, bits_float(exponent << 23));
}

// 1 - tanh(x)^2.
PVF_HOST_DEVICE float tanh_slope(float x) {
    const float e = exponential(x < 0.0f ? x + x : -(x + x));
    const float sum = 1.0f + e;
    return quotient(product(4.0f, e), product(sum, sum));
}
PVF_HOST_DEVICE double tanh_slope(double x) {
#if defined(__CUDA_ARCH__)
    const double value = ::tanh(x);
#else
    const double value = __builtin_tanh(x);
#endif
    return 1.0 - product(value, value);
}

template <typename A>
struct Slopes {
    A weight;
    A scale;
};

// Derivatives of a level with respect to weight and scale. LSQ keeps the gradient where the level
// is not clipped; on the half-integer grid the outermost points themselves count as clipped.
template <bool kSign, typename A>
PVF_HOST_DEVICE Slopes<A> slopes_of(A ratio, const QuantizeOptions& options) {
    const Levels& levels = options.levels;
    if constexpr (kSign) {
        const A size = ratio < A(0) ? -ratio : ratio;
        A slope = A(1);
        if (options.mask == Mask::kHardtanh) {
            slope = size <= A(1) ? A(1) : A(0);
        } else if (options.mask == Mask::kTanh) {
            slope = tanh_slope(ratio);
        } else if (options.mask == Mask::kApproxSign) {
            slope = size <= A(1) ? A(2) - (size + size) : A(0);
        }
        return {ratio != ratio ? ratio : slope, level_of<true>(ratio, levels)};
    } else {
        const A shift = static_cast<A>(levels.shift);
        const A low = static_cast<A>(levels.low);
        const A high = static_cast<A>(levels.high);
        const A z = ratio - shift;
        // Far outside the magic number of `nearest` would not round, and it need not.
        const A code = nearest(clamped(z, low - A(2), high + A(2)));
        const A at = options.mask == Mask::kRounded ? code : z;
        const bool open = levels.shift != 0.0f && options.mask != Mask::kRounded;
        const bool inside = open ? (at > low) & (at < high) : (at >= low) & (at <= high);
        const A clipped = (z < A(0) ? low : high) + shift;
        const A for_scale = inside ? code - z : clipped;
        const A for_weight = options.mask == Mask::kIdentity || inside ? A(1) : A(0);
        return {z != z ? z : for_weight, z != z ? z : for_scale};
    }
}

// LSQ's factor 1 / sqrt(N Qp); a greatest code of 0 counts as 1.
PVF_HOST_DEVICE double gradient_factor(const QuantizeOptions& options, int64_t count) {
    if (options.scale_gradient == 0) {
        return 1.0;
    }
    const double high = options.levels.high < 1.0f ? 1.0 : static_cast<double>(options.levels.high);
    const double all = static_cast<double>(count) * high;
#if defined(__CUDA_ARCH__)
    return 1.0 / __dsqrt_rn(all);
#else
    return 1.0 / __builtin_sqrt(all);
#endif
}

}  // namespace pyvitfast::quantizing
