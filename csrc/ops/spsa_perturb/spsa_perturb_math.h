#pragma once

#include "portable/quantizer.h"

namespace pyvitfast::spsa {

// The quantised weight at a distance along the direction; `radius` is eps_bar * scale, with its
// sign.
template <bool kSign>
PVF_HOST_DEVICE float perturbed(float weight, float radius, float direction, float scale,
                                const Levels& levels) {
    const float moved = fused(radius, direction, weight);
    return product(level_of<kSign>(quotient(moved, scale), levels), scale);
}

}  // namespace pyvitfast::spsa
