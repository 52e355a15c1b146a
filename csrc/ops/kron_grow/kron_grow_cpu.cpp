#include "cpu_strided_product.h"
#include "ops/kron_grow/kron_grow.h"

namespace pyvitfast::PVF_CPU_CAPABILITY {

extern const KronGrowCpu kron_grow_cpu;
const KronGrowCpu kron_grow_cpu{{strided_product_part}};

}  // namespace pyvitfast::PVF_CPU_CAPABILITY
