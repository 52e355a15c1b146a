#include "ops/scaled_sqnorm/scaled_sqnorm.h"

#include "scaled_tensor.h"

namespace pyvitfast {

#if PVF_CPU_KERNELS
PVF_DECLARE_CPU_KERNELS(ScaledSqnormCpu, scaled_sqnorm_cpu)
#else
const char* scaled_sqnorm_cuda(const ScaledSqnormParams& params, void* stream);
#endif

namespace {

constexpr const char* kName = "scaled_sqnorm";

Tensor scaled_sqnorm(TensorList grads, TensorList scales, int64_t group_size) {
    STD_TORCH_CHECK(grads.size() == scales.size() && !grads.empty(), kName,
                    ": one scale tensor a gradient, and at least one");
    const TensorList dense = contiguous_all(grads);
    const TensorList factors = contiguous_all(scales);
    std::vector<SqnormTensor> entries;
    int64_t chunks = 0;
    for (size_t i = 0; i < dense.size(); ++i) {
        SqnormTensor entry{};
        entry.type = float_type(kName, dense[i]);
        entry.grad = dense[i].data_ptr();
        entry.numel = dense[i].numel();
        entry.layout =
            scale_layout(kName, dense[i], factors[i], group_size,
                         entry.type == FloatType::kFloat64 ? DType::Double : DType::Float);
        entry.chunk_begin = chunks;
        chunks += sqnorm_chunks(entry.numel);
        entries.push_back(entry);
    }
    Tensor result = empty(dense[0], {}, DType::Double);
    const int64_t groups = (chunks + kSumChunk - 1) / kSumChunk;
    const Tensor workspace = empty(result, {chunks + groups}, DType::Double);
    auto* sums = static_cast<double*>(workspace.data_ptr());
    auto* out = static_cast<double*>(result.data_ptr());
#if PVF_CPU_KERNELS
    const auto& kernels = PVF_CPU_KERNELS_OF(scaled_sqnorm_cpu);
    std::vector<int64_t> sizes;
    for (const auto& entry : entries) {
        sizes.push_back(entry.numel);
    }
    parallel_parts(sizes, kSumChunk, 32, [&](size_t i, int64_t part, int64_t begin, int64_t end) {
        sums[entries[i].chunk_begin + part] = kernels.chunk(entries[i], begin, end);
    });
    *out = kernels.total(sums, chunks);
#else
    if (chunks == 0) {
        return torch::stable::fill_(result, 0.0);
    }
    LaunchScope scope(result);
    const Tensor ticket = zeros(result, {1}, DType::Int);
    ScaledSqnormParams params{};
    params.all_chunks = chunks;
    params.sums = sums;
    params.ticket = static_cast<int32_t*>(ticket.data_ptr());
    params.result = out;
    for (const auto& entry : entries) {
        params.all_tiles += sqnorm_blocks(entry.numel);
    }
    launch_in_tables(
        kName, entries, kMaxSqnormTensors, params,
        [](const SqnormTensor& entry) { return sqnorm_blocks(entry.numel); },
        [&](const ScaledSqnormParams& p, size_t) { return scaled_sqnorm_cuda(p, scope.stream()); });
#endif
    return result;
}

}  // namespace
}  // namespace pyvitfast

#if PVF_DEFINES_SCHEMAS
STABLE_TORCH_LIBRARY_FRAGMENT(pyvitfast, m) {
    m.def("scaled_sqnorm(Tensor[] grads, Tensor[] scales, int group_size) -> Tensor");
}
#endif

PVF_IMPL(m) { m.impl("scaled_sqnorm", TORCH_BOX(&pyvitfast::scaled_sqnorm)); }
