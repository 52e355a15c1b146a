#pragma once

// Small matrix products for the CPU kernels, in float or double and in vectors as wide as the
// instruction set has. Everything is always_inline, as in cpu_vector.h.

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "cpu_vector.h"

namespace pyvitfast::PVF_CPU_CAPABILITY {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kVectorsPerTile = 4;  // of 32 registers: 6 x 4 sums, 4 operands, a broadcast
constexpr int kTallVectors = 3;     // 8 x 3 sums, 3 operands, a broadcast
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kVectorsPerTile = 2;  // of 16 registers: 6 x 2 sums, 2 operands, a broadcast
constexpr int kTallVectors = 2;
#else
constexpr int kVectorBytes = 16;
constexpr int kVectorsPerTile = 2;
constexpr int kTallVectors = 2;
#endif
constexpr int kRowsPerTile = 6;
constexpr int kTallRows = 8;

using WideFloats = float __attribute__((vector_size(kVectorBytes)));
using WideDoubles = double __attribute__((vector_size(kVectorBytes)));
using WideInts = int32_t __attribute__((vector_size(kVectorBytes)));
using WideLongs = int64_t __attribute__((vector_size(kVectorBytes)));

template <typename A>
struct WideOf;
template <>
struct WideOf<float> {
    using type = WideFloats;
    using index = WideInts;
};
template <>
struct WideOf<double> {
    using type = WideDoubles;
    using index = WideLongs;
};
template <typename A>
using Wide = typename WideOf<A>::type;
template <typename A>
constexpr int kWide = kVectorBytes / static_cast<int>(sizeof(A));

// By name: the compiler may not contract by itself, see CMakeLists.txt.
PVF_INLINE WideFloats multiply_add(WideFloats a, WideFloats b, WideFloats c) {
#if defined(__AVX512F__)
    return reinterpret_cast<WideFloats>(_mm512_fmadd_ps(
        reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
    return reinterpret_cast<WideFloats>(_mm256_fmadd_ps(
        reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
    return a * b + c;
#endif
}

PVF_INLINE WideDoubles multiply_add(WideDoubles a, WideDoubles b, WideDoubles c) {
#if defined(__AVX512F__)
    return reinterpret_cast<WideDoubles>(_mm512_fmadd_pd(
        reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b), reinterpret_cast<__m512d>(c)));
#elif defined(__FMA__)
    return reinterpret_cast<WideDoubles>(_mm256_fmadd_pd(
        reinterpret_cast<__m256d>(a), reinterpret_cast<__m256d>(b), reinterpret_cast<__m256d>(c)));
#else
    return a * b + c;
#endif
}

template <typename A>
PVF_INLINE Wide<A> load_wide(const A* from) {
    return load_unaligned<Wide<A>>(from);
}

// The sums of kCount vectors side by side in one: neighbours are folded in half and joined, level
// by level. At each level a vector holds the folded remains, kCount lanes each, of several.
template <typename A, int kCount>
PVF_INLINE Wide<A> sums_of(const Wide<A>* vectors) {
    if constexpr (kCount == 1) {
        return vectors[0];
    } else {
        constexpr int kHeld = kWide<A> / kCount;
        constexpr int kHalf = kCount / 2;
        typename WideOf<A>::index low{};
        typename WideOf<A>::index high{};
#pragma GCC unroll 16
        for (int lane = 0; lane < kWide<A>; ++lane) {
            const int from = lane / kHalf;
            const int begin = from < kHeld ? from * kCount : kWide<A> + (from - kHeld) * kCount;
            low[lane] = begin + lane % kHalf;
            high[lane] = begin + lane % kHalf + kHalf;
        }
        Wide<A> joined[kHalf];
#pragma GCC unroll 16
        for (int i = 0; i < kHalf; ++i) {
            joined[i] = __builtin_shuffle(vectors[2 * i], vectors[2 * i + 1], low) +
                        __builtin_shuffle(vectors[2 * i], vectors[2 * i + 1], high);
        }
        return sums_of<A, kHalf>(joined);
    }
}

template <typename A, int kStep = kWide<A> / 2>
PVF_INLINE A sum_of(Wide<A> vector) {
    if constexpr (kStep == 0) {
        return vector[0];
    } else {
        typename WideOf<A>::index other{};
#pragma GCC unroll 16
        for (int lane = 0; lane < kWide<A>; ++lane) {
            other[lane] = lane ^ kStep;
        }
        return sum_of<A, kStep / 2>(vector + __builtin_shuffle(vector, other));
    }
}

// What will be read later, asked for line by line while something else is computed. In order of
// addresses, because only that wakes the hardware's second-level prefetcher, which has three times
// the bandwidth of prefetch instructions.
struct Stream {
    const char* at = nullptr;
    const char* end = nullptr;

    // The data of a task is from `begin` to `end`; what was asked for before is not asked for
    // again.
    __attribute__((always_inline)) void cover(const void* first, const void* past) {
        const char* begin = static_cast<const char*>(first);
        end = static_cast<const char*>(past);
        at = at < begin || at > end ? begin : at;
    }
    template <int kLines>
    __attribute__((always_inline)) void advance() {
#pragma GCC unroll 16
        for (int line = 0; line < kLines; ++line) {
            __builtin_prefetch(at + line * 64, 0, 2);
        }
        at = at + kLines * 64 < end ? at + kLines * 64 : end;
    }
};

// out[j][i] = left row j . row i, for `left_count` left rows, kLeft at most, and `count` rows,
// kWide at most. Rows that are not there repeat the last one and are not stored.
template <typename A, int kLeft, int kLines>
PVF_INLINE void dot_rows(const A* rows, int64_t row_stride, int64_t count, const A* left,
                         int64_t left_stride, int64_t left_count, int64_t k, A* out,
                         int64_t out_stride, Stream& stream) {
    constexpr int kLength = kWide<A>;
    constexpr int kRows = kLength / kLeft;
    for (int64_t first = 0; first < kLength && first < count; first += kRows) {
        const A* row[kRows];
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
            row[i] = rows + (first + i < count ? first + i : count - 1) * row_stride;
        }
        const A* other_row[kLeft];
#pragma GCC unroll 4
        for (int j = 0; j < kLeft; ++j) {
            other_row[j] = left + (j < left_count ? j : left_count - 1) * left_stride;
        }
        Wide<A> sums[kLength] = {};
        const int64_t whole = k / kLength * kLength;
        if constexpr (kLeft == 1) {
            // Row after row, as they lie in memory: there is too little to compute to wait for it.
#pragma GCC unroll 16
            for (int i = 0; i < kRows; ++i) {
                Wide<A> parts[4] = {};
                int64_t at = 0;
                for (; at + 4 * kLength <= k; at += 4 * kLength) {
#pragma GCC unroll 4
                    for (int s = 0; s < 4; ++s) {
                        parts[s] = multiply_add(load_wide(row[i] + at + s * kLength),
                                                load_wide(left + at + s * kLength), parts[s]);
                    }
                }
                for (; at < whole; at += kLength) {
                    parts[0] = multiply_add(load_wide(row[i] + at), load_wide(left + at), parts[0]);
                }
                sums[i] = (parts[0] + parts[1]) + (parts[2] + parts[3]);
            }
        } else {
            Stream ahead = stream;
            for (int64_t at = 0; at < whole; at += kLength) {
                ahead.advance<kLines>();
                Wide<A> other[kLeft];
#pragma GCC unroll 4
                for (int j = 0; j < kLeft; ++j) {
                    other[j] = load_wide(other_row[j] + at);
                }
#pragma GCC unroll 16
                for (int i = 0; i < kRows; ++i) {
                    const Wide<A> mine = load_wide(row[i] + at);
#pragma GCC unroll 4
                    for (int j = 0; j < kLeft; ++j) {
                        sums[j * kRows + i] = multiply_add(mine, other[j], sums[j * kRows + i]);
                    }
                }
            }
            stream = ahead;
        }
        A totals[kLength];
        store_unaligned(totals, sums_of<A, kLength>(sums));
        for (int64_t rest = whole; rest < k; ++rest) {
            for (int t = 0; t < kLength; ++t) {
                totals[t] += row[t % kRows][rest] * other_row[t / kRows][rest];
            }
        }
        const int64_t present = count - first < kRows ? count - first : kRows;
        for (int j = 0; j < kLeft && j < left_count; ++j) {
            if (present == kRows) {
                std::memcpy(out + j * out_stride + first, totals + j * kRows, sizeof(A) * kRows);
            } else {
                for (int64_t i = 0; i < present; ++i) {
                    out[j * out_stride + first + i] = totals[j * kRows + i];
                }
            }
        }
    }
}

// out[j][i] = left row j . row i, for all left rows; `count` is kWide at most.
template <typename A>
PVF_INLINE void dot(const A* rows, int64_t row_stride, int64_t count, const A* left,
                    int64_t left_stride, int64_t left_count, int64_t k, A* out, int64_t out_stride,
                    Stream& stream) {
    int64_t j = 0;
    // Passes of kLeft left rows, while at least kLeast of them are left.
    const auto pass = [&]<int kLeft, int kLeast>(std::integer_sequence<int, kLeft, kLeast>) {
        for (; j + kLeast <= left_count; j += kLeft) {
            const A* part = left + j * left_stride;
            const int64_t present = left_count - j;
            A* to = out + j * out_stride;
            if (j == 0) {
                // The first pass brings the rows in; with few left rows there is little else to do.
                constexpr int kLines = kLeft == 1 ? kWide<A> : kWide<A> / kLeft / 2;
                dot_rows<A, kLeft, (kLines > 0 ? kLines : 1)>(
                    rows, row_stride, count, part, left_stride, present, k, to, out_stride, stream);
            } else {
                dot_rows<A, kLeft, 2>(rows, row_stride, count, part, left_stride, present, k, to,
                                      out_stride, stream);
            }
        }
    };
    if constexpr (kWide<A> >= 16) {
        pass(std::integer_sequence<int, 4, 3>{});
    }
    if constexpr (kWide<A> >= 4) {
        pass(std::integer_sequence<int, 2, 2>{});
    }
    pass(std::integer_sequence<int, 1, 1>{});
}

// A factor [m, k] of single values anywhere in memory.
template <typename A>
struct Scalars {
    const A* data;
    int64_t row;
    int64_t col;
};

template <typename A, int kRows, int kVectors>
PVF_INLINE void outer_tile(Scalars<A> left, const A* right, int64_t right_stride, int64_t k, A* out,
                           int64_t out_stride, bool add, Stream& stream) {
    Wide<A> sums[kRows][kVectors] = {};
    if (add) {
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                sums[i][v] = load_wide(out + i * out_stride + v * kWide<A>);
            }
        }
    }
    Stream ahead = stream;
    for (int64_t at = 0; at < k; ++at) {
        ahead.advance<2>();
        Wide<A> vectors[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            vectors[v] = load_wide(right + at * right_stride + v * kWide<A>);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
            const Wide<A> scalar = left.data[i * left.row + at * left.col] - Wide<A>{};
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                sums[i][v] = multiply_add(scalar, vectors[v], sums[i][v]);
            }
        }
    }
    stream = ahead;
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            store_unaligned(out + i * out_stride + v * kWide<A>, sums[i][v]);
        }
    }
}

// Rows [0, m) of kVectors vectors, in groups of nearly equal size.
template <typename A, int kVectors, int kMostRows>
PVF_INLINE void outer_column(Scalars<A> left, const A* right, int64_t right_stride, int64_t m,
                             int64_t k, A* out, int64_t out_stride, bool add, Stream& stream) {
    const int64_t groups = (m + kMostRows - 1) / kMostRows;
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t begin = m * group / groups;
        const int64_t rows = m * (group + 1) / groups - begin;
        const Scalars<A> part{left.data + begin * left.row, left.row, left.col};
        A* target = out + begin * out_stride;
        const auto tile = [&]<int kRows>(std::integral_constant<int, kRows>) {
            if (rows == kRows) {
                outer_tile<A, kRows, kVectors>(part, right, right_stride, k, target, out_stride,
                                               add, stream);
            }
        };
        const auto tiles = [&]<int... kRows>(std::integer_sequence<int, kRows...>) {
            (tile(std::integral_constant<int, kRows + 1>{}), ...);
        };
        tiles(std::make_integer_sequence<int, kMostRows>{});
    }
}

// out = left [m, k] @ right [k, n], or added to it. Rows of `right` and `out` are dense.
template <typename A>
static void outer(Scalars<A> left, const A* right, int64_t right_stride, int64_t m, int64_t n,
                  int64_t k, A* out, int64_t out_stride, bool add, Stream& stream) {
    int64_t col = 0;
    const auto columns =
        [&]<int kVectors, int kMostRows>(std::integer_sequence<int, kVectors, kMostRows>) {
            for (; col + kVectors * kWide<A> <= n; col += kVectors * kWide<A>) {
                outer_column<A, kVectors, kMostRows>(left, right + col, right_stride, m, k,
                                                     out + col, out_stride, add, stream);
            }
        };
    // Taller tiles where they save a pass over the right factor and enough columns make up for the
    // last.
    if (kTallVectors < kVectorsPerTile && n >= 8 * kWide<A> &&
        (m + kTallRows - 1) / kTallRows < (m + kRowsPerTile - 1) / kRowsPerTile) {
        columns(std::integer_sequence<int, kTallVectors, kTallRows>{});
    } else {
        columns(std::integer_sequence<int, kVectorsPerTile, kRowsPerTile>{});
    }
    columns(std::integer_sequence<int, 1, kTallRows>{});
    for (; col < n; ++col) {
        for (int64_t i = 0; i < m; ++i) {
            A total = add ? out[i * out_stride + col] : A(0);
            for (int64_t at = 0; at < k; ++at) {
                total += left.data[i * left.row + at * left.col] * right[at * right_stride + col];
            }
            out[i * out_stride + col] = total;
        }
    }
}

// exp(x) for x that is not positive, or NaN; relative error below 2e-7, or 4e-7 for the least,
// and 0 where it would be subnormal. x = n ln 2 + r, then the polynomial for e^r of least error.
PVF_INLINE WideFloats exp_of(WideFloats x) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    constexpr float kLeast = -87.0f;
    const WideFloats shifted = multiply_add(x, 1.44269504f - WideFloats{}, kRound - WideFloats{});
    const WideFloats whole = shifted - kRound;
#if defined(__FMA__)
    const WideFloats r = multiply_add(whole, -0.693147182f - WideFloats{}, x);
#else
    // The first product is exact, as both are where the addition rounds once.
    WideFloats r = multiply_add(whole, -0.693359375f - WideFloats{}, x);
    r = multiply_add(whole, 2.12194440e-4f - WideFloats{}, r);
#endif
    WideFloats p = 8.290306227e-3f - WideFloats{};
    for (const float term : {4.189797556e-2f, 0.1666763658f, 0.4999914919f, 0.9999997070f, 1.0f}) {
        p = multiply_add(p, r, term - WideFloats{});
    }
#if defined(__AVX512F__)
    const __m512 from = reinterpret_cast<__m512>(x);
    const __mmask16 kept = _mm512_cmp_ps_mask(from, _mm512_set1_ps(kLeast), _CMP_NLT_UQ);
    return reinterpret_cast<WideFloats>(
        _mm512_maskz_scalef_ps(kept, reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(whole)));
#else
    const WideInts exponent = reinterpret_cast<WideInts>(shifted) << 23;
    const WideFloats value = reinterpret_cast<WideFloats>(reinterpret_cast<WideInts>(p) + exponent);
    const WideInts tiny = x < kLeast;
    const WideFloats kept = reinterpret_cast<WideFloats>(reinterpret_cast<WideInts>(value) & ~tiny);
    return x == x ? kept : x;
#endif
}

PVF_INLINE WideDoubles exp_of(WideDoubles x) {
    for (int lane = 0; lane < kWide<double>; ++lane) {
        x[lane] = std::exp(x[lane]);
    }
    return x;
}

}  // namespace pyvitfast::PVF_CPU_CAPABILITY
