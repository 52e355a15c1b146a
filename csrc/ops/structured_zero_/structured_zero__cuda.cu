#include "ops/structured_zero_/structured_zero_.h"
#include "ops/structured_zero_/structured_zero__math.h"
#include "portable/device.h"
#include "portable/launch_result.h"
#include "portable/multi_tensor.h"

namespace pyvitfast {

using namespace device;

namespace {

PVF_KERNEL PVF_LAUNCH_BOUNDS(kZeroThreads, 4)
    structured_zero_kernel(const __grid_constant__ StructuredZeroParams p) {
    const int64_t block = block_idx().x;
    const ZeroTensor& tensor = entry_of_tile(p.tensors, p.count, block);
    const int64_t col_tiles = zero_col_tiles(tensor.cols);
    const int64_t tile = block - tensor.tile_begin;
    const int64_t col = tile % col_tiles * kZeroTileCols + thread_idx().x;
    const int64_t row0 = tile / col_tiles * kZeroTileRows;
    const int64_t row1 = row0 + kZeroTileRows < tensor.rows ? row0 + kZeroTileRows : tensor.rows;
    if (col >= tensor.cols) {
        return;
    }
    const bool col_dead = tensor.col_alive != nullptr && !load(tensor.col_alive + col);
    with_storage(tensor.element_size, [&](auto zero) {
        using T = decltype(zero);
        T* data = static_cast<T*>(tensor.data);
        for (int64_t row = row0; row < row1; ++row) {
            if (col_dead || (tensor.row_alive != nullptr && !load(tensor.row_alive + row))) {
                store(data + row * tensor.row_stride + col * tensor.col_stride, zero);
            }
        }
    });
}

}  // namespace

const char* structured_zero_cuda(const StructuredZeroParams& params, void* stream) {
    const Dim3 grid{static_cast<unsigned>(params.tiles), 1, 1};
    return launch_result(launch(structured_zero_kernel, grid, Dim3{kZeroThreads, 1, 1}, 0,
                                as_stream(stream), params));
}

}  // namespace pyvitfast
