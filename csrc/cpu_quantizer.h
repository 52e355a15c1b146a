#pragma once

// What the CPU kernels of the quantisation ops share: sums by the fixed tree, scales laid out by
// element, and conversion of dtypes.

#include "cpu_vector.h"
#include "float_type.h"
#include "portable/quantizer.h"

namespace pyvitfast::PVF_CPU_CAPABILITY {

// The lanes of a chunk to its sum.
PVF_INLINE double sum_of_lanes(const double* lanes) {
    double sums[32];
    for (int i = 0; i < 32; ++i) {
        sums[i] = (lanes[4 * i] + lanes[4 * i + 1]) + (lanes[4 * i + 2] + lanes[4 * i + 3]);
    }
    for (int step = 16; step > 0; step /= 2) {
        for (int i = 0; i < step; ++i) {
            sums[i] += sums[i + step];
        }
    }
    return sums[0];
}

// The sum of value(j) for j below count, at most one chunk.
template <typename F>
PVF_INLINE double sum_of_chunk(int64_t count, const F& value) {
    double lanes[kSumLanes] = {};
    int64_t at = 0;
    for (; at + kSumLanes <= count; at += kSumLanes) {
        for (int lane = 0; lane < kSumLanes; ++lane) {
            lanes[lane] += value(at + lane);
        }
    }
    for (int lane = 0; at + lane < count; ++lane) {
        lanes[lane] += value(at + lane);
    }
    return sum_of_lanes(lanes);
}

// The sum of chunk sums.
PVF_INLINE double sum_of_sums(const double* sums, int64_t count) {
    double total = 0.0;
    for (int64_t first = 0; first < count; first += kSumChunk) {
        const int64_t size = count - first < kSumChunk ? count - first : kSumChunk;
        total += sum_of_chunk(size, [&](int64_t j) { return sums[first + j]; });
    }
    return total;
}

// f(first, past the last, scale index) for each run of elements in [begin, end) that share a scale.
template <typename F>
PVF_INLINE void for_each_run(const ScaleLayout& layout, int64_t begin, int64_t end, const F& f) {
    int64_t index = scale_index(layout, begin);
    for (int64_t at = begin; at < end; ++index) {
        int64_t stop = end;
        if (layout.groups != 0) {
            const int64_t row = index / layout.groups;
            const int64_t group = index - row * layout.groups;
            const int64_t past = group + 1 < layout.groups
                                     ? row * layout.cols + (group + 1) * layout.group
                                     : (row + 1) * layout.cols;
            stop = past < end ? past : end;
        }
        f(at, stop, index);
        at = stop;
    }
}

// The scale of each of the elements [begin, end).
template <typename A>
PVF_INLINE void spread_scales(const ScaleLayout& layout, int64_t begin, int64_t end, A* out) {
    const A* scales = static_cast<const A*>(layout.scales);
    for_each_run(layout, begin, end, [&](int64_t first, int64_t last, int64_t index) {
        const A scale = scales[index];
        for (int64_t j = first; j < last; ++j) {
            out[j - begin] = scale;
        }
    });
}

template <typename T, typename A>
PVF_INLINE void widen_all(const T* from, int64_t count, A* to) {
    for (int64_t j = 0; j < count; ++j) {
        to[j] = static_cast<A>(to_float(from[j]));
    }
}

}  // namespace pyvitfast::PVF_CPU_CAPABILITY
