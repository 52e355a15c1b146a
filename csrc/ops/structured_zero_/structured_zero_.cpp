#include "ops/structured_zero_/structured_zero_.h"

#include <algorithm>
#include <utility>

#include "adaptor.h"

namespace pyvitfast {

#if PVF_CPU_KERNELS
PVF_DECLARE_CPU_KERNELS(StructuredZeroCpu, structured_zero_cpu)
#else
const char* structured_zero_cuda(const StructuredZeroParams& params, void* stream);
#endif

namespace {

constexpr const char* kName = "structured_zero_";

const bool* mask_of(const TensorList& masks, int64_t place, int64_t size) {
    const Tensor* mask = at(masks, place);
    if (mask == nullptr) {
        return nullptr;
    }
    STD_TORCH_CHECK(mask->numel() == size && mask->scalar_type() == DType::Bool, kName,
                    ": a mask must be bool [", size, "], got ", mask->numel(), " entries");
    return static_cast<const bool*>(mask->data_ptr());
}

std::vector<ZeroTensor> describe(const TensorList& tensors, const TensorList& masks,
                                 const IntList& row_mask, const IntList& col_mask) {
    STD_TORCH_CHECK(row_mask.size() == tensors.size() && col_mask.size() == tensors.size(), kName,
                    ": one row mask and one column mask a tensor");
    std::vector<ZeroTensor> out;
    for (size_t i = 0; i < tensors.size(); ++i) {
        const Tensor& tensor = tensors[i];
        STD_TORCH_CHECK(tensor.dim() == 1 || tensor.dim() == 2, kName, ": `tensors[", i,
                        "]` must have rank 1 or 2, got rank ", tensor.dim());
        ZeroTensor entry{};
        entry.data = tensor.data_ptr();
        entry.rows = rows_of(tensor);
        entry.cols = cols_of(tensor);
        entry.row_stride = row_stride(tensor);
        entry.col_stride = tensor.dim() == 2 ? tensor.stride(1) : 1;
        entry.row_alive = mask_of(masks, row_mask[i], entry.rows);
        entry.col_alive = mask_of(masks, col_mask[i], entry.cols);
        entry.element_size = static_cast<int32_t>(tensor.element_size());
        // Columns are the direction that lies in memory, so vectors and transposed matrices are
        // turned.
        if (tensor.dim() == 1 || entry.row_stride < entry.col_stride) {
            std::swap(entry.rows, entry.cols);
            std::swap(entry.row_stride, entry.col_stride);
            std::swap(entry.row_alive, entry.col_alive);
        }
        if (entry.rows * entry.cols > 0 &&
            (entry.row_alive != nullptr || entry.col_alive != nullptr)) {
            out.push_back(entry);
        }
    }
    return out;
}

#if PVF_CPU_KERNELS

std::vector<DeadRun> dead_runs(const bool* alive, int64_t size) {
    std::vector<DeadRun> runs;
    for (int64_t i = 0; alive != nullptr && i < size; ++i) {
        if (alive[i]) {
            continue;
        }
        if (!runs.empty() && runs.back().begin + runs.back().length == i) {
            ++runs.back().length;
        } else {
            runs.push_back({i, 1});
        }
    }
    return runs;
}

void run(const std::vector<ZeroTensor>& entries, const TensorList&) {
    const auto& kernels = PVF_CPU_KERNELS_OF(structured_zero_cpu);
    std::vector<std::vector<DeadRun>> runs;
    for (const auto& entry : entries) {
        runs.push_back(dead_runs(entry.col_alive, entry.cols));
    }
    parallel_rows(entries, &ZeroTensor::rows, [&](size_t i, int64_t begin, int64_t end) {
        kernels.rows(entries[i], runs[i].data(), static_cast<int64_t>(runs[i].size()), begin, end);
    });
}

#else

void run(const std::vector<ZeroTensor>& entries, const TensorList& tensors) {
    LaunchScope scope(tensors.at(0));
    for (size_t first = 0; first < entries.size(); first += kMaxZeroTensors) {
        StructuredZeroParams params{};
        const size_t last = std::min(first + kMaxZeroTensors, entries.size());
        params.count = static_cast<int32_t>(last - first);
        for (size_t i = first; i < last; ++i) {
            auto& entry = params.tensors[i - first];
            entry = entries[i];
            entry.tile_begin = params.tiles;
            params.tiles += zero_row_tiles(entry.rows) * zero_col_tiles(entry.cols);
        }
        check_grid(kName, params.tiles);
        check_launch(kName, structured_zero_cuda(params, scope.stream()));
    }
}

#endif

void structured_zero_(TensorList tensors, TensorList masks, IntList row_mask, IntList col_mask) {
    TensorList dense;
    for (const Tensor& mask : masks) {
        dense.push_back(torch::stable::contiguous(mask));
    }
    const auto entries = describe(tensors, dense, row_mask, col_mask);
    if (!entries.empty()) {
        run(entries, tensors);
    }
}

}  // namespace
}  // namespace pyvitfast

#if PVF_DEFINES_SCHEMAS
STABLE_TORCH_LIBRARY_FRAGMENT(pyvitfast, m) {
    m.def(
        "structured_zero_(Tensor(a!)[] tensors, Tensor[] masks, int[] row_mask, int[] col_mask) -> "
        "()");
}
#endif

PVF_IMPL(m) { m.impl("structured_zero_", TORCH_BOX(&pyvitfast::structured_zero_)); }
