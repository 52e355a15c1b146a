#include "cpu_vector.h"
#include "ops/structured_zero_/structured_zero_.h"
#include "ops/structured_zero_/structured_zero__math.h"

namespace pyvitfast::PVF_CPU_CAPABILITY {

template <typename T>
PVF_INLINE void zero_row(T* row, int64_t stride, const DeadRun* runs, int64_t run_count) {
    for (int64_t r = 0; r < run_count; ++r) {
        T* at = row + runs[r].begin * stride;
        for (int64_t i = 0; i < runs[r].length; ++i) {
            at[i * stride] = T{};
        }
    }
}

static void rows(const ZeroTensor& tensor, const DeadRun* runs, int64_t run_count, int64_t begin,
                 int64_t end) {
    with_storage(tensor.element_size, [&]<typename T>(T) {
        const DeadRun everything{0, tensor.cols};
        for (int64_t row = begin; row < end; ++row) {
            T* at = static_cast<T*>(tensor.data) + row * tensor.row_stride;
            const bool dead = tensor.row_alive != nullptr && !tensor.row_alive[row];
            const DeadRun* dead_runs = dead ? &everything : runs;
            const int64_t count = dead ? 1 : run_count;
            if (tensor.col_stride == 1) {
                zero_row(at, 1, dead_runs, count);
            } else {
                zero_row(at, tensor.col_stride, dead_runs, count);
            }
        }
    });
}

extern const StructuredZeroCpu structured_zero_cpu;
const StructuredZeroCpu structured_zero_cpu{rows};

}  // namespace pyvitfast::PVF_CPU_CAPABILITY
