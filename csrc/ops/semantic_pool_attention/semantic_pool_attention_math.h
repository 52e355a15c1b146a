#pragma once

#include "portable/layer_norm.h"

namespace pyvitfast::semantic_pool {

using pyvitfast::norm_slope;

// Gradient of a score: `delta` is the mean of `slope`, weighted by the probabilities of its query.
template <typename A>
PVF_HOST_DEVICE A score_slope(A probability, A slope, A delta) {
    return probability * (slope - delta);
}

}  // namespace pyvitfast::semantic_pool
