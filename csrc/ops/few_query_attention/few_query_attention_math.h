#pragma once

#include "attention.h"

namespace pyvitfast {

// Plain attention: one window that is the whole of a grid of one line.
PVF_HOST_DEVICE void set_one_window(AttentionParams& p, int64_t keys) {
    p.windows[0] = p.windows[1] = 1;
    p.grid[0] = p.valid[0] = p.window[0] = 1;
    p.grid[1] = p.valid[1] = p.window[1] = keys;
    p.stride[0] = p.stride[1] = 1;
    p.offset[0] = p.offset[1] = 0;
}

}  // namespace pyvitfast
