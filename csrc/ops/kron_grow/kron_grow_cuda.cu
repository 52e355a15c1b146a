#include "ops/kron_grow/kron_grow.h"
#include "portable/strided_product_device.h"

namespace pyvitfast {

const char* kron_grow_cuda(const StridedProduct& product, void* stream) {
    return launch_strided_product(product, stream);
}

}  // namespace pyvitfast
