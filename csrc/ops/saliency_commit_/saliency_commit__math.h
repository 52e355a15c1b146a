#pragma once

#include "portable/platform.h"

namespace pyvitfast::saliency {

// False for NaN and Inf, without a library call that fast-math or the device may treat differently.
template <typename T>
PVF_HOST_DEVICE bool is_finite(T value) {
    return value - value == T(0);
}

// s = coeff * sum, squared after the full sum of the structural group (NViT eq. 6).
template <typename T>
PVF_HOST_DEVICE T unit_square(T sum, T coeff) {
    const T scaled = sum * coeff;
    return scaled * scaled;
}

}  // namespace pyvitfast::saliency
