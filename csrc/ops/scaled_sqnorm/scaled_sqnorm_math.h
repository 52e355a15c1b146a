#pragma once

#include "portable/quantizer.h"

namespace pyvitfast::sqnorm {

// The square of a float product is exact in double.
template <typename A>
PVF_HOST_DEVICE double square(A scale, A grad) {
    const auto scaled = static_cast<double>(product(scale, grad));
    return product(scaled, scaled);
}

}  // namespace pyvitfast::sqnorm
