#pragma once

#include <cstdint>

#include "float_type.h"
#include "portable/platform.h"

namespace pyvitfast {

enum class PoolMode : int32_t { kAverage = 0, kMax = 1, kLearned = 2 };

// Sums are float, or double for double: type A below.
struct WindowPool {
    const void* x;  // [batch, height, width, channels], channels are neighbours
    int64_t batch_stride;
    int64_t row_stride;
    int64_t cell_stride;
    const void* logits;  // A [batch, bins, cell_rows, cell_cols]; learned
    void* weights;       // A, as logits: their softmax; learned
    int32_t* places;     // [batch, bins, channels]: row * width + column of the greatest; or null
    void* out;           // [batch, bins, channels]
    const void* grad;    // as out; backward
    void* grad_x;        // [batch, height, width, channels]
    void* grad_logits;   // A, as logits
    int64_t batch;
    int64_t height;
    int64_t width;
    int64_t channels;
    int64_t rows;  // bins
    int64_t cols;
    int64_t cell_rows;  // of the largest bin
    int64_t cell_cols;
    FloatType type;
    PoolMode mode;

    PVF_HOST_DEVICE int64_t bins() const { return rows * cols; }
    PVF_HOST_DEVICE int64_t cells() const { return cell_rows * cell_cols; }
};

struct BinSpan {
    int64_t begin;
    int64_t end;
};

// torch's adaptive rule; a bin has at least one cell, also where bins are more than cells.
PVF_HOST_DEVICE BinSpan bin_span(int64_t bin, int64_t cells, int64_t bins) {
    return {bin * cells / bins, ((bin + 1) * cells + bins - 1) / bins};
}
// The bins that hold a cell.
PVF_HOST_DEVICE BinSpan bins_of_cell(int64_t cell, int64_t cells, int64_t bins) {
    return {cell * bins / cells, ((cell + 1) * bins + cells - 1) / cells};
}

constexpr int kWindowPoolThreads = 128;
constexpr int kWindowPoolVector = 4;  // channels of a thread where the layout lets them be one load
constexpr int64_t kWindowPoolChannels = 64;  // channels of a task on the CPU

struct AdaptiveWindowPoolCpu {
    // Softmax of the logits of a bin of an image.
    void (*weigh)(const WindowPool&, int64_t image, int64_t bin);
    void (*pool)(const WindowPool&, int64_t image, int64_t bin);
    // Gradient of a row of cells of an image.
    void (*spread)(const WindowPool&, int64_t image, int64_t row);
    void (*score)(const WindowPool&, int64_t image, int64_t bin);
};

}  // namespace pyvitfast
