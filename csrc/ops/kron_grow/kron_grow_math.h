#pragma once

#include <cstdint>

#include "portable/platform.h"

namespace pyvitfast {

// Whose layers the factors belong to.
enum class Factors : int64_t { kShared = 0, kSource = 1, kTarget = 2 };

// Matrices [types, layers1, out1, in1] to [types, layers2, out2, in2].
struct KronSizes {
    int64_t types, layers1, out1, in1, layers2, out2, in2;
};

// Matrices that both factors are applied to at once: few enough for a cache, enough to share out.
constexpr int64_t kKronAtOnce = 4;

// Multiply-adds of both factors on one matrix, the right one first or the left one.
PVF_HOST_DEVICE int64_t kron_right_first(const KronSizes& n) {
    return n.out1 * n.in2 * (n.in1 + n.out2);
}
PVF_HOST_DEVICE int64_t kron_left_first(const KronSizes& n) {
    return n.out2 * n.in1 * (n.out1 + n.in2);
}

// Layers are mixed before the factors where that takes fewer of them, or the factors are the
// target's.
PVF_HOST_DEVICE bool kron_depth_first(const KronSizes& n, Factors factors) {
    if (factors != Factors::kShared) {
        return factors == Factors::kTarget;
    }
    const int64_t right = kron_right_first(n);
    const int64_t left = kron_left_first(n);
    const int64_t width = right < left ? right : left;
    const int64_t mixes = n.layers1 * n.layers2;
    return n.layers2 * width + mixes * n.out1 * n.in1 <= n.layers1 * width + mixes * n.out2 * n.in2;
}

// Products of a forward pass.
PVF_HOST_DEVICE int64_t kron_products(const KronSizes& n, Factors factors) {
    const int64_t layers = kron_depth_first(n, factors) ? n.layers2 : n.layers1;
    return 1 + 2 * n.types * ((layers + kKronAtOnce - 1) / kKronAtOnce);
}

}  // namespace pyvitfast
