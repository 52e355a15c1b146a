#pragma once

#include <cstdint>

#include "ops/tensor_ring_grow/tensor_ring_grow_math.h"
#include "portable/strided_product.h"

namespace pyvitfast {

// Slots [first, first + count) of a result: where they lie in it, in elements.
struct RingSlots {
    void* data;
    int64_t first, count;
    int64_t layer, slot, row;
};

struct RingForward {
    RingSizes sizes;
    const void* weight;
    const void* s_b;
    const void* s_o;
    const void* s_l;
    const void* s_i;
    RingSlots slots[2];
    bool wide;
};

// Source and input core in the order in which the CPU kernel reads them.
struct RingPanels {
    void* weight;
    void* s_i;
};

struct TensorRingCpu {
    StridedProductCpu products;
    // Bytes of the panels of the source, of those of s_i, and of scratch for `count` target rows.
    int64_t (*weight_bytes)(const RingForward&);
    int64_t (*s_i_bytes)(const RingForward&);
    int64_t (*scratch_bytes)(const RingForward&, int64_t count);
    // Matrices [first, last) of the source, or bonds (r4, r1) of s_i, into their panels.
    void (*pack_weight)(const RingForward&, const RingPanels&, int64_t first, int64_t last);
    void (*pack_s_i)(const RingForward&, const RingPanels&, int64_t first, int64_t last);
    // Rows [first, first + count) of all target matrices.
    void (*rows)(const RingForward&, const RingPanels&, int64_t first, int64_t count,
                 void* scratch);
};

}  // namespace pyvitfast
