#include "ops/saliency_rowcol/saliency_rowcol.h"

#include <algorithm>

#include "adaptor.h"

namespace pyvitfast {

#if PVF_CPU_KERNELS
PVF_DECLARE_CPU_KERNELS(SaliencyRowcolCpu, saliency_rowcol_cpu)
#else
const char* saliency_rowcol_cuda(const SaliencyRowcolParams& params, bool double_sums,
                                 void* stream);
const char* saliency_rowcol_backward_cuda(const SaliencyRowcolParams& params, bool double_sums,
                                          void* stream);
#endif

namespace {

constexpr const char* kName = "saliency_rowcol";

struct Inputs {
    TensorList weights;
    TensorList grads;
    std::vector<SaliencyMatrix> matrices;
    int64_t sums = 0;
    bool double_sums = false;
};

Inputs describe(const TensorList& weights, const TensorList& grads) {
    STD_TORCH_CHECK(weights.size() == grads.size(), kName, ": `grads` must have ", weights.size(),
                    " entries, got ", grads.size());
    Inputs in;
    for (size_t i = 0; i < weights.size(); ++i) {
        const Tensor weight = with_dense_rows(weights[i]);
        const Tensor grad = with_dense_rows(grads[i]);
        STD_TORCH_CHECK(weight.dim() == 1 || weight.dim() == 2, kName, ": `weights[", i,
                        "]` must have rank 1 or 2, got rank ", weight.dim());
        STD_TORCH_CHECK(weight.dim() == grad.dim() && rows_of(weight) == rows_of(grad) &&
                            cols_of(weight) == cols_of(grad),
                        kName, ": `grads[", i, "]` must have the shape of `weights[", i, "]`");
        SaliencyMatrix matrix{};
        matrix.weight = weight.data_ptr();
        matrix.grad = grad.data_ptr();
        matrix.rows = rows_of(weight);
        matrix.cols = cols_of(weight);
        matrix.weight_stride = row_stride(weight);
        matrix.grad_stride = row_stride(grad);
        matrix.sums_offset = in.sums;
        matrix.weight_type = float_type(kName, weight);
        matrix.grad_type = float_type(kName, grad);
        const bool wide = matrix.weight_type == FloatType::kFloat64;
        STD_TORCH_CHECK(
            wide == (matrix.grad_type == FloatType::kFloat64) && (i == 0 || wide == in.double_sums),
            kName, ": float64 cannot be mixed with other dtypes in one call");
        in.double_sums = wide;
        in.sums += matrix.rows + matrix.cols;
        in.matrices.push_back(matrix);
        in.weights.push_back(weight);
        in.grads.push_back(grad);
    }
    return in;
}

std::optional<Tensor> as_float(const std::optional<Tensor>& inv_scale) {
    if (!inv_scale) {
        return {};
    }
    STD_TORCH_CHECK(inv_scale->numel() == 1, kName, ": `inv_scale` must have one element");
    return inv_scale->scalar_type() == DType::Float ? *inv_scale
                                                    : torch::stable::to(*inv_scale, DType::Float);
}

DType sums_dtype(const Inputs& in) { return in.double_sums ? DType::Double : DType::Float; }

#if PVF_CPU_KERNELS

double scale_value(const std::optional<Tensor>& inv_scale) {
    return inv_scale ? static_cast<double>(*static_cast<const float*>(inv_scale->data_ptr())) : 1.0;
}

struct Task {
    size_t matrix;
    int64_t begin;
    int64_t end;
    int64_t start;  // elements before this task, so that threads get equal shares of the bytes
};

std::vector<Task> row_tasks(const Inputs& in, int64_t* elements) {
    std::vector<Task> tasks;
    *elements = 0;
    for (size_t i = 0; i < in.matrices.size(); ++i) {
        const auto& matrix = in.matrices[i];
        for (int64_t row = 0; row < matrix.rows; row += kSaliencyCpuTileRows) {
            const int64_t end = std::min(row + kSaliencyCpuTileRows, matrix.rows);
            tasks.push_back({i, row, end, *elements});
            *elements += (end - row) * (matrix.cols + 1);
        }
    }
    return tasks;
}

template <typename F>
void for_each_task(const std::vector<Task>& tasks, int64_t elements, const F& f) {
    constexpr int64_t kGrain = 32768;
    torch::stable::parallel_for(0, elements, kGrain, [&](int64_t begin, int64_t end) {
        auto task = std::lower_bound(tasks.begin(), tasks.end(), begin,
                                     [](const Task& t, int64_t value) { return t.start < value; });
        for (; task != tasks.end() && task->start < end; ++task) {
            f(*task);
        }
    });
}

void run(Inputs& in, const std::optional<Tensor>& inv_scale, bool absolute, Tensor& sums) {
    const auto& kernels = PVF_CPU_KERNELS_OF(saliency_rowcol_cpu);
    int64_t partials_size = 0;
    int64_t columns = 0;
    std::vector<Task> column_tasks;
    for (size_t i = 0; i < in.matrices.size(); ++i) {
        auto& matrix = in.matrices[i];
        matrix.partials_offset = partials_size;
        const int64_t tiles = (matrix.rows + kSaliencyCpuTileRows - 1) / kSaliencyCpuTileRows;
        partials_size += tiles * matrix.cols;
        constexpr int64_t kChunk = 512;
        for (int64_t col = 0; col < matrix.cols; col += kChunk) {
            const int64_t end = std::min(col + kChunk, matrix.cols);
            column_tasks.push_back({i, col, end, columns});
            columns += (end - col) * (tiles + 1);
        }
    }
    const Tensor partials = empty(sums, {partials_size}, DType::Double);
    auto* partial = static_cast<double*>(partials.data_ptr());
    const double scale = scale_value(inv_scale);
    int64_t elements = 0;
    const auto tasks = row_tasks(in, &elements);
    for_each_task(tasks, elements, [&](const Task& task) {
        const auto& matrix = in.matrices[task.matrix];
        double* own =
            partial + matrix.partials_offset + task.begin / kSaliencyCpuTileRows * matrix.cols;
        kernels.tile(matrix, absolute, task.begin, task.end, own, sums.data_ptr(), scale,
                     in.double_sums);
    });
    for_each_task(column_tasks, columns, [&](const Task& task) {
        const auto& matrix = in.matrices[task.matrix];
        const int64_t tiles = (matrix.rows + kSaliencyCpuTileRows - 1) / kSaliencyCpuTileRows;
        kernels.columns(matrix, task.begin, task.end, partial + matrix.partials_offset, tiles,
                        sums.data_ptr(), scale, in.double_sums);
    });
}

void run_backward(Inputs& in, const std::optional<Tensor>& inv_scale, bool absolute,
                  const Tensor& sums) {
    const auto& kernels = PVF_CPU_KERNELS_OF(saliency_rowcol_cpu);
    const double scale = scale_value(inv_scale);
    int64_t elements = 0;
    const auto tasks = row_tasks(in, &elements);
    for_each_task(tasks, elements, [&](const Task& task) {
        kernels.backward(in.matrices[task.matrix], absolute, task.begin, task.end, sums.data_ptr(),
                         scale, in.double_sums);
    });
}

#else

// Splits the matrices over as many launches as the parameter table needs: one, for any common
// model.
template <typename F>
void launch_all(const Inputs& in, const std::optional<Tensor>& inv_scale, bool absolute,
                const Tensor& sums, void* partials, int32_t* tickets, const F& launch) {
    LaunchScope scope(sums);
    for (size_t first = 0; first < in.matrices.size(); first += kMaxSaliencyMatrices) {
        SaliencyRowcolParams params{};
        const size_t last = std::min(first + kMaxSaliencyMatrices, in.matrices.size());
        params.count = static_cast<int32_t>(last - first);
        params.absolute = absolute;
        params.sums = sums.data_ptr();
        params.partials = partials;
        params.tickets = tickets == nullptr ? nullptr : tickets + first;
        params.inv_scale = inv_scale ? static_cast<const float*>(inv_scale->data_ptr()) : nullptr;
        for (size_t i = first; i < last; ++i) {
            auto& matrix = params.matrices[i - first];
            matrix = in.matrices[i];
            matrix.tile_begin = params.tiles;
            // A matrix without elements still has sums to write, of zeros.
            const int64_t tiles = saliency_row_tiles(matrix.rows) * saliency_col_tiles(matrix.cols);
            params.tiles += std::max<int64_t>(tiles, 1);
        }
        check_grid(kName, params.tiles);
        check_launch(kName, launch(params, in.double_sums, scope.stream()));
    }
}

void run(Inputs& in, const std::optional<Tensor>& inv_scale, bool absolute, Tensor& sums) {
    int64_t partials_size = 0;
    for (auto& matrix : in.matrices) {
        matrix.partials_offset = partials_size;
        partials_size += saliency_partial_count(matrix.rows, matrix.cols);
    }
    const Tensor partials = empty(sums, {partials_size}, sums_dtype(in));
    const Tensor tickets = zeros(sums, {static_cast<int64_t>(in.matrices.size())}, DType::Int);
    launch_all(in, inv_scale, absolute, sums, partials.data_ptr(),
               static_cast<int32_t*>(tickets.data_ptr()), saliency_rowcol_cuda);
}

void run_backward(Inputs& in, const std::optional<Tensor>& inv_scale, bool absolute,
                  const Tensor& sums) {
    launch_all(in, inv_scale, absolute, sums, nullptr, nullptr, saliency_rowcol_backward_cuda);
}

#endif

Tensor saliency_rowcol(TensorList weights, TensorList grads, std::optional<Tensor> inv_scale,
                       bool abs) {
    Inputs in = describe(weights, grads);
    Tensor sums = empty(weights.at(0), {in.sums}, sums_dtype(in));
    run(in, as_float(inv_scale), abs, sums);
    return sums;
}

TensorList saliency_rowcol_backward(Tensor grad, TensorList weights, TensorList grads,
                                    std::optional<Tensor> inv_scale, bool abs) {
    Inputs in = describe(weights, grads);
    const Tensor slopes = torch::stable::contiguous(grad);
    STD_TORCH_CHECK(slopes.numel() == in.sums && slopes.scalar_type() == sums_dtype(in),
                    "saliency_rowcol_backward: `grad` must have the size and dtype of the sums");
    TensorList out;
    const auto allocate = [&](const TensorList& tensors, void* SaliencyMatrix::* target) {
        for (size_t i = 0; i < tensors.size(); ++i) {
            const auto sizes = tensors[i].sizes();
            out.push_back(empty(tensors[i], {sizes.begin(), sizes.end()}));
            in.matrices[i].*target = out.back().data_ptr();
        }
    };
    allocate(weights, &SaliencyMatrix::weight_grad);
    allocate(grads, &SaliencyMatrix::grad_grad);
    run_backward(in, as_float(inv_scale), abs, slopes);
    return out;
}

}  // namespace
}  // namespace pyvitfast

#if PVF_DEFINES_SCHEMAS
STABLE_TORCH_LIBRARY_FRAGMENT(pyvitfast, m) {
    // No defaults: torch before 2.14 drops trailing arguments that equal them and then finds the
    // gradient's structure wrong.
    m.def(
        "saliency_rowcol(Tensor[] weights, Tensor[] grads, Tensor? inv_scale, bool abs) "
        "-> Tensor");
    m.def(
        "saliency_rowcol_backward(Tensor grad, Tensor[] weights, Tensor[] grads, Tensor? "
        "inv_scale, bool abs) "
        "-> Tensor[]");
}
#endif

PVF_IMPL(m) {
    m.impl("saliency_rowcol", TORCH_BOX(&pyvitfast::saliency_rowcol));
    m.impl("saliency_rowcol_backward", TORCH_BOX(&pyvitfast::saliency_rowcol_backward));
}
