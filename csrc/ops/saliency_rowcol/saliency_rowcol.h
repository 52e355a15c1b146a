#pragma once

#include <cstdint>

#include "float_type.h"
#include "portable/platform.h"

namespace pyvitfast {

// One weight matrix and its gradient. Strides are elements between rows.
struct SaliencyMatrix {
    const void* weight;
    const void* grad;
    void* weight_grad;  // backward only
    void* grad_grad;    // backward only
    int64_t rows;
    int64_t cols;
    int64_t weight_stride;
    int64_t grad_stride;
    int64_t sums_offset;      // into the result: row sums, then column sums
    int64_t partials_offset;  // into the partial sums of the tiles
    int64_t tile_begin;       // first of this matrix's tiles in the launch
    FloatType weight_type;
    FloatType grad_type;
};

// A launch's parameters hold at most 32,764 bytes; more matrices take another launch.
constexpr int kMaxSaliencyMatrices = 320;

constexpr int kSaliencyCudaTileRows = 64;
constexpr int kSaliencyCudaTileCols = 1024;
constexpr int kSaliencyCudaThreads = 256;

struct SaliencyRowcolParams {
    SaliencyMatrix matrices[kMaxSaliencyMatrices];
    int32_t count;
    int32_t absolute;
    int64_t tiles;
    void* sums;              // float or double: result, or its gradient in backward
    void* partials;          // float or double, see saliency_partial_count; forward only
    int32_t* tickets;        // one zero a matrix; forward only
    const float* inv_scale;  // null: 1
};

PVF_HOST_DEVICE int64_t saliency_row_tiles(int64_t rows) {
    return (rows + kSaliencyCudaTileRows - 1) / kSaliencyCudaTileRows;
}

PVF_HOST_DEVICE int64_t saliency_col_tiles(int64_t cols) {
    return (cols + kSaliencyCudaTileCols - 1) / kSaliencyCudaTileCols;
}

// Each row tile leaves a partial sum a column, each column tile one a row. Rounded up so that the
// next matrix begins where vectors may be stored.
PVF_HOST_DEVICE int64_t saliency_partial_count(int64_t rows, int64_t cols) {
    const int64_t count = saliency_row_tiles(rows) * cols + saliency_col_tiles(cols) * rows;
    return (count + 3) / 4 * 4;
}

// Rows that one CPU task sums: the same for any number of threads, so the bits are too.
constexpr int64_t kSaliencyCpuTileRows = 128;

struct SaliencyRowcolCpu {
    // Rows [begin, end): row sums into sums_rows[begin..], column sums of these rows into
    // partial[cols].
    void (*tile)(const SaliencyMatrix&, bool absolute, int64_t begin, int64_t end, double* partial,
                 void* sums, double inv_scale, bool double_sums);
    // Columns [begin, end): partial sums of all tiles, in order, into the result.
    void (*columns)(const SaliencyMatrix&, int64_t begin, int64_t end, const double* partials,
                    int64_t tiles, void* sums, double inv_scale, bool double_sums);
    // Rows [begin, end) of both gradients.
    void (*backward)(const SaliencyMatrix&, bool absolute, int64_t begin, int64_t end,
                     const void* sums, double inv_scale, bool double_sums);
};

}  // namespace pyvitfast
