// Reductions over a warp and over a block, in an order that depends on the block size only.
#pragma once

#include "portable/device.h"

namespace pyvitfast::device {

struct Sum {
    template <typename T>
    PVF_DEVICE T operator()(T a, T b) const {
        return a + b;
    }
};

// NaN wins, as in torch.
struct Max {
    template <typename T>
    PVF_DEVICE T operator()(T a, T b) const {
        return a > b || a != a ? a : b;
    }
};

// Returns the result in every lane: a butterfly gives all lanes the same bits, since both partners
// combine the same two values. `operation` must be commutative.
template <typename T, typename Operation>
PVF_DEVICE T warp_reduce(T value, Operation operation) {
    PVF_UNROLL
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
        value = operation(value, shuffle_xor(value, step));
    }
    return value;
}

template <typename T>
PVF_DEVICE T warp_sum(T value) {
    return warp_reduce(value, Sum{});
}
template <typename T>
PVF_DEVICE T warp_max(T value) {
    return warp_reduce(value, Max{});
}

// Returns the result in every thread. All threads of the block call it; the block is a multiple of
// 32 threads. `identity` stands in for warps that the block does not have.
template <typename T, typename Operation>
PVF_DEVICE T block_reduce(T value, Operation operation, T identity) {
    PVF_SHARED(T, partial, kWarpSize);
    value = warp_reduce(value, operation);
    if (lane_id() == 0) {
        store_shared(&partial[warp_id()], value);
    }
    sync_threads();
    const Index size = block_dim();
    const unsigned warps = size.x * size.y * size.z / kWarpSize;
    value = lane_id() < warps ? load_shared(&partial[lane_id()]) : identity;
    value = warp_reduce(value, operation);
    sync_threads();  // so that the next reduction may overwrite the partial results
    return value;
}

template <typename T>
PVF_DEVICE T block_sum(T value) {
    return block_reduce(value, Sum{}, T(0));
}
// `lowest` is what a block without values has: minus infinity, or the least integer.
template <typename T>
PVF_DEVICE T block_max(T value, T lowest) {
    return block_reduce(value, Max{}, lowest);
}

}  // namespace pyvitfast::device
