#pragma once

#include "attention.h"

namespace pyvitfast {

// One axis of the geometry, 0 down and 1 across; false where the numbers make no sense.
PVF_HOST_DEVICE bool set_axis(AttentionParams& p, int axis, int64_t windows, int64_t grid,
                              int64_t valid, int64_t window, int64_t stride, int64_t offset) {
    p.windows[axis] = windows;
    p.grid[axis] = grid;
    p.valid[axis] = valid;
    p.window[axis] = window;
    p.stride[axis] = stride;
    p.offset[axis] = offset;
    return window >= 1 && stride >= 1 && valid >= 0 && valid <= grid;
}

}  // namespace pyvitfast
