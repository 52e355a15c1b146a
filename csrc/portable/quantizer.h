// Grids, scales and rounding of quantised weights: one definition for all ops and processors. Each
// function rounds exactly where it says, so that CPU, GPU and emulator give the same bits.
#pragma once

#include "portable/vec.h"

namespace pyvitfast {

PVF_HOST_DEVICE float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#else
    return __builtin_fmaf(a, b, c);
#endif
}

// A product that nvcc does not contract with a following sum.
PVF_HOST_DEVICE float product(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}
PVF_HOST_DEVICE double product(double a, double b) {
#if defined(__CUDA_ARCH__)
    return __dmul_rn(a, b);
#else
    return a * b;
#endif
}

PVF_HOST_DEVICE float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fdiv_rn(a, b);
#else
    return a / b;
#endif
}
PVF_HOST_DEVICE double quotient(double a, double b) { return a / b; }

enum class Grid : int32_t { kInteger = 0, kHalfInteger = 1, kSign = 2 };

// Codes low..high, and how far levels lie above them. The sign grid has the levels -1 and 1.
struct Levels {
    float low;
    float high;
    float shift;
    int32_t sign;
};

PVF_HOST_DEVICE Levels levels_of(Grid grid, int bits) {
    if (grid == Grid::kSign) {
        return {-1.0f, 1.0f, 0.0f, 1};
    }
    const auto half = static_cast<float>(1 << (bits - 1));
    return {-half, half - 1.0f, grid == Grid::kHalfInteger ? 0.5f : 0.0f, 0};
}

// Adding and taking away 1.5 * 2^(digits - 1) leaves the nearest integer, ties to even, and never
// -0; unlike rint it is two instructions everywhere. |x| is far below that.
PVF_HOST_DEVICE float nearest(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }
PVF_HOST_DEVICE double nearest(double x) { return (x + 0x1.8p52) - 0x1.8p52; }

// NaN stays NaN.
template <typename A>
PVF_HOST_DEVICE A clamped(A x, A low, A high) {
    const A above = x < low ? low : x;
    return above > high ? high : above;
}

// The level of `ratio` = weight / scale, in units of the scale.
template <bool kSign, typename A>
PVF_HOST_DEVICE A level_of(A ratio, const Levels& levels) {
    if constexpr (kSign) {
        const A level = ratio >= A(0) ? A(1) : A(-1);
        return ratio != ratio ? ratio : level;
    } else {
        const A shift = static_cast<A>(levels.shift);
        // Clamping first gives the same code, since the bounds are codes.
        return nearest(clamped(ratio - shift, static_cast<A>(levels.low),
                               static_cast<A>(levels.high))) +
               shift;
    }
}

// Which scale belongs to which element of a tensor read as rows of `cols`: one for all
// (groups == 0), else `groups` in a row, each for `group` neighbours.
struct ScaleLayout {
    const void* scales;
    int64_t cols;
    int64_t group;
    int64_t groups;
};

PVF_HOST_DEVICE int64_t scale_index(const ScaleLayout& layout, int64_t element) {
    if (layout.groups == 0) {
        return 0;
    }
    // A 64-bit division is a long subroutine on GPUs.
    if (element < int64_t{1} << 31 && layout.cols < int64_t{1} << 31) {
        const auto at = static_cast<uint32_t>(element);
        const uint32_t row = at / static_cast<uint32_t>(layout.cols);
        if (layout.groups == 1) {
            return row;
        }
        const uint32_t col = at - row * static_cast<uint32_t>(layout.cols);
        return row * layout.groups + col / static_cast<uint32_t>(layout.group);
    }
    const int64_t row = element / layout.cols;
    return row * layout.groups + (element - row * layout.cols) / layout.group;
}

// Elements that share a scale lie side by side: how many segments there are, where one begins and
// how long it is.
PVF_HOST_DEVICE int64_t segment_count(const ScaleLayout& layout, int64_t numel) {
    return layout.groups == 0 ? 1 : numel / layout.cols * layout.groups;
}
PVF_HOST_DEVICE int64_t segment_begin(const ScaleLayout& layout, int64_t segment) {
    if (layout.groups == 0) {
        return 0;
    }
    const int64_t row = segment / layout.groups;
    return row * layout.cols + (segment - row * layout.groups) * layout.group;
}
PVF_HOST_DEVICE int64_t segment_size(const ScaleLayout& layout, int64_t segment, int64_t numel) {
    if (layout.groups == 0) {
        return numel;
    }
    const int64_t col = segment % layout.groups * layout.group;
    return layout.cols - col < layout.group ? layout.cols - col : layout.group;
}
// The longest segment, the first of a row.
PVF_HOST_DEVICE int64_t segment_most(const ScaleLayout& layout, int64_t numel) {
    return layout.groups == 0 ? numel : layout.group < layout.cols ? layout.group : layout.cols;
}

// Sums are made of chunks of this many neighbours. Within a chunk lane j % 128 adds its elements in
// order, then four neighbouring lanes are added, then halves of the 32 that are left; chunk sums
// are added by the same rule, 1024 at a time, and what that leaves in order.
constexpr int kSumChunk = 1024;
constexpr int kSumLanes = 128;

}  // namespace pyvitfast
