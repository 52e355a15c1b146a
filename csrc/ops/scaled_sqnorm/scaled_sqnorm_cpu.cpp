#include "cpu_quantizer.h"
#include "ops/scaled_sqnorm/scaled_sqnorm.h"
#include "ops/scaled_sqnorm/scaled_sqnorm_math.h"

namespace pyvitfast::PVF_CPU_CAPABILITY {

template <typename A, typename T>
PVF_INLINE double chunk_of(const SqnormTensor& tensor, int64_t begin, int64_t end) {
    const T* grad = static_cast<const T*>(tensor.grad) + begin;
    __builtin_prefetch(grad + (end - begin));
    if (tensor.layout.groups == 0) {
        const A scale = *static_cast<const A*>(tensor.layout.scales);
        return sum_of_chunk(end - begin, [&](int64_t j) {
            return sqnorm::square(scale, static_cast<A>(to_float(grad[j])));
        });
    }
    A scales[kSumChunk];
    spread_scales(tensor.layout, begin, end, scales);
    return sum_of_chunk(end - begin, [&](int64_t j) {
        return sqnorm::square(scales[j], static_cast<A>(to_float(grad[j])));
    });
}

static double chunk(const SqnormTensor& tensor, int64_t begin, int64_t end) {
    double sum = 0.0;
    with_float(tensor.type,
               [&]<typename T>(Type<T>) { sum = chunk_of<Accumulate<T>, T>(tensor, begin, end); });
    return sum;
}

static double total(double* sums, int64_t count) { return sum_of_sums(sums, count); }

extern const ScaledSqnormCpu scaled_sqnorm_cpu;
const ScaledSqnormCpu scaled_sqnorm_cpu{chunk, total};

}  // namespace pyvitfast::PVF_CPU_CAPABILITY
