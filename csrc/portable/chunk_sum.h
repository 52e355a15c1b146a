// The fixed tree of sums of quantizer.h on a GPU: a warp a chunk.
#pragma once

#include "portable/quantizer.h"
#include "portable/reduce.h"

namespace pyvitfast::device {

// The sum of value(j) for j below count, at most one chunk, in every lane.
template <typename F>
PVF_DEVICE double warp_chunk_sum(int count, const F& value) {
    double lanes[4] = {};
    for (int at = 4 * static_cast<int>(lane_id()); at < count; at += kSumLanes) {
        PVF_UNROLL
        for (int i = 0; i < 4; ++i) {
            if (at + i < count) {
                lanes[i] += value(at + i);
            }
        }
    }
    return warp_sum((lanes[0] + lanes[1]) + (lanes[2] + lanes[3]));
}

// The sum of `count` chunk sums, in every lane of the warp.
PVF_DEVICE double warp_sum_of_sums(const double* sums, int64_t count) {
    double total = 0.0;
    for (int64_t first = 0; first < count; first += kSumChunk) {
        const int64_t left = count - first;
        total += warp_chunk_sum(static_cast<int>(left < kSumChunk ? left : kSumChunk),
                                [&](int j) { return load(sums + first + j); });
    }
    return total;
}

}  // namespace pyvitfast::device
