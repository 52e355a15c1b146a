#include "cpu_spsa.h"
#include "ops/spsa_perturb/spsa_perturb.h"
#include "ops/spsa_perturb/spsa_perturb_math.h"

namespace pyvitfast::PVF_CPU_CAPABILITY {

template <typename G, typename T, bool kSign>
static void perturb(const PerturbTensor& tensor, const PerturbOptions& options, int64_t begin,
                    int64_t end) {
    const float size = spsa::guidance(*options.sqnorm, options.sqrt_beta);
    const G* grads = static_cast<const G*>(tensor.grad);
    float noise[kSpsaNoise];
    float scales[kSpsaBlock];
    float scaled[kSpsaBlock];
    for (int64_t first = begin; first < end; first += kSpsaBlock) {
        const int64_t count = end - first < kSpsaBlock ? end - first : kSpsaBlock;
        const float* weight = tensor.weight + first;
        spread_scales(tensor.layout, first, first + count, scales);
        for (int64_t j = 0; j < count; ++j) {
            scaled[j] = product(scales[j], to_float(grads[first + j]));
        }
        for (int i = 0; i < options.directions; ++i) {
            const uint32_t direction = options.direction + static_cast<uint32_t>(i);
            const float guidance = spsa::is_negative(options.seed, direction) ? -size : size;
            const float* u = draw(options.noise, options.seed, tensor.offset + first, count,
                                  tensor.id, direction, noise);
            T* plus = static_cast<T*>(tensor.plus) + i * tensor.numel + first;
            T* minus = static_cast<T*>(tensor.minus) + i * tensor.numel + first;
            const auto each = [&](const auto& along) {
                for (int64_t j = 0; j < count; ++j) {
                    const float v = fused(options.spread, u[j], along(j));
                    const float radius = product(options.eps_bar, scales[j]);
                    plus[j] = from_float<T>(
                        spsa::perturbed<kSign>(weight[j], radius, v, scales[j], options.levels));
                    minus[j] = from_float<T>(
                        spsa::perturbed<kSign>(weight[j], -radius, v, scales[j], options.levels));
                }
            };
            if (guidance != 0.0f) {
                each([&](int64_t j) { return product(guidance, scaled[j]); });
            } else {
                each([](int64_t) { return 0.0f; });
            }
        }
    }
}

static void part(const PerturbTensor& tensor, const PerturbOptions& options, int64_t begin,
                 int64_t end) {
    with_narrow_float(tensor.grad_type, [&]<typename G>(Type<G>) {
        with_narrow_float(tensor.out_type, [&]<typename T>(Type<T>) {
            if (options.levels.sign != 0) {
                perturb<G, T, true>(tensor, options, begin, end);
            } else {
                perturb<G, T, false>(tensor, options, begin, end);
            }
        });
    });
}

extern const SpsaPerturbCpu spsa_perturb_cpu;
const SpsaPerturbCpu spsa_perturb_cpu{part};

}  // namespace pyvitfast::PVF_CPU_CAPABILITY
