#pragma once

#include <cstdint>

#include "portable/platform.h"

namespace pyvitfast {

// An index of two parts: i lies at i / block * outer + i % block * inner, so that two neighbouring
// modes of a tensor can be one side of a matrix without a copy.
struct Stride {
    int64_t inner;
    int64_t outer;
};

struct StridedMatrix {
    void* data;
    Stride row;
    Stride col;
    Stride batch;
};

// The size of a side and where its inner part ends.
struct Extent {
    int64_t size;
    int64_t block;
};

PVF_HOST_DEVICE int64_t place_of(const Stride& stride, const Extent& extent, int64_t i) {
    return extent.size == extent.block
               ? i * stride.inner
               : i / extent.block * stride.outer + i % extent.block * stride.inner;
}

// c[z][i][j] = sum over k of a[z][i][k] b[z][k][j], onto c with `accumulate`. All float32, or all
// float64 with `wide`.
struct StridedProduct {
    StridedMatrix a;
    StridedMatrix b;
    StridedMatrix c;
    Extent rows;
    Extent cols;
    Extent depth;
    Extent batch;
    bool accumulate;
    bool wide;
};

struct StridedProductCpu {
    // Rows [rows_begin, rows_end) and columns [cols_begin, cols_end) of one matrix of the batch.
    void (*part)(const StridedProduct&, int64_t batch, int64_t rows_begin, int64_t rows_end,
                 int64_t cols_begin, int64_t cols_end);
};

}  // namespace pyvitfast
