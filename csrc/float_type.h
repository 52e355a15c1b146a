#pragma once

#include <cstdint>

#include "portable/vec.h"

namespace pyvitfast {

// The float dtypes the kernels take, as a code that fits in a launch's parameter table.
enum class FloatType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

template <typename T>
struct Type {
    using type = T;
};

// f may be a function of the host: nvcc would warn of that in all that can be called from a kernel.
#if defined(__CUDACC__)
#define PVF_ANY_SIDE _Pragma("nv_exec_check_disable")
#else
#define PVF_ANY_SIDE
#endif

// Calls f with the Type of a dtype that is not float64.
PVF_ANY_SIDE
template <typename F>
PVF_HOST_DEVICE void with_narrow_float(FloatType type, const F& f) {
    switch (type) {
        case FloatType::kBFloat16:
            return f(Type<BFloat16>{});
        case FloatType::kFloat16:
            return f(Type<Half>{});
        default:
            return f(Type<float>{});
    }
}

// Calls f with the Type of any of the dtypes.
PVF_ANY_SIDE
template <typename F>
PVF_HOST_DEVICE void with_float(FloatType type, const F& f) {
    if (type == FloatType::kFloat64) {
        return f(Type<double>{});
    }
    with_narrow_float(type, f);
}

// Calls f with the Type of values whose sums are of A: double for double, else any narrower dtype.
PVF_ANY_SIDE
template <typename A, typename F>
PVF_HOST_DEVICE void with_float_summed_in(FloatType type, const F& f) {
    if constexpr (sizeof(A) == 8) {
        f(Type<double>{});
    } else {
        with_narrow_float(type, f);
    }
}

// Entry `at` of an array of parameters that are of A in this call; null stays null.
template <typename A>
PVF_HOST_DEVICE A* part(void* array, int64_t at) {
    return array == nullptr ? nullptr : static_cast<A*>(array) + at;
}
template <typename A>
PVF_HOST_DEVICE const A* part(const void* array, int64_t at) {
    return array == nullptr ? nullptr : static_cast<const A*>(array) + at;
}

}  // namespace pyvitfast
