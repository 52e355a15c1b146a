#include "ops/kron_grow/kron_grow.h"
#include "portable/strided_product_device.h"

namespace pyvitfast {

const char* kron_grow_cuda(const StridedProduct& product, void* stream) {
    return product.wide ? launch_strided_product<double>(product, stream)
                        : launch_strided_product<float>(product, stream);
}

}  // namespace pyvitfast
