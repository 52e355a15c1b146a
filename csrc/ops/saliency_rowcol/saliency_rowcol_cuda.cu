#include "ops/saliency_rowcol/saliency_rowcol.h"
#include "ops/saliency_rowcol/saliency_rowcol_math.h"
#include "portable/device.h"
#include "portable/launch_result.h"
#include "portable/multi_tensor.h"
#include "portable/reduce.h"
#include "portable/vec.h"

namespace pyvitfast {

using namespace device;

namespace {

constexpr int kTileRows = kSaliencyCudaTileRows;
constexpr int kTileCols = kSaliencyCudaTileCols;
constexpr int kThreads = kSaliencyCudaThreads;
constexpr int kWarps = kThreads / 32;
constexpr int kWarpCols = kTileCols / kWarps;
constexpr int kPerLane = kWarpCols / 32;

template <typename A, typename T>
PVF_DEVICE A widen(T value) {
    return static_cast<A>(to_float(value));
}

// A lane owns kPerLane columns: neighbours where a vector load is possible, else 32 apart so that
// the warp's loads still touch whole sectors.
template <bool kVector>
PVF_DEVICE int lane_col(int k) {
    return kVector ? lane_id() * kPerLane + k : lane_id() + 32 * k;
}

template <bool kVector, typename A, typename T>
PVF_DEVICE void load_row(const T* row, int64_t col0, int64_t cols, A (&out)[kPerLane]) {
    if constexpr (kVector) {
        if (col0 + lane_col<true>(0) < cols) {
            const auto vec = load_vec_streaming<kPerLane>(row + col0 + lane_col<true>(0));
            PVF_UNROLL
            for (int k = 0; k < kPerLane; ++k) {
                out[k] = widen<A>(vec[k]);
            }
        } else {
            PVF_UNROLL
            for (int k = 0; k < kPerLane; ++k) {
                out[k] = A(0);
            }
        }
    } else {
        PVF_UNROLL
        for (int k = 0; k < kPerLane; ++k) {
            const int64_t col = col0 + lane_col<false>(k);
            out[k] = col < cols ? widen<A>(load(row + col)) : A(0);
        }
    }
}

template <typename A, typename W, typename G, bool kVector>
PVF_DEVICE void sum_tile(const SaliencyMatrix& matrix, bool absolute, int64_t row_tile,
                         int64_t col_tile, A* partials, A (*row_sums)[kTileRows]) {
    const int64_t row0 = row_tile * kTileRows;
    const int64_t col0 = col_tile * kTileCols + warp_id() * kWarpCols;
    const int rows =
        static_cast<int>(matrix.rows - row0 < kTileRows ? matrix.rows - row0 : kTileRows);
    const W* weight = static_cast<const W*>(matrix.weight) + row0 * matrix.weight_stride;
    const G* grad = static_cast<const G*>(matrix.grad) + row0 * matrix.grad_stride;
    A columns[kPerLane] = {};
    for (int row = 0; row < rows; ++row) {
        A w[kPerLane];
        A g[kPerLane];
        load_row<kVector>(weight + row * matrix.weight_stride, col0, matrix.cols, w);
        load_row<kVector>(grad + row * matrix.grad_stride, col0, matrix.cols, g);
        A total = A(0);
        PVF_UNROLL
        for (int k = 0; k < kPerLane; ++k) {
            A product = w[k] * g[k];
            product = absolute && product < A(0) ? -product : product;
            columns[k] += product;
            total += product;
        }
        total = warp_sum(total);
        if (lane_id() == 0) {
            store_shared(&row_sums[warp_id()][row], total);
        }
    }
    A* partial_columns = partials + matrix.partials_offset + row_tile * matrix.cols;
    if constexpr (kVector) {
        if (col0 + lane_col<true>(0) < matrix.cols) {
            Vec<A, kPerLane> vec;
            PVF_UNROLL
            for (int k = 0; k < kPerLane; ++k) {
                vec[k] = columns[k];
            }
            store_vec(partial_columns + col0 + lane_col<true>(0), vec);
        }
    } else {
        PVF_UNROLL
        for (int k = 0; k < kPerLane; ++k) {
            const int64_t col = col0 + lane_col<false>(k);
            if (col < matrix.cols) {
                store(partial_columns + col, columns[k]);
            }
        }
    }
    sync_threads();
    const int row = static_cast<int>(thread_idx().x);
    if (row < rows) {
        A total = A(0);
        for (int warp = 0; warp < kWarps; ++warp) {
            total += load_shared(&row_sums[warp][row]);
        }
        A* partial_rows =
            partials + matrix.partials_offset + saliency_row_tiles(matrix.rows) * matrix.cols;
        store(partial_rows + col_tile * matrix.rows + row0 + row, total);
    }
}

template <typename T>
PVF_DEVICE bool aligned_rows(const void* pointer, int64_t stride) {
    constexpr auto bytes = alignof(Vec<T, kPerLane>);
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0 && stride * sizeof(T) % bytes == 0;
}

template <typename A, typename W, typename G>
PVF_DEVICE void sum_tile_of(const SaliencyMatrix& matrix, bool absolute, int64_t row_tile,
                            int64_t col_tile, A* partials, A (*row_sums)[kTileRows]) {
    const bool vector = matrix.cols % kPerLane == 0 &&
                        aligned_rows<W>(matrix.weight, matrix.weight_stride) &&
                        aligned_rows<G>(matrix.grad, matrix.grad_stride);
    if (vector) {
        sum_tile<A, W, G, true>(matrix, absolute, row_tile, col_tile, partials, row_sums);
    } else {
        sum_tile<A, W, G, false>(matrix, absolute, row_tile, col_tile, partials, row_sums);
    }
}

// The last block of a matrix to finish adds the partial sums in tile order: one launch, and the
// same bits whichever block that is.
template <typename A>
PVF_DEVICE void finish(const SaliencyMatrix& matrix, const A* partials, A* sums, A scale) {
    const int64_t row_tiles = saliency_row_tiles(matrix.rows);
    const int64_t col_tiles = saliency_col_tiles(matrix.cols);
    const A* columns = partials + matrix.partials_offset;
    const A* rows = columns + row_tiles * matrix.cols;
    A* out = sums + matrix.sums_offset;
    for (int64_t row = thread_idx().x; row < matrix.rows; row += kThreads) {
        A total = A(0);
        for (int64_t tile = 0; tile < col_tiles; ++tile) {
            total += load(rows + tile * matrix.rows + row);
        }
        store(out + row, total * scale);
    }
    for (int64_t col = thread_idx().x; col < matrix.cols; col += kThreads) {
        A total = A(0);
        for (int64_t tile = 0; tile < row_tiles; ++tile) {
            total += load(columns + tile * matrix.cols + col);
        }
        store(out + matrix.rows + col, total * scale);
    }
}

// Calls f with the Types of the two factors; A is double only for two doubles.
template <typename A, typename F>
PVF_DEVICE void with_types(const SaliencyMatrix& matrix, const F& f) {
    if constexpr (sizeof(A) == 8) {
        f(Type<double>{}, Type<double>{});
    } else {
        with_narrow_float(matrix.weight_type, [&](auto weight) {
            with_narrow_float(matrix.grad_type, [&](auto grad) { f(weight, grad); });
        });
    }
}

template <typename A>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kThreads, 2)
    saliency_rowcol_kernel(const __grid_constant__ SaliencyRowcolParams p) {
    PVF_SHARED(A, shared_rows, kWarps * kTileRows);
    PVF_SHARED(int32_t, is_last, 1);
    const int64_t block = block_idx().x;
    const SaliencyMatrix& matrix = entry_of_tile(p.matrices, p.count, block);
    const int64_t row_tiles = saliency_row_tiles(matrix.rows);
    const int64_t col_tiles = saliency_col_tiles(matrix.cols);
    const int64_t tiles = row_tiles * col_tiles;
    const int64_t tile = block - matrix.tile_begin;
    A* partials = static_cast<A*>(p.partials);
    A(*row_sums)[kTileRows] = reinterpret_cast<A(*)[kTileRows]>(&shared_rows[0]);
    if (tiles > 0) {
        with_types<A>(matrix, [&](auto weight, auto grad) {
            using W = typename decltype(weight)::type;
            using G = typename decltype(grad)::type;
            sum_tile_of<A, W, G>(matrix, p.absolute != 0, tile / col_tiles, tile % col_tiles,
                                 partials, row_sums);
        });
    }
    thread_fence();
    sync_threads();
    if (thread_idx().x == 0) {
        const int32_t ticket = atomic_add(p.tickets + (&matrix - p.matrices), 1);
        store_shared(&is_last[0], int32_t(ticket + 1 >= tiles));
    }
    sync_threads();
    if (load_shared(&is_last[0]) != 0) {
        thread_fence();
        const A scale = p.inv_scale != nullptr ? static_cast<A>(load(p.inv_scale)) : A(1);
        finish<A>(matrix, partials, static_cast<A*>(p.sums), scale);
    }
}

template <typename A, typename W, typename G>
PVF_DEVICE void backward_tile(const SaliencyMatrix& matrix, bool absolute, int64_t row_tile,
                              int64_t col_tile, const A* slopes, A scale) {
    const int64_t row0 = row_tile * kTileRows;
    const int64_t row1 = row0 + kTileRows < matrix.rows ? row0 + kTileRows : matrix.rows;
    for (int k = 0; k < kTileCols / kThreads; ++k) {
        const int64_t col = col_tile * kTileCols + k * kThreads + thread_idx().x;
        if (col >= matrix.cols) {
            continue;
        }
        const A from_col = load(slopes + matrix.sums_offset + matrix.rows + col);
        for (int64_t row = row0; row < row1; ++row) {
            const A slope = (load(slopes + matrix.sums_offset + row) + from_col) * scale;
            const A w = widen<A>(
                load(static_cast<const W*>(matrix.weight) + row * matrix.weight_stride + col));
            const A g =
                widen<A>(load(static_cast<const G*>(matrix.grad) + row * matrix.grad_stride + col));
            const A for_weight = saliency::product_slope(w, g, g, slope, absolute);
            const A for_grad = saliency::product_slope(w, g, w, slope, absolute);
            const int64_t at = row * matrix.cols + col;
            store(static_cast<W*>(matrix.weight_grad) + at, from_float<W>(for_weight));
            store(static_cast<G*>(matrix.grad_grad) + at, from_float<G>(for_grad));
        }
    }
}

template <typename A>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kThreads, 2)
    saliency_rowcol_backward_kernel(const __grid_constant__ SaliencyRowcolParams p) {
    const int64_t block = block_idx().x;
    const SaliencyMatrix& matrix = entry_of_tile(p.matrices, p.count, block);
    if (matrix.rows == 0 || matrix.cols == 0) {
        return;
    }
    const int64_t col_tiles = saliency_col_tiles(matrix.cols);
    const int64_t tile = block - matrix.tile_begin;
    const A scale = p.inv_scale != nullptr ? static_cast<A>(load(p.inv_scale)) : A(1);
    with_types<A>(matrix, [&](auto weight, auto grad) {
        using W = typename decltype(weight)::type;
        using G = typename decltype(grad)::type;
        backward_tile<A, W, G>(matrix, p.absolute != 0, tile / col_tiles, tile % col_tiles,
                               static_cast<const A*>(p.sums), scale);
    });
}

}  // namespace

const char* saliency_rowcol_cuda(const SaliencyRowcolParams& params, bool double_sums,
                                 void* stream) {
    const Dim3 grid{static_cast<unsigned>(params.tiles), 1, 1};
    const Dim3 block{kThreads, 1, 1};
    return launch_result(
        double_sums
            ? launch(saliency_rowcol_kernel<double>, grid, block, 0, as_stream(stream), params)
            : launch(saliency_rowcol_kernel<float>, grid, block, 0, as_stream(stream), params));
}

const char* saliency_rowcol_backward_cuda(const SaliencyRowcolParams& params, bool double_sums,
                                          void* stream) {
    const Dim3 grid{static_cast<unsigned>(params.tiles), 1, 1};
    const Dim3 block{kThreads, 1, 1};
    return launch_result(double_sums ? launch(saliency_rowcol_backward_kernel<double>, grid, block,
                                              0, as_stream(stream), params)
                                     : launch(saliency_rowcol_backward_kernel<float>, grid, block,
                                              0, as_stream(stream), params));
}

}  // namespace pyvitfast
