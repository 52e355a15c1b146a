#include "ops/saliency_commit_/saliency_commit_.h"

#include <atomic>

#include "adaptor.h"

namespace pyvitfast {

#if PVF_CPU_KERNELS
PVF_DECLARE_CPU_KERNELS(SaliencyCommitCpu, saliency_commit_cpu)
#else
const char* saliency_commit_cuda(const SaliencyCommitParams& params, void* stream);
#endif

namespace {

constexpr const char* kName = "saliency_commit_";

#if PVF_CPU_KERNELS

void run(const SaliencyCommitParams& p, const Tensor&) {
    const auto& kernels = PVF_CPU_KERNELS_OF(saliency_commit_cpu);
    constexpr int64_t kGrain = 2048;
    const auto all = [&](int64_t size,
                         bool (*check)(const SaliencyCommitParams&, int64_t, int64_t)) {
        std::atomic<bool> good{true};
        torch::stable::parallel_for(0, size, kGrain, [&](int64_t begin, int64_t end) {
            if (!check(p, begin, end)) {
                good.store(false, std::memory_order_relaxed);
            }
        });
        return good.load();
    };
    STD_TORCH_CHECK(kernels.valid(p, 0, 0) && all(p.units, kernels.valid), kName,
                    ": `indptr` must rise from 0 to the length of `indices`, ", p.entries,
                    ", and `indices` must lie in [0, ", p.size, ")");
    const bool clean = all(p.size, kernels.finite) & all(p.units, kernels.square);
    if (clean) {
        torch::stable::parallel_for(
            0, p.units, kGrain, [&](int64_t begin, int64_t end) { kernels.add(p, begin, end); });
    }
    p.counts[clean ? 0 : 1] += 1;
}

#else

void run(SaliencyCommitParams& p, const Tensor& acc) {
    LaunchScope scope(acc);
    const Tensor unclean = zeros(acc, {1}, DType::Int);
    p.unclean = static_cast<int32_t*>(unclean.data_ptr());
    check_launch(kName, saliency_commit_cuda(p, scope.stream()));
}

#endif

void saliency_commit_(Tensor acc, Tensor counts, Tensor workspace, Tensor indptr, Tensor indices,
                      std::optional<Tensor> coeff) {
    STD_TORCH_CHECK(acc.is_contiguous() && counts.is_contiguous(), kName,
                    ": `acc` and `counts` are written in place and must be contiguous");
    STD_TORCH_CHECK(counts.numel() == 2 && counts.scalar_type() == DType::Long, kName,
                    ": `counts` must be int64 [2]");
    STD_TORCH_CHECK(indptr.numel() == acc.numel() + 1, kName,
                    ": `indptr` must have one entry more than `acc`");
    STD_TORCH_CHECK(acc.scalar_type() == workspace.scalar_type() &&
                        indptr.scalar_type() == indices.scalar_type(),
                    kName,
                    ": `workspace` must have the dtype of `acc`, `indices` that of `indptr`");
    const Tensor dense_workspace = torch::stable::contiguous(workspace);
    const Tensor dense_indptr = torch::stable::contiguous(indptr);
    const Tensor dense_indices = torch::stable::contiguous(indices);
    std::optional<Tensor> dense_coeff;
    if (coeff) {
        STD_TORCH_CHECK(coeff->numel() == acc.numel() && coeff->scalar_type() == acc.scalar_type(),
                        kName, ": `coeff` must have the size and dtype of `acc`");
        dense_coeff = torch::stable::contiguous(*coeff);
    }
    const Tensor squares = torch::stable::empty_like(acc);
    SaliencyCommitParams p{};
    p.acc = acc.data_ptr();
    p.counts = static_cast<int64_t*>(counts.data_ptr());
    p.workspace = dense_workspace.data_ptr();
    p.indptr = dense_indptr.data_ptr();
    p.indices = dense_indices.data_ptr();
    p.coeff = dense_coeff ? dense_coeff->data_ptr() : nullptr;
    p.squares = squares.data_ptr();
    p.units = acc.numel();
    p.size = workspace.numel();
    p.entries = indices.numel();
    p.wide = acc.scalar_type() == DType::Double;
    p.wide_indices = indptr.scalar_type() == DType::Long;
    run(p, acc);
}

}  // namespace
}  // namespace pyvitfast

#if PVF_DEFINES_SCHEMAS
STABLE_TORCH_LIBRARY_FRAGMENT(pyvitfast, m) {
    m.def(
        "saliency_commit_(Tensor(a!) acc, Tensor(b!) counts, Tensor workspace, Tensor indptr, "
        "Tensor indices, "
        "Tensor? coeff=None) -> ()");
}
#endif

PVF_IMPL(m) { m.impl("saliency_commit_", TORCH_BOX(&pyvitfast::saliency_commit_)); }
