#pragma once

#include "portable/layer_norm.h"

namespace pyvitfast::cross_attention {

using pyvitfast::norm_slope;

}  // namespace pyvitfast::cross_attention
