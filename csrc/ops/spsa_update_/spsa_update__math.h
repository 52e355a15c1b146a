#pragma once

#include "portable/quantizer.h"

namespace pyvitfast::spsa {

// What multiplies a direction at an element: its slope over the number of directions and the scale.
PVF_HOST_DEVICE float factor_of(double slope, int32_t directions, float scale) {
    return static_cast<float>(slope /
                              product(static_cast<double>(directions), static_cast<double>(scale)));
}

}  // namespace pyvitfast::spsa
