// What the SPSA kernels share on a GPU: quads of elements on the Philox blocks of a tensor, and the
// signs of directions.
#pragma once

#include "float_type.h"
#include "portable/device.h"
#include "portable/spsa_noise.h"

namespace pyvitfast::device {

// Four neighbours of a tensor, of which [low, high) are there; `at` is where the first would be.
struct Quad {
    int64_t at;
    int low;
    int high;

    PVF_DEVICE bool whole() const { return low == 0 && high == 4; }
    PVF_DEVICE bool has(int i) const { return i >= low && i < high; }
};

// Quad number `index` of a tensor of `numel` elements that begins `offset` into the whole one.
PVF_DEVICE Quad quad_at(int64_t index, int64_t numel, int64_t offset) {
    const int64_t at = index * 4 - offset % 4;
    const int64_t past = numel - at;
    return {at, at < 0 ? static_cast<int>(-at) : 0,
            past < 4 ? static_cast<int>(past < 0 ? 0 : past) : 4};
}

PVF_DEVICE Vec<float, 4> load_quad(FloatType type, const void* from, const Quad& quad) {
    Vec<float, 4> out{};
    with_narrow_float(type, [&](auto kind) {
        using T = typename decltype(kind)::type;
        const T* p = static_cast<const T*>(from) + quad.at;
        if (quad.whole() && reinterpret_cast<uintptr_t>(p) % alignof(Vec<T, 4>) == 0) {
            const auto vec = load_vec_streaming<4>(p);
            PVF_UNROLL
            for (int i = 0; i < 4; ++i) {
                out[i] = to_float(vec[i]);
            }
        } else {
            PVF_UNROLL
            for (int i = 0; i < 4; ++i) {
                if (quad.has(i)) {
                    out[i] = to_float(load(p + i));
                }
            }
        }
    });
    return out;
}

PVF_DEVICE void store_quad(FloatType type, void* to, const Quad& quad, const Vec<float, 4>& value) {
    with_narrow_float(type, [&](auto kind) {
        using T = typename decltype(kind)::type;
        T* p = static_cast<T*>(to) + quad.at;
        if (quad.whole() && reinterpret_cast<uintptr_t>(p) % alignof(Vec<T, 4>) == 0) {
            Vec<T, 4> vec;
            PVF_UNROLL
            for (int i = 0; i < 4; ++i) {
                vec[i] = from_float<T>(value[i]);
            }
            store_vec(p, vec);
        } else {
            PVF_UNROLL
            for (int i = 0; i < 4; ++i) {
                if (quad.has(i)) {
                    store(p + i, from_float<T>(value[i]));
                }
            }
        }
    });
}

// The scales of a quad's elements.
PVF_DEVICE Vec<float, 4> scales_of(const ScaleLayout& layout, const Quad& quad) {
    const float* scales = static_cast<const float*>(layout.scales);
    const bool together = layout.groups == 0 || (quad.whole() && quad.at % 4 == 0 &&
                                                 layout.cols % 4 == 0 && layout.group % 4 == 0);
    Vec<float, 4> out;
    if (together) {
        const float scale =
            quad.high > quad.low ? load(scales + scale_index(layout, quad.at)) : 1.0f;
        PVF_UNROLL
        for (int i = 0; i < 4; ++i) {
            out[i] = scale;
        }
        return out;
    }
    PVF_UNROLL
    for (int i = 0; i < 4; ++i) {
        out[i] = quad.has(i) ? load(scales + scale_index(layout, quad.at + i)) : 1.0f;
    }
    return out;
}

// The coins of 32 directions from `first` on, a bit each: a lane throws one. The whole warp calls
// it.
PVF_DEVICE unsigned negative_directions(uint64_t seed, uint32_t first) {
    return ballot(spsa::is_negative(seed, first + lane_id()));
}

}  // namespace pyvitfast::device
