#pragma once

#include <cstdint>

namespace pyvitfast {

// The float dtypes the kernels take, as a code that fits in a launch's parameter table.
enum class FloatType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

inline int64_t float_type_size(FloatType type) {
    switch (type) {
        case FloatType::kFloat64:
            return 8;
        case FloatType::kFloat32:
            return 4;
        default:
            return 2;
    }
}

}  // namespace pyvitfast
