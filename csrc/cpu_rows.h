#pragma once

// Rows of tensors in the CPU kernels: conversion, LayerNorm, and memory to work in.

#include <cstdlib>

#include "cpu_matmul.h"
#include "float_type.h"
#include "portable/layer_norm.h"

namespace pyvitfast::PVF_CPU_CAPABILITY {

// Working memory of a range of tasks. Memory that no task touches is never asked for: large blocks
// come from the system, page by page.
template <typename A>
class Scratch {
   public:
    Scratch() = default;
    explicit Scratch(int64_t count) { reserve(count); }
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    A* reserve(int64_t count) {
        if (count > count_) {
            std::free(data_);
            data_ = static_cast<A*>(std::aligned_alloc(64, (count * sizeof(A) + 63) / 64 * 64));
            count_ = count;
        }
        return data_;
    }
    A* data() const { return data_; }

   private:
    A* data_ = nullptr;
    int64_t count_ = 0;
};

template <typename A, typename T>
PVF_INLINE void widen_row(const T* from, int64_t count, A* to) {
    int64_t i = 0;
    if constexpr (sizeof(T) == 2) {
        for (; i + kLanes <= count; i += kLanes) {
            store_unaligned(to + i, load_floats(from + i));
        }
    }
    for (; i < count; ++i) {
        to[i] = static_cast<A>(to_float(from[i]));
    }
}

template <typename A, typename T>
PVF_INLINE void narrow_row(const A* from, int64_t count, T* to) {
    for (int64_t i = 0; i < count; ++i) {
        to[i] = from_float<T>(static_cast<Accumulate<T>>(from[i]));
    }
}

template <typename A>
struct Moments {
    A mean;
    A rstd;
};

// In two passes: the variance of a row with a large mean would be lost in one.
template <typename A>
PVF_INLINE Moments<A> moments_of(const A* row, int64_t count, double eps) {
    constexpr int kSums = 4;
    const auto summed = [&](const auto& of) {
        Wide<A> sums[kSums] = {};
        int64_t i = 0;
        for (; i + kSums * kWide<A> <= count; i += kSums * kWide<A>) {
#pragma GCC unroll 4
            for (int s = 0; s < kSums; ++s) {
                sums[s] = of(load_wide(row + i + s * kWide<A>), sums[s]);
            }
        }
        for (; i + kWide<A> <= count; i += kWide<A>) {
            sums[0] = of(load_wide(row + i), sums[0]);
        }
        A total = sum_of<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
        for (; i < count; ++i) {
            total += of(row[i] - Wide<A>{}, Wide<A>{})[0];
        }
        return total;
    };
    const A mean = summed([](Wide<A> x, Wide<A> sum) { return sum + x; }) / static_cast<A>(count);
    const A variance =
        summed([&](Wide<A> x, Wide<A> sum) { return multiply_add(x - mean, x - mean, sum); }) /
        static_cast<A>(count);
    return {mean, A(1) / std::sqrt(variance + static_cast<A>(eps))};
}

template <typename A>
PVF_INLINE void normalize_row(const A* from, int64_t count, Moments<A> moments, A* to) {
    int64_t i = 0;
    for (; i + kWide<A> <= count; i += kWide<A>) {
        store_unaligned(to + i, (load_wide(from + i) - moments.mean) * moments.rstd);
    }
    for (; i < count; ++i) {
        to[i] = (from[i] - moments.mean) * moments.rstd;
    }
}

// A row normalised by its moments: those kept in `mean` and `rstd`, or its own, which are kept
// where these are not null.
template <bool kKnown, typename A>
PVF_INLINE void hat_of(const A* row, int64_t count, double eps, A* mean, A* rstd, A* to) {
    Moments<A> moments;
    if constexpr (kKnown) {
        moments = {*mean, *rstd};
    } else {
        moments = moments_of(row, count, eps);
        if (mean != nullptr) {
            *mean = moments.mean;
            *rstd = moments.rstd;
        }
    }
    normalize_row(row, count, moments, to);
}

template <typename A>
PVF_INLINE A dot_of(const A* a, const A* b, int64_t count) {
    Wide<A> sums = {};
    int64_t i = 0;
    for (; i + kWide<A> <= count; i += kWide<A>) {
        sums = multiply_add(load_wide(a + i), load_wide(b + i), sums);
    }
    A total = sum_of<A>(sums);
    for (; i < count; ++i) {
        total += a[i] * b[i];
    }
    return total;
}

// The slope of a row before LayerNorm, in place of that after it.
template <typename A>
PVF_INLINE void norm_backward(A* slope, const A* hat, A rstd, int64_t count) {
    Wide<A> sums = {};
    Wide<A> products = {};
    int64_t i = 0;
    for (; i + kWide<A> <= count; i += kWide<A>) {
        sums += load_wide(slope + i);
        products = multiply_add(load_wide(slope + i), load_wide(hat + i), products);
    }
    A mean_slope = sum_of<A>(sums);
    A mean_product = sum_of<A>(products);
    for (; i < count; ++i) {
        mean_slope += slope[i];
        mean_product += slope[i] * hat[i];
    }
    mean_slope /= static_cast<A>(count);
    mean_product /= static_cast<A>(count);
    for (i = 0; i < count; ++i) {
        slope[i] = norm_slope(slope[i], hat[i], rstd, mean_slope, mean_product);
    }
}

}  // namespace pyvitfast::PVF_CPU_CAPABILITY
