#include "cpu_matmul.h"
#include "fma_loop.h"

namespace pyvitfast::PVF_CPU_CAPABILITY {

// More independent sums than latency times units of any processor, fewer than its registers.
constexpr int kSums = kVectorBytes == 64 ? 16 : 12;
constexpr int kUnroll = 4;

static void run(int64_t iterations) {
    const WideFloats factor = WideFloats{} + 0.5f;
    const WideFloats summand = WideFloats{} + 1.0f;
    WideFloats sums[kSums];
    for (int i = 0; i < kSums; ++i) {
        sums[i] = WideFloats{} + (static_cast<float>(i) + 0.25f);  // to 2, without being there
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
    WideFloats total{};
    for (int i = 0; i < kSums; ++i) {
        total += sums[i];
    }
    volatile float used = total[0];  // or the compiler leaves the loop out
    (void)used;
}

extern const FmaLoop fma_loop;
const FmaLoop fma_loop{run, 2 * kUnroll * kSums * kWide<float>};

}  // namespace pyvitfast::PVF_CPU_CAPABILITY
