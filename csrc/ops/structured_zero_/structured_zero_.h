#pragma once

#include <cstdint>

#include "portable/platform.h"

namespace pyvitfast {

// One tensor as rows x cols. Strides are elements; a null mask means all alive.
struct ZeroTensor {
    void* data;
    const bool* row_alive;
    const bool* col_alive;
    int64_t rows;
    int64_t cols;
    int64_t row_stride;
    int64_t col_stride;
    int64_t tile_begin;  // first of this tensor's tiles in the launch
    int32_t element_size;
};

// A launch's parameters hold at most 32,764 bytes; more tensors take another launch.
constexpr int kMaxZeroTensors = 440;
constexpr int kZeroThreads = 256;
constexpr int kZeroTileRows = 32;
constexpr int kZeroTileCols = kZeroThreads;

struct StructuredZeroParams {
    ZeroTensor tensors[kMaxZeroTensors];
    int64_t tiles;
    int32_t count;
};

PVF_HOST_DEVICE int64_t zero_row_tiles(int64_t rows) {
    return (rows + kZeroTileRows - 1) / kZeroTileRows;
}
PVF_HOST_DEVICE int64_t zero_col_tiles(int64_t cols) {
    return (cols + kZeroTileCols - 1) / kZeroTileCols;
}

// A run of neighbouring dead columns.
struct DeadRun {
    int64_t begin;
    int64_t length;
};

struct StructuredZeroCpu {
    void (*rows)(const ZeroTensor&, const DeadRun* runs, int64_t run_count, int64_t begin,
                 int64_t end);
};

}  // namespace pyvitfast
