#include "ops/spsa_perturb/spsa_perturb.h"

#include <cmath>

#include "scaled_tensor.h"

namespace pyvitfast {

#if PVF_CPU_KERNELS
PVF_DECLARE_CPU_KERNELS(SpsaPerturbCpu, spsa_perturb_cpu)
#else
const char* spsa_perturb_cuda(const SpsaPerturbParams& params, void* stream);
#endif

namespace {

constexpr const char* kName = "spsa_perturb";

void run(const std::vector<PerturbTensor>& entries, const PerturbOptions& options,
         [[maybe_unused]] const Tensor& device) {
#if PVF_CPU_KERNELS
    const auto& kernels = PVF_CPU_KERNELS_OF(spsa_perturb_cpu);
    std::vector<int64_t> sizes;
    for (const auto& entry : entries) {
        sizes.push_back(entry.numel);
    }
    parallel_parts(sizes, kPerturbPart, 1, [&](size_t i, int64_t, int64_t begin, int64_t end) {
        kernels.part(entries[i], options, begin, end);
    });
#else
    LaunchScope scope(device);
    SpsaPerturbParams params{};
    params.options = options;
    launch_in_tables(
        kName, entries, kMaxPerturbTensors, params,
        [](const PerturbTensor& entry) { return perturb_tiles(entry.numel, entry.offset); },
        [&](const SpsaPerturbParams& p, size_t) { return spsa_perturb_cuda(p, scope.stream()); });
#endif
}

TensorList spsa_perturb(TensorList weights, TensorList grads, TensorList scales, Tensor sqnorm,
                        int64_t seed, IntList tensor_ids, IntList offsets, int64_t direction,
                        int64_t directions, double one_minus_beta, double eps_bar, int64_t noise,
                        int64_t grid, int64_t bits, int64_t group_size, DType dtype) {
    const size_t count = weights.size();
    STD_TORCH_CHECK(count > 0 && grads.size() == count && scales.size() == count &&
                        tensor_ids.size() == count && offsets.size() == count,
                    kName, ": one gradient, scale tensor, id and offset a weight");
    STD_TORCH_CHECK(sqnorm.scalar_type() == DType::Double && sqnorm.numel() == 1, kName,
                    ": `sqnorm` must be float64 of one element");
    STD_TORCH_CHECK(directions >= 1 && direction >= 0 && noise >= 0 && noise <= 4, kName,
                    ": directions or noise are out of range");
    const TensorList own = contiguous_all(weights);
    const TensorList slopes = contiguous_all(grads);
    const TensorList factors = contiguous_all(scales);
    PerturbOptions options{};
    options.seed = static_cast<uint64_t>(seed);
    options.sqrt_beta = std::sqrt(1.0 - one_minus_beta);
    options.sqnorm = static_cast<const double*>(sqnorm.data_ptr());
    options.spread = static_cast<float>(std::sqrt(one_minus_beta));
    options.eps_bar = static_cast<float>(eps_bar);
    options.levels = levels_of(grid_of(kName, grid, bits), static_cast<int>(bits));
    options.noise = static_cast<Noise>(noise);
    options.direction = static_cast<uint32_t>(direction);
    options.directions = static_cast<int32_t>(directions);
    TensorList out;
    std::vector<PerturbTensor> entries;
    for (size_t i = 0; i < count; ++i) {
        STD_TORCH_CHECK(own[i].scalar_type() == DType::Float, kName, ": `weights[", i,
                        "]` must be float32");
        STD_TORCH_CHECK(own[i].numel() == slopes[i].numel(), kName, ": `grads[", i,
                        "]` must have the shape of `weights[", i, "]`");
        PerturbTensor entry{};
        entry.weight = static_cast<const float*>(own[i].data_ptr());
        entry.grad = slopes[i].data_ptr();
        entry.grad_type = float_type(kName, slopes[i]);
        STD_TORCH_CHECK(entry.grad_type != FloatType::kFloat64, kName, ": `grads[", i,
                        "]` must not be float64");
        entry.layout = scale_layout(kName, own[i], factors[i], group_size, DType::Float);
        entry.numel = own[i].numel();
        entry.offset = offsets[i];
        entry.id = static_cast<uint32_t>(tensor_ids[i]);
        entries.push_back(entry);
    }
    for (void* PerturbTensor::* side : {&PerturbTensor::plus, &PerturbTensor::minus}) {
        for (size_t i = 0; i < count; ++i) {
            std::vector<int64_t> shape{directions};
            const auto sizes = own[i].sizes();
            shape.insert(shape.end(), sizes.begin(), sizes.end());
            out.push_back(empty(own[i], shape, dtype));
            entries[i].*side = out.back().data_ptr();
            entries[i].out_type = float_type(kName, out.back());
            STD_TORCH_CHECK(entries[i].out_type != FloatType::kFloat64, kName,
                            ": `dtype` must be float32, bfloat16 or float16");
        }
    }
    run(entries, options, out[0]);
    return out;
}

}  // namespace
}  // namespace pyvitfast

#if PVF_DEFINES_SCHEMAS
STABLE_TORCH_LIBRARY_FRAGMENT(pyvitfast, m) {
    m.def(
        "spsa_perturb(Tensor[] weights, Tensor[] grads, Tensor[] scales, Tensor sqnorm, int seed, "
        "int[] tensor_ids, int[] offsets, int direction, int directions, float one_minus_beta, "
        "float eps_bar, int noise, int grid, int bits, int group_size, ScalarType dtype) -> "
        "Tensor[]");
}
#endif

PVF_IMPL(m) { m.impl("spsa_perturb", TORCH_BOX(&pyvitfast::spsa_perturb)); }
