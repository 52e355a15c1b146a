#include "cpu_vector.h"
#include "ops/saliency_rowcol/saliency_rowcol.h"
#include "ops/saliency_rowcol/saliency_rowcol_math.h"

namespace pyvitfast::PVF_CPU_CAPABILITY {

PVF_INLINE void store_sum(void* sums, int64_t at, double value, bool double_sums) {
    if (double_sums) {
        static_cast<double*>(sums)[at] = value;
    } else {
        static_cast<float*>(sums)[at] = static_cast<float>(value);
    }
}

// Exact: two floats multiply in double, two 16-bit floats already in float.
template <typename W, typename G>
PVF_INLINE Doubles product_of(const W* weight, const G* grad) {
    if constexpr (sizeof(W) == 2 && sizeof(G) == 2) {
        return widen(load_floats(weight) * load_floats(grad));
    } else {
        return load_doubles(weight) * load_doubles(grad);
    }
}

// Products are exact, so the sums are those of exact arithmetic up to the
// last bits.
template <typename W, typename G, int kRows>
PVF_INLINE void sum_rows(const W* weight, int64_t weight_stride, const G* grad, int64_t grad_stride,
                         int64_t cols, bool absolute, double* partial, double* row_sums) {
    const uint64_t keep = absolute ? 0x7fffffffffffffffu : 0xffffffffffffffffu;
    Doubles rows[kRows] = {};
    int64_t col = 0;
    for (; col + kLanes <= cols; col += kLanes) {
        Doubles column = load_unaligned<Doubles>(partial + col);
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row) {
            // The hardware prefetcher stops at each page, which is one or two rows: 22 to 28 GB/s.
            __builtin_prefetch(weight + (row + kRows) * weight_stride + col);
            __builtin_prefetch(grad + (row + kRows) * grad_stride + col);
            Doubles product =
                product_of(weight + row * weight_stride + col, grad + row * grad_stride + col);
            product = reinterpret_cast<Doubles>(reinterpret_cast<LongWords>(product) & keep);
            rows[row] += product;
            column += product;
        }
        store_unaligned(partial + col, column);
    }
    for (int row = 0; row < kRows; ++row) {
        row_sums[row] = sum_lanes(rows[row]);
    }
    for (; col < cols; ++col) {
        for (int row = 0; row < kRows; ++row) {
            double product = to_double(weight[row * weight_stride + col]) *
                             to_double(grad[row * grad_stride + col]);
            product = absolute ? __builtin_fabs(product) : product;
            row_sums[row] += product;
            partial[col] += product;
        }
    }
}

template <typename W, typename G>
static void tile(const SaliencyMatrix& matrix, bool absolute, int64_t begin, int64_t end,
                 double* partial, void* sums, double inv_scale, bool double_sums) {
    constexpr int kBlock = 4;
    for (int64_t col = 0; col < matrix.cols; ++col) {
        partial[col] = 0.0;
    }
    const W* weight = static_cast<const W*>(matrix.weight);
    const G* grad = static_cast<const G*>(matrix.grad);
    for (int64_t row = begin; row < end;) {
        double totals[kBlock];
        const W* w = weight + row * matrix.weight_stride;
        const G* g = grad + row * matrix.grad_stride;
        int count = kBlock;
        if (row + kBlock <= end) {
            sum_rows<W, G, kBlock>(w, matrix.weight_stride, g, matrix.grad_stride, matrix.cols,
                                   absolute, partial, totals);
        } else {
            sum_rows<W, G, 1>(w, matrix.weight_stride, g, matrix.grad_stride, matrix.cols, absolute,
                              partial, totals);
            count = 1;
        }
        for (int i = 0; i < count; ++i) {
            store_sum(sums, matrix.sums_offset + row + i, totals[i] * inv_scale, double_sums);
        }
        row += count;
    }
}

static void columns(const SaliencyMatrix& matrix, int64_t begin, int64_t end,
                    const double* partials, int64_t tiles, void* sums, double inv_scale,
                    bool double_sums) {
    constexpr int64_t kChunk = 512;
    for (int64_t start = begin; start < end; start += kChunk) {
        const int64_t stop = start + kChunk < end ? start + kChunk : end;
        double totals[kChunk] = {};
        for (int64_t t = 0; t < tiles; ++t) {
            const double* partial = partials + t * matrix.cols + start;
            for (int64_t col = 0; col < stop - start; ++col) {
                totals[col] += partial[col];
            }
        }
        for (int64_t col = start; col < stop; ++col) {
            store_sum(sums, matrix.sums_offset + matrix.rows + col, totals[col - start] * inv_scale,
                      double_sums);
        }
    }
}

template <typename T>
PVF_INLINE void store_slope(T* to, double value) {
    *to = from_float<T>(static_cast<float>(value));
}

PVF_INLINE void store_slope(double* to, double value) { *to = value; }

template <typename W, typename G>
static void backward(const SaliencyMatrix& matrix, bool absolute, int64_t begin, int64_t end,
                     const void* sums, double inv_scale, bool double_sums) {
    const auto upstream = [&](int64_t at) {
        return double_sums ? static_cast<const double*>(sums)[at]
                           : static_cast<double>(static_cast<const float*>(sums)[at]);
    };
    for (int64_t row = begin; row < end; ++row) {
        const W* weight = static_cast<const W*>(matrix.weight) + row * matrix.weight_stride;
        const G* grad = static_cast<const G*>(matrix.grad) + row * matrix.grad_stride;
        W* weight_grad = static_cast<W*>(matrix.weight_grad) + row * matrix.cols;
        G* grad_grad = static_cast<G*>(matrix.grad_grad) + row * matrix.cols;
        const double from_row = upstream(matrix.sums_offset + row);
        for (int64_t col = 0; col < matrix.cols; ++col) {
            const double slope =
                (from_row + upstream(matrix.sums_offset + matrix.rows + col)) * inv_scale;
            const double w = to_double(weight[col]);
            const double g = to_double(grad[col]);
            store_slope(weight_grad + col, saliency::product_slope(w, g, g, slope, absolute));
            store_slope(grad_grad + col, saliency::product_slope(w, g, w, slope, absolute));
        }
    }
}

// Calls f with the Types of the two factors; float64 comes in pairs.
template <typename F>
PVF_INLINE void with_types(const SaliencyMatrix& matrix, const F& f) {
    if (matrix.weight_type == FloatType::kFloat64) {
        return f(Type<double>{}, Type<double>{});
    }
    with_narrow_float(matrix.weight_type, [&](auto weight) {
        with_narrow_float(matrix.grad_type, [&](auto grad) { f(weight, grad); });
    });
}

static void any_tile(const SaliencyMatrix& matrix, bool absolute, int64_t begin, int64_t end,
                     double* partial, void* sums, double inv_scale, bool double_sums) {
    with_types(matrix, [&]<typename W, typename G>(Type<W>, Type<G>) {
        tile<W, G>(matrix, absolute, begin, end, partial, sums, inv_scale, double_sums);
    });
}

static void any_backward(const SaliencyMatrix& matrix, bool absolute, int64_t begin, int64_t end,
                         const void* sums, double inv_scale, bool double_sums) {
    with_types(matrix, [&]<typename W, typename G>(Type<W>, Type<G>) {
        backward<W, G>(matrix, absolute, begin, end, sums, inv_scale, double_sums);
    });
}

extern const SaliencyRowcolCpu saliency_rowcol_cpu;
const SaliencyRowcolCpu saliency_rowcol_cpu{any_tile, columns, any_backward};

}  // namespace pyvitfast::PVF_CPU_CAPABILITY
