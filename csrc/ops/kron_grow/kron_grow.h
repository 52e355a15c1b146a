#pragma once

#include "ops/kron_grow/kron_grow_math.h"
#include "portable/strided_product.h"

namespace pyvitfast {

struct KronGrowCpu {
    StridedProductCpu products;
};

}  // namespace pyvitfast
