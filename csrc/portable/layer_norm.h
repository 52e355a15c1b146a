#pragma once

#include "portable/platform.h"

namespace pyvitfast {

// Gradient of a row before LayerNorm from that of its normalised form: `mean_slope` and
// `mean_product` are the row's means of the slope and of slope * hat.
template <typename A>
PVF_HOST_DEVICE A norm_slope(A slope, A hat, A rstd, A mean_slope, A mean_product) {
    return rstd * (slope - mean_slope - hat * mean_product);
}

}  // namespace pyvitfast
