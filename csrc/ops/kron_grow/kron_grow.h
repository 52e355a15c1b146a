#pragma once

#include "portable/strided_product.h"

namespace pyvitfast {

struct KronGrowCpu {
    StridedProductCpu products;
};

}  // namespace pyvitfast
