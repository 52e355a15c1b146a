#pragma once

#include "portable/platform.h"

namespace pyvitfast::saliency {

// Gradient of w * g, or of |w * g|, with respect to one factor; sign(0) is 0 as in torch.abs.
template <typename A>
PVF_HOST_DEVICE A product_slope(A weight, A grad, A other, A upstream, bool absolute) {
    if (!absolute) {
        return other * upstream;
    }
    const A product = weight * grad;
    if (product != product) {
        return product * upstream;
    }
    return product > A(0) ? other * upstream : product < A(0) ? -other * upstream : A(0) * upstream;
}

}  // namespace pyvitfast::saliency
