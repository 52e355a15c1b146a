#pragma once

// What the adaptors of all ops share: registration, and the bridge from torch's stable ABI to
// pointers and sizes. An adaptor is compiled for _ops (CPU kernels), _ops_cuda and _ops_emulated
// (CUDA kernels).

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "float_type.h"

#if defined(PVF_CUDA_LIBRARY) || defined(PYVITFAST_EMULATED)
#define PVF_CPU_KERNELS 0
#else
#include "cpu_capability.h"
#define PVF_CPU_KERNELS 1
#endif

// Schemas are defined once, by the library that is loaded first.
#if defined(PVF_CUDA_LIBRARY)
#define PVF_DEFINES_SCHEMAS 0
#define PVF_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(pyvitfast, CUDA, m)
#else
#define PVF_DEFINES_SCHEMAS 1
#define PVF_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(pyvitfast, CPU, m)
#endif

namespace pyvitfast {

using DType = torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;
using IntList = std::vector<int64_t>;

inline FloatType float_type(const char* op, const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case DType::Float:
            return FloatType::kFloat32;
        case DType::BFloat16:
            return FloatType::kBFloat16;
        case DType::Half:
            return FloatType::kFloat16;
        case DType::Double:
            return FloatType::kFloat64;
        default:
            break;
    }
    STD_TORCH_CHECK(false, op, ": dtype must be float32, bfloat16, float16 or float64");
    return FloatType::kFloat32;
}

inline int64_t rows_of(const Tensor& tensor) { return tensor.size(0); }
inline int64_t cols_of(const Tensor& tensor) { return tensor.dim() == 2 ? tensor.size(1) : 1; }
inline int64_t row_stride(const Tensor& tensor) { return tensor.stride(0); }

// Rows may lie anywhere, the entries of a row must be neighbours; else one copy.
inline Tensor with_dense_rows(const Tensor& tensor) {
    const bool dense = tensor.dim() == 1 || tensor.size(1) <= 1 || tensor.stride(1) == 1;
    return dense ? tensor : torch::stable::contiguous(tensor);
}

inline Tensor empty(const Tensor& like, std::vector<int64_t> shape,
                    std::optional<DType> dtype = {}) {
    return torch::stable::new_empty(like, shape, dtype);
}

// The same past the dispatcher, which costs several microseconds of a small call. Unlike `empty` it
// knows nothing of torch's deterministic fill, so it is for what is written whole.
inline Tensor empty_quickly(const Tensor& like, const std::vector<int64_t>& shape, DType dtype) {
    std::vector<int64_t> strides(shape.size(), 1);
    for (size_t i = shape.size(); i > 1; --i) {
        strides[i - 2] = strides[i - 1] * std::max<int64_t>(shape[i - 1], 1);
    }
    int32_t device = 0;
    aoti_torch_get_device_type(like.get(), &device);
    AtenTensorHandle made = nullptr;
    STD_TORCH_CHECK(aoti_torch_empty_strided(
                        static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                        torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                        device, like.get_device_index(), &made) == 0,
                    "pyvitfast: memory could not be allocated");
    return Tensor(made);
}

inline Tensor zeros(const Tensor& like, std::vector<int64_t> shape,
                    std::optional<DType> dtype = {}) {
    return torch::stable::new_zeros(like, shape, dtype);
}

inline const Tensor* at(const TensorList& tensors, int64_t place) {
    return place < 0 ? nullptr : &tensors[static_cast<size_t>(place)];
}

#if PVF_CPU_KERNELS

// The rows of all entries shared out over torch's threads: f(entry, first row, past the last).
template <typename Entry, typename F>
void parallel_rows(const std::vector<Entry>& entries, int64_t Entry::* rows, const F& f) {
    std::vector<int64_t> row_begin{0};
    for (const auto& entry : entries) {
        row_begin.push_back(row_begin.back() + entry.*rows);
    }
    constexpr int64_t kGrain = 64;
    torch::stable::parallel_for(0, row_begin.back(), kGrain, [&](int64_t begin, int64_t end) {
        const auto first = std::upper_bound(row_begin.begin(), row_begin.end(), begin);
        for (size_t i = static_cast<size_t>(first - row_begin.begin() - 1);
             i < entries.size() && row_begin[i] < end; ++i) {
            f(i, std::max(begin, row_begin[i]) - row_begin[i],
              std::min(end, row_begin[i + 1]) - row_begin[i]);
        }
    });
}

#else

// The device of the first tensor made current, and its stream, for the time of a launch.
class LaunchScope {
   public:
#if defined(PVF_CUDA_LIBRARY)
    explicit LaunchScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_);
    }
#else
    explicit LaunchScope(const Tensor&) {}
#endif
    void* stream() const { return stream_; }

   private:
#if defined(PVF_CUDA_LIBRARY)
    torch::stable::accelerator::DeviceGuard guard_;
#endif
    void* stream_ = nullptr;
};

// Grids are one-dimensional and may hold 2^31 - 1 blocks.
inline void check_grid(const char* op, int64_t blocks) {
    STD_TORCH_CHECK(blocks < (int64_t{1} << 31), op, ": the tensors of one call need ", blocks,
                    " blocks, more than one launch holds; pass them in several calls");
}

inline void check_launch(const char* op, const char* problem) {
    STD_TORCH_CHECK(problem == nullptr, op, ": the kernel could not be launched: ", problem);
}

#endif

}  // namespace pyvitfast
