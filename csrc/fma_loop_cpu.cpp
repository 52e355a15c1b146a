#include "cpu_vector.h"
#include "fma_loop.h"

namespace pyvitfast::PVF_CPU_CAPABILITY {

// More independent sums than latency times units of any processor, fewer than its registers.
#if defined(__AVX512F__)
using Vector = __m512;
constexpr int kSums = 16;
PVF_INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__AVX2__)
using Vector = __m256;
constexpr int kSums = 12;
PVF_INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
#else
// Product and sum one by one, as in the baseline kernels.
using Vector = float __attribute__((vector_size(16)));
constexpr int kSums = 12;
PVF_INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
#endif

constexpr int kUnroll = 4;
constexpr int64_t kWidth = sizeof(Vector) / sizeof(float);

static void run(int64_t iterations) {
    const Vector factor = Vector{} + 0.5f;
    const Vector summand = Vector{} + 1.0f;
    Vector sums[kSums];
    for (int i = 0; i < kSums; ++i) {
        sums[i] = Vector{} + (static_cast<float>(i) + 0.25f);  // to 2, without being there
    }
    for (int64_t iteration = 0; iteration < iterations; ++iteration) {
#pragma GCC unroll 4
        for (int repeat = 0; repeat < kUnroll; ++repeat) {
#pragma GCC unroll 16
            for (int i = 0; i < kSums; ++i) {
                sums[i] = multiply_add(sums[i], factor, summand);
            }
        }
    }
    Vector total{};
    for (int i = 0; i < kSums; ++i) {
        total += sums[i];
    }
    volatile float used = total[0];  // or the compiler leaves the loop out
    (void)used;
}

extern const FmaLoop fma_loop;
const FmaLoop fma_loop{run, 2 * kUnroll * kSums * kWidth};

}  // namespace pyvitfast::PVF_CPU_CAPABILITY
