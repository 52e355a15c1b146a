// The fixed tree of sums of quantizer.h on a GPU: a warp a chunk.
#pragma once

#include "portable/quantizer.h"
#include "portable/reduce.h"

namespace pyvitfast::device {

// The sum of what f adds for the elements of a chunk, in every lane: f(first, how many of four
// neighbours are there, where to add each).
template <typename F>
PVF_DEVICE double warp_chunk_sum(int count, const F& f) {
    double lanes[4] = {};
    PVF_UNROLL
    for (int k = 0; k < kSumChunk / kSumLanes; ++k) {
        const int at = k * kSumLanes + 4 * static_cast<int>(lane_id());
        if (at < count) {
            f(at, count - at < 4 ? count - at : 4, lanes);
        }
    }
    return warp_sum((lanes[0] + lanes[1]) + (lanes[2] + lanes[3]));
}

// Up to four neighbours, in one access where they are four and aligned.
template <typename T>
PVF_DEVICE Vec<T, 4> load_neighbours(const T* from, int count) {
    if (count == 4 && reinterpret_cast<uintptr_t>(from) % alignof(Vec<T, 4>) == 0) {
        return load_vec_streaming<4>(from);
    }
    Vec<T, 4> out{};
    PVF_UNROLL
    for (int i = 0; i < 4; ++i) {
        if (i < count) {
            out[i] = load(from + i);
        }
    }
    return out;
}

template <typename T>
PVF_DEVICE void store_neighbours(T* to, int count, const Vec<T, 4>& values) {
    if (count == 4 && reinterpret_cast<uintptr_t>(to) % alignof(Vec<T, 4>) == 0) {
        store_vec(to, values);
        return;
    }
    PVF_UNROLL
    for (int i = 0; i < 4; ++i) {
        if (i < count) {
            store(to + i, values[i]);
        }
    }
}

// The sum of `count` chunk sums, in every lane of the warp.
PVF_DEVICE double warp_sum_of_sums(const double* sums, int64_t count) {
    double total = 0.0;
    for (int64_t first = 0; first < count; first += kSumChunk) {
        const int64_t left = count - first;
        total += warp_chunk_sum(static_cast<int>(left < kSumChunk ? left : kSumChunk),
                                [&](int at, int there, double (&lanes)[4]) {
                                    const auto some = load_neighbours(sums + first + at, there);
                                    PVF_UNROLL
                                    for (int i = 0; i < 4; ++i) {
                                        lanes[i] += some[i];
                                    }
                                });
    }
    return total;
}

}  // namespace pyvitfast::device
