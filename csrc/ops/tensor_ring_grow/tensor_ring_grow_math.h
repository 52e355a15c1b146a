#pragma once

#include <cstdint>

#include "portable/platform.h"

namespace pyvitfast {

// Source [layers1, slots1, out1, in1] to [layers2, slots2, out2, in2]. The cores are packed:
// s_b [r1, slots2, slots1, r2], s_o [r2, r3, out2, out1], s_l [layers2, r4, layers1, r3],
// s_i [r4, r1, in1, in2].
struct RingSizes {
    int64_t layers1, slots1, out1, in1;
    int64_t layers2, slots2, out2, in2;
    int64_t r1, r2, r3, r4;
};

// Elements that a row of the target takes of what is kept after the first, second and third core.
PVF_HOST_DEVICE int64_t ring_first(const RingSizes& n) {
    return n.layers1 * n.slots1 * n.r2 * n.r3 * n.in1;
}
PVF_HOST_DEVICE int64_t ring_second(const RingSizes& n) {
    return n.layers1 * n.r3 * n.r1 * n.slots2 * n.in1;
}
PVF_HOST_DEVICE int64_t ring_third(const RingSizes& n) {
    return n.layers2 * n.r4 * n.r1 * n.slots2 * n.in1;
}

// Rows of the target handled at once, with so many tensors between the cores: these then take at
// most a quarter of source and target, and 32 rows keep the products busy.
PVF_HOST_DEVICE int64_t ring_tile(const RingSizes& n, int64_t tensors) {
    int64_t row = ring_first(n) > ring_second(n) ? ring_first(n) : ring_second(n);
    row = row > ring_third(n) ? row : ring_third(n);
    const int64_t ends =
        n.layers1 * n.slots1 * n.out1 * n.in1 + n.layers2 * n.slots2 * n.out2 * n.in2;
    const int64_t fits = row > 0 ? ends / 4 / (row * tensors) : 0;
    const int64_t most = fits > 32 ? fits : 32;
    const int64_t rows = n.out2 > 1 ? n.out2 : 1;
    return rows < most ? rows : most;
}

}  // namespace pyvitfast
