#include "ops/spsa_update_/spsa_update_.h"

#include <cmath>

#include "scaled_tensor.h"

namespace pyvitfast {

#if PVF_CPU_KERNELS
PVF_DECLARE_CPU_KERNELS(SpsaUpdateCpu, spsa_update_cpu)
#else
const char* spsa_update_cuda(const SpsaUpdateParams& params, void* stream);
#endif

namespace {

constexpr const char* kName = "spsa_update_";

void run(const std::vector<UpdateTensor>& entries, const UpdateOptions& options,
         [[maybe_unused]] const Tensor& device) {
#if PVF_CPU_KERNELS
    const auto& kernels = PVF_CPU_KERNELS_OF(spsa_update_cpu);
    std::vector<int64_t> sizes;
    for (const auto& entry : entries) {
        sizes.push_back(entry.numel);
    }
    parallel_parts(sizes, kUpdatePart, 1, [&](size_t i, int64_t, int64_t begin, int64_t end) {
        kernels.part(entries[i], options, begin, end);
    });
#else
    LaunchScope scope(device);
    SpsaUpdateParams params{};
    params.options = options;
    launch_in_tables(
        kName, entries, kMaxUpdateTensors, params,
        [](const UpdateTensor& entry) { return update_tiles(entry.numel, entry.offset); },
        [&](const SpsaUpdateParams& p, size_t) { return spsa_update_cuda(p, scope.stream()); });
#endif
}

void spsa_update_(TensorList grads, TensorList scales, Tensor slopes, Tensor sqnorm, int64_t seed,
                  IntList tensor_ids, IntList offsets, int64_t direction, double one_minus_beta,
                  int64_t noise, int64_t group_size) {
    const size_t count = grads.size();
    STD_TORCH_CHECK(count > 0 && scales.size() == count && tensor_ids.size() == count &&
                        offsets.size() == count,
                    kName, ": one scale tensor, id and offset a gradient");
    STD_TORCH_CHECK(sqnorm.scalar_type() == DType::Double && sqnorm.numel() == 1, kName,
                    ": `sqnorm` must be float64 of one element");
    STD_TORCH_CHECK(slopes.numel() >= 1 && direction >= 0 && noise >= 0 && noise <= 4, kName,
                    ": slopes, direction or noise are out of range");
    const TensorList dense = contiguous_all(grads);
    const TensorList factors = contiguous_all(scales);
    const Tensor wide = torch::stable::contiguous(torch::stable::to(slopes, DType::Double));
    UpdateOptions options{};
    options.seed = static_cast<uint64_t>(seed);
    options.sqrt_beta = std::sqrt(1.0 - one_minus_beta);
    options.sqnorm = static_cast<const double*>(sqnorm.data_ptr());
    options.slopes = static_cast<const double*>(wide.data_ptr());
    options.spread = static_cast<float>(std::sqrt(one_minus_beta));
    options.noise = static_cast<Noise>(noise);
    options.direction = static_cast<uint32_t>(direction);
    options.directions = static_cast<int32_t>(wide.numel());
    std::vector<UpdateTensor> entries;
    for (size_t i = 0; i < count; ++i) {
        UpdateTensor entry{};
        entry.grad = dense[i].data_ptr();
        entry.type = float_type(kName, dense[i]);
        STD_TORCH_CHECK(entry.type != FloatType::kFloat64, kName, ": `grads[", i,
                        "]` must not be float64");
        entry.layout = scale_layout(kName, dense[i], factors[i], group_size, DType::Float);
        entry.numel = dense[i].numel();
        entry.offset = offsets[i];
        entry.id = static_cast<uint32_t>(tensor_ids[i]);
        entries.push_back(entry);
    }
    run(entries, options, dense[0]);
    for (size_t i = 0; i < count; ++i) {
        if (dense[i].data_ptr() != grads[i].data_ptr()) {
            torch::stable::copy_(grads[i], dense[i]);
        }
    }
}

}  // namespace
}  // namespace pyvitfast

#if PVF_DEFINES_SCHEMAS
STABLE_TORCH_LIBRARY_FRAGMENT(pyvitfast, m) {
    m.def(
        "spsa_update_(Tensor(a!)[] grads, Tensor[] scales, Tensor slopes, Tensor sqnorm, int seed, "
        "int[] tensor_ids, int[] offsets, int direction, float one_minus_beta, int noise, int "
        "group_size) -> ()");
}
#endif

PVF_IMPL(m) { m.impl("spsa_update_", TORCH_BOX(&pyvitfast::spsa_update_)); }
