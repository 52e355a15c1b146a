#pragma once

#include <cstdint>

#include "float_type.h"
#include "portable/platform.h"

namespace pyvitfast {

// One tensor as rows x cols. Strides are elements. Null indices mean all, null scales mean 1.
struct GatherTensor {
    const void* in;
    void* out;  // contiguous; in backward the gradient of the input
    const void* rows;
    const void* cols;
    const int64_t* row_order;  // backward: where each sorted index stood
    const int64_t* col_order;
    const void* row_scale;
    const void* col_scale;
    int64_t out_rows;
    int64_t out_cols;
    int64_t in_rows;
    int64_t in_cols;
    int64_t row_stride;
    int64_t col_stride;
    int64_t tile_begin;  // first of this tensor's tiles in the launch
    int32_t element_size;
    FloatType type;  // read only where there are scales, and in backward
    bool wide_rows;  // int64 indices
    bool wide_cols;
};

// A launch's parameters hold at most 32,764 bytes; more tensors take another launch.
constexpr int kMaxGatherTensors = 230;
constexpr int kGatherThreads = 256;
constexpr int kGatherTileRows = 32;
constexpr int kGatherTileCols = kGatherThreads;

struct StructuredGatherParams {
    GatherTensor tensors[kMaxGatherTensors];
    int64_t tiles;
    int32_t* out_of_range;  // one flag, 0 at launch
    int32_t count;
};

PVF_HOST_DEVICE int64_t gather_row_tiles(int64_t rows) {
    return (rows + kGatherTileRows - 1) / kGatherTileRows;
}
PVF_HOST_DEVICE int64_t gather_col_tiles(int64_t cols) {
    return (cols + kGatherTileCols - 1) / kGatherTileCols;
}

// A run of neighbouring kept columns.
struct KeptRun {
    int64_t begin;
    int64_t length;
};

struct StructuredGatherCpu {
    // True when entries [begin, end) of the index lie in [0, size).
    bool (*in_range)(const void* index, bool wide, int64_t begin, int64_t end, int64_t size);
    // Output rows [begin, end); with runs, their columns are copied run by run.
    void (*rows)(const GatherTensor&, const KeptRun* runs, int64_t run_count, int64_t begin,
                 int64_t end);
    // Rows [begin, end) of the input's gradient; indices are sorted int64.
    void (*backward)(const GatherTensor&, int64_t begin, int64_t end);
};

}  // namespace pyvitfast
