#include "cpu_vector.h"
#include "ops/structured_gather/structured_gather.h"
#include "ops/structured_gather/structured_gather_math.h"

namespace pyvitfast::PVF_CPU_CAPABILITY {

template <typename I>
PVF_INLINE bool in_range_of(const I* index, int64_t begin, int64_t end, int64_t size) {
    bool inside = true;
    for (int64_t i = begin; i < end; ++i) {
        inside &= index[i] >= 0 && index[i] < size;
    }
    return inside;
}

static bool in_range(const void* index, bool wide, int64_t begin, int64_t end, int64_t size) {
    return wide ? in_range_of(static_cast<const int64_t*>(index), begin, end, size)
                : in_range_of(static_cast<const int32_t*>(index), begin, end, size);
}

template <typename T, typename I>
PVF_INLINE void pick(const T* in, int64_t stride, const I* cols, int64_t count, T* out) {
    if (stride == 1) {
        for (int64_t col = 0; col < count; ++col) {
            out[col] = in[cols[col]];
        }
    } else {
        for (int64_t col = 0; col < count; ++col) {
            out[col] = in[static_cast<int64_t>(cols[col]) * stride];
        }
    }
}

template <typename T>
PVF_INLINE void copy_row(const GatherTensor& t, const T* in, const KeptRun* runs, int64_t run_count,
                         T* out) {
    if (run_count > 0) {
        for (int64_t r = 0; r < run_count; ++r) {
            __builtin_memcpy(out, in + runs[r].begin,
                             static_cast<size_t>(runs[r].length) * sizeof(T));
            out += runs[r].length;
        }
    } else if (t.cols == nullptr) {
        for (int64_t col = 0; col < t.out_cols; ++col) {
            out[col] = in[col * t.col_stride];
        }
    } else if (t.wide_cols) {
        pick(in, t.col_stride, static_cast<const int64_t*>(t.cols), t.out_cols, out);
    } else {
        pick(in, t.col_stride, static_cast<const int32_t*>(t.cols), t.out_cols, out);
    }
}

template <typename T, typename A>
PVF_INLINE void scaled_rows(const GatherTensor& t, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const T* in =
            static_cast<const T*>(t.in) + gather::index_at(t.rows, t.wide_rows, row) * t.row_stride;
        T* out = static_cast<T*>(t.out) + row * t.out_cols;
        const A row_scale = gather::scale_at<A>(t.row_scale, row);
        for (int64_t col = 0; col < t.out_cols; ++col) {
            const A value = to_float(in[gather::index_at(t.cols, t.wide_cols, col) * t.col_stride]);
            out[col] = from_float<T>(value * row_scale * gather::scale_at<A>(t.col_scale, col));
        }
    }
}

static void rows(const GatherTensor& t, const KeptRun* runs, int64_t run_count, int64_t begin,
                 int64_t end) {
    if (t.row_scale != nullptr || t.col_scale != nullptr) {
        return with_float(
            t.type, [&]<typename T>(Type<T>) { scaled_rows<T, Accumulate<T>>(t, begin, end); });
    }
    with_storage(t.element_size, [&]<typename T>(T) {
        for (int64_t row = begin; row < end; ++row) {
            const T* in = static_cast<const T*>(t.in) +
                          gather::index_at(t.rows, t.wide_rows, row) * t.row_stride;
            copy_row(t, in, runs, run_count, static_cast<T*>(t.out) + row * t.out_cols);
        }
    });
}

template <typename T, typename A>
PVF_INLINE void backward_of(const GatherTensor& t, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        T* out = static_cast<T*>(t.out) + row * t.in_cols;
        const gather::Span from_rows = gather::readers(t.rows, t.out_rows, row);
        int64_t next = 0;
        for (int64_t col = 0; col < t.in_cols; ++col) {
            gather::Span from_cols{col, col + 1};
            if (t.cols != nullptr) {
                const int64_t* sorted = static_cast<const int64_t*>(t.cols);
                from_cols.begin = next;
                while (next < t.out_cols && sorted[next] == col) {
                    ++next;
                }
                from_cols.end = next;
            }
            A total = A(0);
            for (int64_t i = from_rows.begin; i < from_rows.end; ++i) {
                const int64_t at_row = gather::position(t.row_order, i);
                const T* grad = static_cast<const T*>(t.in) + at_row * t.out_cols;
                const A row_scale = gather::scale_at<A>(t.row_scale, at_row);
                for (int64_t j = from_cols.begin; j < from_cols.end; ++j) {
                    const int64_t at_col = gather::position(t.col_order, j);
                    total += static_cast<A>(to_float(grad[at_col])) * row_scale *
                             gather::scale_at<A>(t.col_scale, at_col);
                }
            }
            out[col] = from_float<T>(total);
        }
    }
}

static void backward(const GatherTensor& t, int64_t begin, int64_t end) {
    with_float(t.type, [&]<typename T>(Type<T>) { backward_of<T, Accumulate<T>>(t, begin, end); });
}

extern const StructuredGatherCpu structured_gather_cpu;
const StructuredGatherCpu structured_gather_cpu{in_range, rows, backward};

}  // namespace pyvitfast::PVF_CPU_CAPABILITY
