#include "ops/structured_gather/structured_gather.h"
#include "ops/structured_gather/structured_gather_math.h"
#include "portable/device.h"
#include "portable/launch_result.h"
#include "portable/multi_tensor.h"
#include "portable/vec.h"

namespace pyvitfast {

using namespace device;

namespace {

PVF_DEVICE int64_t load_index(const void* index, bool wide, int64_t at) {
    if (index == nullptr) {
        return at;
    }
    return wide ? load(static_cast<const int64_t*>(index) + at)
                : static_cast<int64_t>(load(static_cast<const int32_t*>(index) + at));
}

struct Tile {
    int64_t col;
    int64_t row0;
    int64_t row1;
};

PVF_DEVICE Tile tile_of(int64_t tile, int64_t rows, int64_t cols) {
    const int64_t col_tiles = gather_col_tiles(cols);
    const int64_t row0 = tile / col_tiles * kGatherTileRows;
    const int64_t row1 = row0 + kGatherTileRows < rows ? row0 + kGatherTileRows : rows;
    return {tile % col_tiles * kGatherTileCols + static_cast<int64_t>(thread_idx().x), row0, row1};
}

PVF_KERNEL PVF_LAUNCH_BOUNDS(kGatherThreads, 4)
    structured_gather_kernel(const __grid_constant__ StructuredGatherParams p) {
    const int64_t block = block_idx().x;
    const GatherTensor& t = entry_of_tile(p.tensors, p.count, block);
    const Tile tile = tile_of(block - t.tile_begin, t.out_rows, t.out_cols);
    if (tile.col >= t.out_cols) {
        return;
    }
    const int64_t from_col = load_index(t.cols, t.wide_cols, tile.col);
    bool inside = from_col >= 0 && from_col < t.in_cols;
    const auto each_row = [&](const auto& copy) {
        for (int64_t row = tile.row0; row < tile.row1; ++row) {
            const int64_t from_row = load_index(t.rows, t.wide_rows, row);
            if (from_row < 0 || from_row >= t.in_rows || from_col < 0 || from_col >= t.in_cols) {
                inside = false;
                continue;
            }
            copy(from_row * t.row_stride + from_col * t.col_stride, row);
        }
    };
    if (t.row_scale != nullptr || t.col_scale != nullptr) {
        with_float(t.type, [&](auto type) {
            using T = typename decltype(type)::type;
            using A = Accumulate<T>;
            const A col_scale =
                t.col_scale != nullptr ? load(static_cast<const A*>(t.col_scale) + tile.col) : A(1);
            each_row([&](int64_t from, int64_t row) {
                const A row_scale =
                    t.row_scale != nullptr ? load(static_cast<const A*>(t.row_scale) + row) : A(1);
                const A value = to_float(load(static_cast<const T*>(t.in) + from));
                store(static_cast<T*>(t.out) + row * t.out_cols + tile.col,
                      from_float<T>(value * row_scale * col_scale));
            });
        });
    } else {
        with_storage(t.element_size, [&](auto zero) {
            using T = decltype(zero);
            each_row([&](int64_t from, int64_t row) {
                store(static_cast<T*>(t.out) + row * t.out_cols + tile.col,
                      load(static_cast<const T*>(t.in) + from));
            });
        });
    }
    if (!inside) {
        atomic_or(p.out_of_range, 1);
    }
}

PVF_KERNEL PVF_LAUNCH_BOUNDS(kGatherThreads, 4)
    structured_gather_backward_kernel(const __grid_constant__ StructuredGatherParams p) {
    const int64_t block = block_idx().x;
    const GatherTensor& t = entry_of_tile(p.tensors, p.count, block);
    const Tile tile = tile_of(block - t.tile_begin, t.in_rows, t.in_cols);
    if (tile.col >= t.in_cols) {
        return;
    }
    const gather::Span from_cols = gather::readers(t.cols, t.out_cols, tile.col);
    with_float(t.type, [&](auto type) {
        using T = typename decltype(type)::type;
        using A = Accumulate<T>;
        for (int64_t row = tile.row0; row < tile.row1; ++row) {
            const gather::Span from_rows = gather::readers(t.rows, t.out_rows, row);
            A total = A(0);
            for (int64_t i = from_rows.begin; i < from_rows.end; ++i) {
                const int64_t at_row = gather::position(t.row_order, i);
                const A row_scale = gather::scale_at<A>(t.row_scale, at_row);
                for (int64_t j = from_cols.begin; j < from_cols.end; ++j) {
                    const int64_t at_col = gather::position(t.col_order, j);
                    const A grad =
                        to_float(load(static_cast<const T*>(t.in) + at_row * t.out_cols + at_col));
                    total += grad * row_scale * gather::scale_at<A>(t.col_scale, at_col);
                }
            }
            store(static_cast<T*>(t.out) + row * t.in_cols + tile.col, from_float<T>(total));
        }
    });
}

}  // namespace

const char* structured_gather_cuda(const StructuredGatherParams& params, void* stream) {
    const Dim3 grid{static_cast<unsigned>(params.tiles), 1, 1};
    return launch_result(launch(structured_gather_kernel, grid, Dim3{kGatherThreads, 1, 1}, 0,
                                as_stream(stream), params));
}

// Waits for the stream.
const char* structured_gather_read_flag(const int32_t* flag, int32_t* value, void* stream) {
    return launch_result(copy_to_host(value, flag, sizeof(*value), as_stream(stream)));
}

const char* structured_gather_backward_cuda(const StructuredGatherParams& params, void* stream) {
    const Dim3 grid{static_cast<unsigned>(params.tiles), 1, 1};
    return launch_result(launch(structured_gather_backward_kernel, grid, Dim3{kGatherThreads, 1, 1},
                                0, as_stream(stream), params));
}

}  // namespace pyvitfast
