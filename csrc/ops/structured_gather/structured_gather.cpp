#include "ops/structured_gather/structured_gather.h"

#include <algorithm>
#include <utility>

#include "adaptor.h"

namespace pyvitfast {

#if PVF_CPU_KERNELS
PVF_DECLARE_CPU_KERNELS(StructuredGatherCpu, structured_gather_cpu)
#else
const char* structured_gather_cuda(const StructuredGatherParams& params, void* stream);
const char* structured_gather_read_flag(const int32_t* flag, int32_t* value, void* stream);
const char* structured_gather_backward_cuda(const StructuredGatherParams& params, void* stream);
#endif

namespace {

constexpr const char* kName = "structured_gather";

TensorList contiguous(const TensorList& tensors) {
    TensorList out;
    for (const Tensor& tensor : tensors) {
        out.push_back(torch::stable::contiguous(tensor));
    }
    return out;
}

const void* data(const Tensor* tensor) { return tensor == nullptr ? nullptr : tensor->data_ptr(); }

bool wide(const Tensor* index) { return index != nullptr && index->scalar_type() == DType::Long; }

const void* scale_data(const Tensor* scale, int64_t size, const Tensor& tensor) {
    if (scale == nullptr) {
        return nullptr;
    }
    const DType expected = tensor.scalar_type() == DType::Double ? DType::Double : DType::Float;
    STD_TORCH_CHECK(scale->numel() == size && scale->scalar_type() == expected, kName,
                    ": a scale must have ", size,
                    " factors of float32 (float64 for float64 tensors), got ", scale->numel());
    return scale->data_ptr();
}

void check_index(const Tensor* index) {
    STD_TORCH_CHECK(index == nullptr || index->scalar_type() == DType::Long ||
                        index->scalar_type() == DType::Int,
                    kName, ": indices must have dtype int32 or int64");
}

// Vectors lie along the columns, which is the direction the kernels walk in memory.
void lay_down(GatherTensor& t) {
    std::swap(t.out_rows, t.out_cols);
    std::swap(t.in_rows, t.in_cols);
    std::swap(t.row_stride, t.col_stride);
    std::swap(t.rows, t.cols);
    std::swap(t.wide_rows, t.wide_cols);
    std::swap(t.row_order, t.col_order);
    std::swap(t.row_scale, t.col_scale);
}

#if PVF_CPU_KERNELS

// The kept columns as runs where copying runs beats picking elements; empty otherwise.
std::vector<KeptRun> kept_runs(const GatherTensor& t) {
    std::vector<KeptRun> runs;
    if (t.col_stride != 1 || t.out_cols == 0) {
        return runs;
    }
    if (t.cols == nullptr) {
        runs.push_back({0, t.out_cols});
        return runs;
    }
    constexpr int64_t kMinRunBytes = 32;
    const int64_t most = t.out_cols * t.element_size / kMinRunBytes + 1;
    for (int64_t j = 0; j < t.out_cols; ++j) {
        const int64_t col = t.wide_cols ? static_cast<const int64_t*>(t.cols)[j]
                                        : static_cast<const int32_t*>(t.cols)[j];
        if (!runs.empty() && runs.back().begin + runs.back().length == col) {
            ++runs.back().length;
        } else if (static_cast<int64_t>(runs.size()) == most) {
            return {};
        } else {
            runs.push_back({col, 1});
        }
    }
    return runs;
}

void run(const std::vector<GatherTensor>& entries, const TensorList&) {
    const auto& kernels = PVF_CPU_KERNELS_OF(structured_gather_cpu);
    std::vector<std::vector<KeptRun>> runs;
    for (const auto& entry : entries) {
        STD_TORCH_CHECK(
            (entry.rows == nullptr ||
             kernels.in_range(entry.rows, entry.wide_rows, 0, entry.out_rows, entry.in_rows)) &&
                (entry.cols == nullptr ||
                 kernels.in_range(entry.cols, entry.wide_cols, 0, entry.out_cols, entry.in_cols)),
            kName, ": an index lies outside a tensor of ", entry.in_rows, " x ", entry.in_cols);
        runs.push_back(kept_runs(entry));
    }
    parallel_rows(entries, &GatherTensor::out_rows, [&](size_t i, int64_t begin, int64_t end) {
        kernels.rows(entries[i], runs[i].data(), static_cast<int64_t>(runs[i].size()), begin, end);
    });
}

void run_backward(const std::vector<GatherTensor>& entries, const TensorList&) {
    const auto& kernels = PVF_CPU_KERNELS_OF(structured_gather_cpu);
    parallel_rows(entries, &GatherTensor::in_rows, [&](size_t i, int64_t begin, int64_t end) {
        kernels.backward(entries[i], begin, end);
    });
}

#else

template <typename F>
void launch_all(const std::vector<GatherTensor>& entries, int64_t GatherTensor::* rows,
                int64_t GatherTensor::* cols, void* stream, int32_t* out_of_range,
                const F& launch) {
    for (size_t first = 0; first < entries.size(); first += kMaxGatherTensors) {
        StructuredGatherParams params{};
        const size_t last = std::min(first + kMaxGatherTensors, entries.size());
        params.count = static_cast<int32_t>(last - first);
        params.out_of_range = out_of_range;
        for (size_t i = first; i < last; ++i) {
            auto& entry = params.tensors[i - first];
            entry = entries[i];
            entry.tile_begin = params.tiles;
            params.tiles += gather_row_tiles(entry.*rows) * gather_col_tiles(entry.*cols);
        }
        check_grid(kName, params.tiles);
        check_launch(kName, launch(params, stream));
    }
}

void run(const std::vector<GatherTensor>& entries, const TensorList& tensors) {
    LaunchScope scope(tensors.at(0));
    const Tensor flag = zeros(tensors.at(0), {1}, DType::Int);
    launch_all(entries, &GatherTensor::out_rows, &GatherTensor::out_cols, scope.stream(),
               static_cast<int32_t*>(flag.data_ptr()), structured_gather_cuda);
    int32_t out_of_range = 0;
    check_launch(kName, structured_gather_read_flag(static_cast<const int32_t*>(flag.data_ptr()),
                                                    &out_of_range, scope.stream()));
    STD_TORCH_CHECK(out_of_range == 0, kName, ": an index lies outside its tensor");
}

void run_backward(const std::vector<GatherTensor>& entries, const TensorList& grads) {
    LaunchScope scope(grads.at(0));
    launch_all(entries, &GatherTensor::in_rows, &GatherTensor::in_cols, scope.stream(), nullptr,
               structured_gather_backward_cuda);
}

#endif

TensorList structured_gather(TensorList tensors, TensorList indices, IntList rows, IntList cols,
                             TensorList scales, IntList row_scale, IntList col_scale) {
    const size_t count = tensors.size();
    STD_TORCH_CHECK(rows.size() == count && cols.size() == count && row_scale.size() == count &&
                        col_scale.size() == count,
                    kName, ": one place a tensor in `rows`, `cols`, `row_scale` and `col_scale`");
    const TensorList dense_indices = contiguous(indices);
    const TensorList dense_scales = contiguous(scales);
    TensorList out;
    std::vector<GatherTensor> entries;
    for (size_t i = 0; i < count; ++i) {
        const Tensor& tensor = tensors[i];
        STD_TORCH_CHECK(tensor.dim() == 1 || tensor.dim() == 2, kName, ": `tensors[", i,
                        "]` must have rank 1 or 2, got rank ", tensor.dim());
        const Tensor* row_index = at(dense_indices, rows[i]);
        const Tensor* col_index = at(dense_indices, cols[i]);
        check_index(row_index);
        check_index(col_index);
        GatherTensor t{};
        t.in = tensor.data_ptr();
        t.in_rows = rows_of(tensor);
        t.in_cols = cols_of(tensor);
        t.row_stride = row_stride(tensor);
        t.col_stride = tensor.dim() == 2 ? tensor.stride(1) : 1;
        t.rows = data(row_index);
        t.cols = data(col_index);
        t.wide_rows = wide(row_index);
        t.wide_cols = wide(col_index);
        t.out_rows = row_index == nullptr ? t.in_rows : row_index->numel();
        t.out_cols = col_index == nullptr ? t.in_cols : col_index->numel();
        t.row_scale = scale_data(at(dense_scales, row_scale[i]), t.out_rows, tensor);
        t.col_scale = scale_data(at(dense_scales, col_scale[i]), t.out_cols, tensor);
        t.element_size = static_cast<int32_t>(tensor.element_size());
        if (t.row_scale != nullptr || t.col_scale != nullptr) {
            t.type = float_type(kName, tensor);
        }
        out.push_back(tensor.dim() == 2 ? empty(tensor, {t.out_rows, t.out_cols})
                                        : empty(tensor, {t.out_rows}));
        t.out = out.back().data_ptr();
        if (tensor.dim() == 1) {
            lay_down(t);
        }
        if (t.out_rows * t.out_cols > 0) {
            entries.push_back(t);
        }
    }
    if (!entries.empty()) {
        run(entries, tensors);
    }
    return out;
}

TensorList structured_gather_backward(TensorList grads, TensorList indices, TensorList orders,
                                      IntList rows, IntList cols, TensorList scales,
                                      IntList row_scale, IntList col_scale, IntList row_sizes,
                                      IntList col_sizes) {
    const TensorList dense_indices = contiguous(indices);
    const TensorList dense_orders = contiguous(orders);
    const TensorList dense_scales = contiguous(scales);
    const TensorList dense_grads = contiguous(grads);
    TensorList out;
    std::vector<GatherTensor> entries;
    for (size_t i = 0; i < grads.size(); ++i) {
        const Tensor& grad = dense_grads[i];
        GatherTensor t{};
        t.in = grad.data_ptr();
        t.out_rows = rows_of(grad);
        t.out_cols = cols_of(grad);
        t.in_rows = row_sizes.at(i);
        t.in_cols = col_sizes.at(i);
        t.rows = data(at(dense_indices, rows.at(i)));
        t.cols = data(at(dense_indices, cols.at(i)));
        STD_TORCH_CHECK((t.rows == nullptr || wide(at(dense_indices, rows[i]))) &&
                            (t.cols == nullptr || wide(at(dense_indices, cols[i]))),
                        "structured_gather_backward: sorted indices must be int64");
        t.row_order = static_cast<const int64_t*>(data(at(dense_orders, rows[i])));
        t.col_order = static_cast<const int64_t*>(data(at(dense_orders, cols[i])));
        t.row_scale = scale_data(at(dense_scales, row_scale.at(i)), t.out_rows, grad);
        t.col_scale = scale_data(at(dense_scales, col_scale.at(i)), t.out_cols, grad);
        t.type = float_type(kName, grad);
        out.push_back(grad.dim() == 2 ? empty(grad, {t.in_rows, t.in_cols})
                                      : empty(grad, {t.in_rows}));
        t.out = out.back().data_ptr();
        if (grad.dim() == 1) {
            lay_down(t);
        }
        if (t.in_rows * t.in_cols > 0) {
            entries.push_back(t);
        }
    }
    if (!entries.empty()) {
        run_backward(entries, grads);
    }
    return out;
}

}  // namespace
}  // namespace pyvitfast

#if PVF_DEFINES_SCHEMAS
STABLE_TORCH_LIBRARY_FRAGMENT(pyvitfast, m) {
    m.def(
        "structured_gather(Tensor[] tensors, Tensor[] indices, int[] rows, int[] cols, Tensor[] "
        "scales, "
        "int[] row_scale, int[] col_scale) -> Tensor[]");
    m.def(
        "structured_gather_backward(Tensor[] grads, Tensor[] indices, Tensor[] orders, int[] rows, "
        "int[] cols, "
        "Tensor[] scales, int[] row_scale, int[] col_scale, SymInt[] row_sizes, SymInt[] "
        "col_sizes) -> Tensor[]");
}
#endif

PVF_IMPL(m) {
    m.impl("structured_gather", TORCH_BOX(&pyvitfast::structured_gather));
    m.impl("structured_gather_backward", TORCH_BOX(&pyvitfast::structured_gather_backward));
}
