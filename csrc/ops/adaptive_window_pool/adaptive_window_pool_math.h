#pragma once

#include "ops/adaptive_window_pool/adaptive_window_pool.h"

namespace pyvitfast::pooling {

// As torch's pooling: the first of equal values stays, NaN wins.
template <typename A>
PVF_HOST_DEVICE bool replaces(A value, A best) {
    return value > best || value != value;
}

struct Window {
    BinSpan rows;
    BinSpan cols;
    PVF_HOST_DEVICE int64_t area() const {
        return (rows.end - rows.begin) * (cols.end - cols.begin);
    }
};

PVF_HOST_DEVICE Window window_of(const WindowPool& p, int64_t bin) {
    return {bin_span(bin / p.cols, p.height, p.rows), bin_span(bin % p.cols, p.width, p.cols)};
}

// The weight of a cell of a window: its place in the padded bin.
PVF_HOST_DEVICE int64_t weight_at(const WindowPool& p, int64_t image, int64_t bin,
                                  const Window& window, int64_t row, int64_t col) {
    return ((image * p.bins() + bin) * p.cell_rows + row - window.rows.begin) * p.cell_cols + col -
           window.cols.begin;
}

}  // namespace pyvitfast::pooling
