#pragma once

// Matrices read out of tensors, and their products on either backend, for the adaptors.

#include <algorithm>

#include "adaptor.h"
#include "portable/strided_product.h"

namespace pyvitfast {

// A contiguous tensor of more dimensions seen as matrices: strides in elements.
struct View {
    char* data = nullptr;
    int64_t item = 4;

    StridedMatrix matrix(Stride row, Stride col, Stride batch = {}, int64_t offset = 0) const {
        return {data + offset * item, row, col, batch};
    }
};

// [count, rows, cols] in row-major order, `offset` elements on.
inline StridedMatrix stack_of(const View& view, int64_t cols, int64_t size = 0,
                              int64_t offset = 0) {
    return view.matrix({cols, 0}, {1, 0}, {size, 0}, offset);
}

inline StridedMatrix transposed(StridedMatrix matrix) {
    std::swap(matrix.row, matrix.col);
    return matrix;
}

inline View view_of(const Tensor& tensor) {
    return {static_cast<char*>(tensor.data_ptr()), tensor.scalar_type() == DType::Double ? 8 : 4};
}

inline Tensor zeros_as(const Tensor& tensor) {
    const auto sizes = tensor.sizes();
    return zeros(tensor, {sizes.begin(), sizes.end()});
}

inline Tensor ones(const Tensor& like, int64_t count) {
    const Tensor out = empty(like, {count});
    torch::stable::fill_(out, 1.0);
    return out;
}

inline Extent all_of(int64_t size) { return {size, size}; }

// Runs products one after the other. Where the sums of one part end does not depend on the threads.
class Products {
   public:
#if PVF_CPU_KERNELS
    Products(const char*, const Tensor& like, const StridedProductCpu& kernels)
        : kernels_(kernels), wide_(like.scalar_type() == DType::Double) {}
#else
    using Launch = const char* (*)(const StridedProduct&, void* stream);
    Products(const char* op, const Tensor& like, Launch launch)
        : op_(op), launch_(launch), scope_(like), wide_(like.scalar_type() == DType::Double) {}
#endif

    // c = a b, or c += a b: rows x depth times depth x cols, for each of a batch.
    void run(const StridedMatrix& a, const StridedMatrix& b, const StridedMatrix& c, Extent rows,
             Extent depth, Extent cols, Extent batch, bool accumulate = false) const {
        run(StridedProduct{a, b, c, rows, cols, depth, batch, accumulate, wide_});
    }

    // The sum of `count` parts of `size` elements, one after the other; `units` holds as many ones.
    void add_up(const View& parts, int64_t count, int64_t size, const View& units,
                const StridedMatrix& sum, bool accumulate) const {
        run(stack_of(units, 0), stack_of(parts, size), sum, all_of(1), all_of(count), all_of(size),
            all_of(1), accumulate);
    }

   private:
    void run(const StridedProduct& p) const {
        if (p.rows.size == 0 || p.cols.size == 0 || p.batch.size == 0) {
            return;
        }
#if PVF_CPU_KERNELS
        int64_t rows = kMostRows;
        int64_t cols = kMostCols;
        const auto parts = [&](int64_t size, int64_t most) { return (size + most - 1) / most; };
        const auto tasks = [&] {
            return parts(p.rows.size, rows) * parts(p.cols.size, cols) * p.batch.size;
        };
        while (tasks() < kFewTasks && (rows > kLeastRows || cols > kLeastCols)) {
            // The side that stays longer is halved: both operands are packed once for each part.
            (rows > cols || cols <= kLeastCols ? rows : cols) /= 2;
        }
        const int64_t row_parts = parts(p.rows.size, rows);
        const int64_t col_parts = parts(p.cols.size, cols);
        torch::stable::parallel_for(0, tasks(), 1, [&](int64_t begin, int64_t end) {
            for (int64_t task = begin; task < end; ++task) {
                const int64_t batch = task / (row_parts * col_parts);
                const int64_t row = task % row_parts * rows;
                const int64_t col = task / row_parts % col_parts * cols;
                kernels_.part(p, batch, row, std::min(row + rows, p.rows.size), col,
                              std::min(col + cols, p.cols.size));
            }
        });
#else
        const int64_t tiles = (p.rows.size + 63) / 64 * ((p.cols.size + 63) / 64) * p.batch.size;
        check_grid(op_, std::max({tiles, p.rows.size, p.cols.size, p.depth.size}));
        check_launch(op_, launch_(p, scope_.stream()));
#endif
    }

#if PVF_CPU_KERNELS
    static constexpr int64_t kMostRows = 1536;
    static constexpr int64_t kMostCols = 1536;
    static constexpr int64_t kLeastRows = 96;
    static constexpr int64_t kLeastCols = 192;
    static constexpr int64_t kFewTasks = 16;
    const StridedProductCpu& kernels_;
#else
    const char* op_;
    Launch launch_;
    LaunchScope scope_;
#endif
    bool wide_;
};

}  // namespace pyvitfast
