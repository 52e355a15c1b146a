#pragma once

// Matrix products of strided operands on CUDA: a block of 256 threads computes a tile, each thread
// two by two groups of 16 bytes' worth of rows and columns.

#include "portable/device.h"
#include "portable/launch_result.h"
#include "portable/strided_product.h"

namespace pyvitfast {

using namespace device;

namespace {

constexpr int kProductThreads = 256;
constexpr int kProductSide = 16;  // threads along a side of a tile
constexpr int kProductDepth = 8;
template <typename T>
constexpr int kProductGroup = 16 / static_cast<int>(sizeof(T));
template <typename T>
constexpr int kProductTile = 2 * kProductSide * kProductGroup<T>;

// Sizes are below 2^31, so that a division takes 32 bits.
PVF_DEVICE int64_t quick_place(const Stride& stride, const Extent& extent, int i) {
    if (extent.size == extent.block) {
        return i * stride.inner;
    }
    const unsigned block = static_cast<unsigned>(extent.block);
    const unsigned outer = static_cast<unsigned>(i) / block;
    return outer * stride.outer + (static_cast<unsigned>(i) - outer * block) * stride.inner;
}

// What a thread brings of one operand: `side` runs along the tile, `depth` along the sum.
template <typename T>
struct ProductLoader {
    static constexpr int kCount = kProductTile<T> * kProductDepth / kProductThreads;
    static constexpr int kStride = kProductTile<T> + kProductGroup<T>;
    const T* from[kCount];
    int depth[kCount];
    int side[kCount];
    bool inside[kCount];
    Stride step;

    PVF_DEVICE void start(const void* data, const Stride& side_stride, const Extent& side_extent,
                          const Stride& depth_stride, int64_t batch, int first) {
        step = depth_stride;
        const int thread = static_cast<int>(thread_idx().x);
        // Neighbouring threads take neighbours in memory.
        const bool along_depth = depth_stride.inner == 1 && side_stride.inner != 1;
        PVF_UNROLL
        for (int e = 0; e < kCount; ++e) {
            const int index = e * kProductThreads + thread;
            depth[e] = along_depth ? index % kProductDepth : index / kProductTile<T>;
            side[e] = along_depth ? index / kProductDepth : index % kProductTile<T>;
            inside[e] = first + side[e] < side_extent.size;
            from[e] = static_cast<const T*>(data) + batch +
                      (inside[e] ? quick_place(side_stride, side_extent, first + side[e]) : 0);
        }
    }

    PVF_DEVICE void bring(const Extent& extent, int k0, T (&values)[kCount]) const {
        PVF_UNROLL
        for (int e = 0; e < kCount; ++e) {
            const int k = k0 + depth[e];
            values[e] =
                inside[e] && k < extent.size ? load(from[e] + quick_place(step, extent, k)) : T(0);
        }
    }

    PVF_DEVICE void keep(T* shared, const T (&values)[kCount]) const {
        PVF_UNROLL
        for (int e = 0; e < kCount; ++e) {
            store_shared(shared + depth[e] * kStride + side[e], values[e]);
        }
    }
};

template <typename T>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kProductThreads, 1)
    strided_product_kernel(const __grid_constant__ StridedProduct p) {
    constexpr int kGroup = kProductGroup<T>;
    constexpr int kEach = 2 * kGroup;
    constexpr int kTile = kProductTile<T>;
    constexpr int kStride = ProductLoader<T>::kStride;
    constexpr int kShared = kProductDepth * kStride;
    PVF_SHARED(T, lefts, 2 * kShared);
    PVF_SHARED(T, rights, 2 * kShared);
    const int row_tiles = static_cast<int>((p.rows.size + kTile - 1) / kTile);
    const int col_tiles = static_cast<int>((p.cols.size + kTile - 1) / kTile);
    const int tile = static_cast<int>(block_idx().x) % (row_tiles * col_tiles);
    const int batch = static_cast<int>(block_idx().x) / (row_tiles * col_tiles);
    const int first_row = tile % row_tiles * kTile;
    const int first_col = tile / row_tiles * kTile;
    const int across = static_cast<int>(thread_idx().x) % kProductSide;
    const int down = static_cast<int>(thread_idx().x) / kProductSide;

    ProductLoader<T> left;
    ProductLoader<T> right;
    left.start(p.a.data, p.a.row, p.rows, p.a.col, quick_place(p.a.batch, p.batch, batch),
               first_row);
    right.start(p.b.data, p.b.col, p.cols, p.b.row, quick_place(p.b.batch, p.batch, batch),
                first_col);
    T left_values[ProductLoader<T>::kCount];
    T right_values[ProductLoader<T>::kCount];
    T sums[kEach][kEach];
    PVF_UNROLL
    for (int i = 0; i < kEach; ++i) {
        PVF_UNROLL
        for (int j = 0; j < kEach; ++j) {
            sums[i][j] = T(0);
        }
    }
    const int depth = static_cast<int>(p.depth.size);
    left.bring(p.depth, 0, left_values);
    right.bring(p.depth, 0, right_values);
    PVF_NO_UNROLL
    for (int k0 = 0, turn = 0; k0 < depth; k0 += kProductDepth, turn ^= 1) {
        T* const mine = lefts + turn * kShared;
        T* const other = rights + turn * kShared;
        left.keep(mine, left_values);
        right.keep(other, right_values);
        sync_threads();
        if (k0 + kProductDepth < depth) {
            left.bring(p.depth, k0 + kProductDepth, left_values);
            right.bring(p.depth, k0 + kProductDepth, right_values);
        }
        PVF_UNROLL
        for (int k = 0; k < kProductDepth; ++k) {
            Vec<T, kGroup> rows[2];
            Vec<T, kGroup> cols[2];
            PVF_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int at = k * kStride + half * kTile / 2;
                rows[half] = load_shared_vec<kGroup>(mine + at + down * kGroup);
                cols[half] = load_shared_vec<kGroup>(other + at + across * kGroup);
            }
            PVF_UNROLL
            for (int i = 0; i < kEach; ++i) {
                PVF_UNROLL
                for (int j = 0; j < kEach; ++j) {
                    sums[i][j] += rows[i / kGroup][i % kGroup] * cols[j / kGroup][j % kGroup];
                }
            }
        }
    }
    T* const out = static_cast<T*>(p.c.data) + quick_place(p.c.batch, p.batch, batch);
    PVF_UNROLL
    for (int j = 0; j < kEach; j += kGroup) {
        const int col = first_col + j / kGroup * kTile / 2 + across * kGroup;
        // Groups do not straddle blocks, whose length divides by four in any real network.
        const bool together =
            p.c.col.inner == 1 && p.cols.block % kGroup == 0 && col + kGroup <= p.cols.size;
        PVF_UNROLL
        for (int i = 0; i < kEach; ++i) {
            const int row = first_row + i / kGroup * kTile / 2 + down * kGroup + i % kGroup;
            if (row >= p.rows.size || col >= p.cols.size) {
                continue;
            }
            T* const to = out + quick_place(p.c.row, p.rows, row);
            T* const place = to + quick_place(p.c.col, p.cols, col);
            if (together && reinterpret_cast<std::uintptr_t>(place) % 16 == 0) {
                Vec<T, kGroup> values;
                if (p.accumulate) {
                    values = load_vec<kGroup>(static_cast<const T*>(place));
                }
                PVF_UNROLL
                for (int e = 0; e < kGroup; ++e) {
                    values[e] = p.accumulate ? values[e] + sums[i][j + e] : sums[i][j + e];
                }
                store_vec(place, values);
            } else {
                PVF_UNROLL
                for (int e = 0; e < kGroup; ++e) {
                    if (col + e < p.cols.size) {
                        T* const one = to + quick_place(p.c.col, p.cols, col + e);
                        store(one, p.accumulate ? load(one) + sums[i][j + e] : sums[i][j + e]);
                    }
                }
            }
        }
    }
}

template <typename T>
const char* launch_strided_product_of(const StridedProduct& p, void* stream) {
    constexpr int64_t kTile = kProductTile<T>;
    const int64_t tiles = (p.rows.size + kTile - 1) / kTile * ((p.cols.size + kTile - 1) / kTile);
    const Dim3 grid{static_cast<unsigned>(tiles * p.batch.size), 1, 1};
    return launch_result(launch(strided_product_kernel<T>, grid, Dim3{kProductThreads, 1, 1}, 0,
                                as_stream(stream), p));
}

const char* launch_strided_product(const StridedProduct& p, void* stream) {
    return p.wide ? launch_strided_product_of<double>(p, stream)
                  : launch_strided_product_of<float>(p, stream);
}

}  // namespace
}  // namespace pyvitfast
