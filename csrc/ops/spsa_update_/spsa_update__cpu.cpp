#include "cpu_spsa.h"
#include "ops/spsa_update_/spsa_update_.h"
#include "ops/spsa_update_/spsa_update__math.h"

namespace pyvitfast::PVF_CPU_CAPABILITY {

template <typename T>
static void update(const UpdateTensor& tensor, const UpdateOptions& options, int64_t begin,
                   int64_t end) {
    const float size = spsa::guidance(*options.sqnorm, options.sqrt_beta);
    T* grads = static_cast<T*>(tensor.grad);
    float noise[kSpsaNoise];
    float factors[kSpsaBlock];
    float scaled[kSpsaBlock];
    float total[kSpsaBlock];
    for (int64_t first = begin; first < end; first += kSpsaBlock) {
        const int64_t count = end - first < kSpsaBlock ? end - first : kSpsaBlock;
        T* grad = grads + first;
        spread_scales(tensor.layout, first, first + count, factors);
        for (int64_t j = 0; j < count; ++j) {
            scaled[j] = product(factors[j], to_float(grad[j]));
            total[j] = 0.0f;
        }
        for (int i = 0; i < options.directions; ++i) {
            const uint32_t direction = options.direction + static_cast<uint32_t>(i);
            const float guidance = spsa::is_negative(options.seed, direction) ? -size : size;
            const float* u = draw(options.noise, options.seed, tensor.offset + first, count,
                                  tensor.id, direction, noise);
            const float* scales = static_cast<const float*>(tensor.layout.scales);
            for_each_run(
                tensor.layout, first, first + count, [&](int64_t from, int64_t to, int64_t index) {
                    const float factor =
                        spsa::factor_of(options.slopes[i], options.directions, scales[index]);
                    for (int64_t j = from - first; j < to - first; ++j) {
                        factors[j] = factor;
                    }
                });
            if (guidance != 0.0f) {
                for (int64_t j = 0; j < count; ++j) {
                    const float v = fused(options.spread, u[j], product(guidance, scaled[j]));
                    total[j] = fused(factors[j], v, total[j]);
                }
            } else {
                for (int64_t j = 0; j < count; ++j) {
                    total[j] = fused(factors[j], fused(options.spread, u[j], 0.0f), total[j]);
                }
            }
        }
        for (int64_t j = 0; j < count; ++j) {
            grad[j] = from_float<T>(total[j]);
        }
    }
}

static void part(const UpdateTensor& tensor, const UpdateOptions& options, int64_t begin,
                 int64_t end) {
    with_narrow_float(tensor.type,
                      [&]<typename T>(Type<T>) { update<T>(tensor, options, begin, end); });
}

extern const SpsaUpdateCpu spsa_update_cpu;
const SpsaUpdateCpu spsa_update_cpu{part};

}  // namespace pyvitfast::PVF_CPU_CAPABILITY
