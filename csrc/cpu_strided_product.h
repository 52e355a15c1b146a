#pragma once

// Matrix products of strided operands for the CPU kernels: blocks are copied into panels, a panel
// of b stays in the first-level cache while those of a pass by.

#include <cstdlib>

#include "cpu_matmul.h"
#include "portable/strided_product.h"

namespace pyvitfast::PVF_CPU_CAPABILITY {

constexpr int kPanelRows = kTallRows;
template <typename A>
constexpr int kPanelCols = kTallVectors * kWide<A>;
// So that a panel of b and one of a fit in the first-level cache together.
constexpr int64_t kPanelDepth = 160;
constexpr int64_t kBlockRows = 384;  // blocks fit in the second-level cache
constexpr int64_t kBlockCols = 768;

// Memory of this thread, kept for its next product as long as the thread lives.
template <typename A>
PVF_INLINE A* panel_memory() {
    static thread_local void* memory = nullptr;
    if (memory == nullptr) {
        memory = std::aligned_alloc(4096, (kBlockRows + kBlockCols) * kPanelDepth * sizeof(double));
    }
    return static_cast<A*>(memory);
}

// Eight rows of kWide neighbours each, to[k * width + r] = rows[r][k]: each of three rounds
// interleaves vectors that are four apart.
template <typename A>
PVF_INLINE void transpose(const A* const (&rows)[8], A* to, int64_t width) {
    constexpr int kLength = kWide<A>;
    typename WideOf<A>::index low{};
    typename WideOf<A>::index high{};
#pragma GCC unroll 16
    for (int lane = 0; lane < kLength; ++lane) {
        low[lane] = lane / 2 + lane % 2 * kLength;
        high[lane] = kLength / 2 + lane / 2 + lane % 2 * kLength;
    }
    Wide<A> now[8];
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) {
        now[r] = load_wide(rows[r]);
    }
#pragma GCC unroll 3
    for (int round = 0; round < 3; ++round) {
        Wide<A> next[8];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            next[2 * i] = __builtin_shuffle(now[i], now[i + 4], low);
            next[2 * i + 1] = __builtin_shuffle(now[i], now[i + 4], high);
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            now[i] = next[i];
        }
    }
    if (width == 8) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            store_unaligned(to + i * kLength, now[i]);
        }
        return;
    }
    A tile[8 * kLength];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        store_unaligned(tile + i * kLength, now[i]);
    }
    for (int k = 0; k < kLength; ++k) {
        std::memcpy(to + k * width, tile + k * 8, 8 * sizeof(A));
    }
}

// `count` rows of kWidth elements each side by side: to[k * kWidth + r] = from[rows[r] +
// depths[k]]. What is missing to kWidth rows becomes 0.
template <int kWidth, typename A>
PVF_INLINE void pack(const A* from, const int64_t* rows, int count, const int64_t* depths,
                     int64_t depth, A* to) {
    bool together = count == kWidth;
    for (int r = 1; r < count; ++r) {
        together = together && rows[r] == rows[r - 1] + 1;
    }
    if (together) {
        for (int64_t k = 0; k < depth; ++k) {
            std::memcpy(to + k * kWidth, from + rows[0] + depths[k], kWidth * sizeof(A));
        }
        return;
    }
    if (count < kWidth) {
        for (int64_t k = 0; k < depth; ++k) {
            for (int r = count; r < kWidth; ++r) {
                to[k * kWidth + r] = A(0);
            }
        }
    }
    for (int64_t k = 0; k < depth;) {
        int64_t end = k + 1;
        while (end < depth && depths[end] == depths[end - 1] + 1) {
            ++end;
        }
        int first = 0;
        for (; first + 8 <= count; first += 8) {
            const A* eight[8];
            for (int r = 0; r < 8; ++r) {
                eight[r] = from + rows[first + r] + depths[k];
            }
            int64_t at = k;
            for (; at + kWide<A> <= end; at += kWide<A>) {
                transpose(eight, to + at * kWidth + first, kWidth);
                for (int r = 0; r < 8; ++r) {
                    eight[r] += kWide<A>;
                }
            }
            for (; at < end; ++at) {
                for (int r = 0; r < 8; ++r) {
                    to[at * kWidth + first + r] = *eight[r]++;
                }
            }
        }
        for (int64_t at = k; at < end; ++at) {
            for (int r = first; r < count; ++r) {
                to[at * kWidth + r] = from[rows[r] + depths[at]];
            }
        }
        k = end;
    }
}

// The product of a panel of a and the first kVectors vectors of one of b. With `kAhead` a line from
// `ahead` on is asked for at each step.
template <typename A, bool kAhead = false, int kVectors = kTallVectors>
PVF_INLINE void multiply_panels(const A* a, const A* b, int64_t depth,
                                Wide<A> (&sums)[kPanelRows][kTallVectors],
                                const char* ahead = nullptr) {
#pragma GCC unroll 8
    for (int r = 0; r < kPanelRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kTallVectors; ++v) {
            sums[r][v] = Wide<A>{};
        }
    }
    for (int64_t k = 0; k < depth; ++k) {
        if constexpr (kAhead) {
            __builtin_prefetch(ahead + k * 64, 0, 2);
        }
        Wide<A> right[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            right[v] = load_wide(b + v * kWide<A>);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kPanelRows; ++r) {
            const Wide<A> left = a[r] - Wide<A>{};
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                sums[r][v] = multiply_add(left, right[v], sums[r][v]);
            }
        }
        a += kPanelRows;
        b += kPanelCols<A>;
    }
}

template <typename A>
static void product_part(const StridedProduct& p, int64_t batch, int64_t rows_begin,
                         int64_t rows_end, int64_t cols_begin, int64_t cols_end) {
    constexpr int kCols = kPanelCols<A>;
    A* const left = panel_memory<A>();
    A* const right = left + kBlockRows * kPanelDepth;
    const A* a = static_cast<const A*>(p.a.data) + place_of(p.a.batch, p.batch, batch);
    const A* b = static_cast<const A*>(p.b.data) + place_of(p.b.batch, p.batch, batch);
    A* c = static_cast<A*>(p.c.data) + place_of(p.c.batch, p.batch, batch);
    int64_t at_depth[kPanelDepth];
    const int64_t chunks = (p.depth.size + kPanelDepth - 1) / kPanelDepth;
    const int64_t step = chunks > 0 ? (p.depth.size + chunks - 1) / chunks : 1;
    for (int64_t j0 = cols_begin; j0 < cols_end; j0 += kBlockCols) {
        const int64_t j1 = cols_end < j0 + kBlockCols ? cols_end : j0 + kBlockCols;
        for (int64_t k0 = 0; k0 < p.depth.size || k0 == 0; k0 += step) {
            const int64_t depth = p.depth.size - k0 < step ? p.depth.size - k0 : step;
            const bool onto = p.accumulate || k0 > 0;
            for (int64_t k = 0; k < depth; ++k) {
                at_depth[k] = place_of(p.b.row, p.depth, k0 + k);
            }
            int64_t at[kCols > kPanelRows ? kCols : kPanelRows];
            for (int64_t j = j0; j < j1; j += kCols) {
                const int count = static_cast<int>(j1 - j < kCols ? j1 - j : kCols);
                for (int r = 0; r < count; ++r) {
                    at[r] = place_of(p.b.col, p.cols, j + r);
                }
                pack<kCols>(b, at, count, at_depth, depth, right + (j - j0) * kPanelDepth);
            }
            for (int64_t k = 0; k < depth; ++k) {
                at_depth[k] = place_of(p.a.col, p.depth, k0 + k);
            }
            for (int64_t i0 = rows_begin; i0 < rows_end; i0 += kBlockRows) {
                const int64_t i1 = rows_end < i0 + kBlockRows ? rows_end : i0 + kBlockRows;
                for (int64_t i = i0; i < i1; i += kPanelRows) {
                    const int count = static_cast<int>(i1 - i < kPanelRows ? i1 - i : kPanelRows);
                    for (int r = 0; r < count; ++r) {
                        at[r] = place_of(p.a.row, p.rows, i + r);
                    }
                    pack<kPanelRows>(a, at, count, at_depth, depth, left + (i - i0) * kPanelDepth);
                }
                for (int64_t j = j0; j < j1; j += kCols) {
                    const int cols = static_cast<int>(j1 - j < kCols ? j1 - j : kCols);
                    bool together = cols == kCols;
                    for (int r = 0; r < cols; ++r) {
                        at[r] = place_of(p.c.col, p.cols, j + r);
                        together = together && at[r] == at[0] + r;
                    }
                    for (int64_t i = i0; i < i1; i += kPanelRows) {
                        const int rows =
                            static_cast<int>(i1 - i < kPanelRows ? i1 - i : kPanelRows);
                        Wide<A> sums[kPanelRows][kTallVectors];
                        const A* const panel = left + (i - i0) * kPanelDepth;
                        const A* const other = right + (j - j0) * kPanelDepth;
                        if (cols <= kWide<A>) {
                            multiply_panels<A, false, 1>(panel, other, depth, sums);
                        } else {
                            multiply_panels<A>(panel, other, depth, sums);
                        }
                        if (together && rows == kPanelRows) {
#pragma GCC unroll 8
                            for (int r = 0; r < kPanelRows; ++r) {
                                A* to = c + place_of(p.c.row, p.rows, i + r) + at[0];
#pragma GCC unroll 4
                                for (int v = 0; v < kTallVectors; ++v) {
                                    A* place = to + v * kWide<A>;
                                    store_unaligned(
                                        place, onto ? load_wide(place) + sums[r][v] : sums[r][v]);
                                }
                            }
                            continue;
                        }
                        A tile[kPanelRows][kCols];
#pragma GCC unroll 8
                        for (int r = 0; r < kPanelRows; ++r) {
#pragma GCC unroll 4
                            for (int v = 0; v < kTallVectors; ++v) {
                                store_unaligned(&tile[r][v * kWide<A>], sums[r][v]);
                            }
                        }
                        for (int r = 0; r < rows; ++r) {
                            A* to = c + place_of(p.c.row, p.rows, i + r);
                            for (int s = 0; s < cols; ++s) {
                                to[at[s]] = onto ? to[at[s]] + tile[r][s] : tile[r][s];
                            }
                        }
                    }
                }
            }
        }
    }
}

static void strided_product_part(const StridedProduct& p, int64_t batch, int64_t rows_begin,
                                 int64_t rows_end, int64_t cols_begin, int64_t cols_end) {
    const auto run = p.wide ? product_part<double> : product_part<float>;
    run(p, batch, rows_begin, rows_end, cols_begin, cols_end);
}

}  // namespace pyvitfast::PVF_CPU_CAPABILITY
