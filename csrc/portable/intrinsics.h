// One function for each instruction that has no C++ spelling: inline PTX under nvcc, its meaning
// written out for the emulator.
#pragma once

#include <cmath>

#include "portable/device.h"

namespace pyvitfast::device {

#if defined(__CUDACC__)

// As the language's own functions, so that results do not depend on -use_fast_math.
PVF_DEVICE float exp2(float x) { return ::exp2f(x); }
PVF_DEVICE double exp2(double x) { return ::exp2(x); }
PVF_DEVICE float log(float x) { return ::logf(x); }
PVF_DEVICE double log(double x) { return ::log(x); }
PVF_DEVICE float rsqrt(float x) { return ::rsqrtf(x); }
PVF_DEVICE double rsqrt(double x) { return ::rsqrt(x); }
PVF_DEVICE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
PVF_DEVICE double fma(double a, double b, double c) { return ::fma(a, b, c); }

// Loads four 8 x 8 matrices of 16-bit elements. Lanes 8i to 8i + 7 pass the addresses of the rows
// of matrix i, each 16-byte aligned; register i of lane l gets elements 2(l % 4) and 2(l % 4) + 1
// of its row l / 4, or of its column l / 4 when transposed.
PVF_DEVICE void ldmatrix_x4(std::uint32_t (&r)[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(shared_row)))
                 : "memory");
}
PVF_DEVICE void ldmatrix_x4_trans(std::uint32_t (&r)[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(shared_row)))
                 : "memory");
}

// d += a * b for a 16 x 16 by 16 x 8 product; fragments as in the PTX ISA for mma.m16n8k16.
template <typename T>
PVF_DEVICE void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4],
                             const std::uint32_t (&b)[2]) {
    static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Half>);
    if constexpr (std::is_same_v<T, BFloat16>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

// Starts a copy of 16 bytes from global to shared memory, past the L1 cache; both addresses are
// 16-byte aligned. With `valid` false, zeros are written and the source is not read.
PVF_DEVICE void cp_async_16(void* shared_destination, const void* global_source,
                            bool valid = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                     static_cast<unsigned>(__cvta_generic_to_shared(shared_destination))),
                 "l"(__cvta_generic_to_global(global_source)), "r"(valid ? 16 : 0)
                 : "memory");
}
PVF_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's groups are under way. Other threads see the data only
// after a sync_threads.
template <int N>
PVF_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#else

inline float exp2(float x) { return std::exp2(x); }
inline double exp2(double x) { return std::exp2(x); }
inline float log(float x) { return std::log(x); }
inline double log(double x) { return std::log(x); }
inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline double fma(double a, double b, double c) { return std::fma(a, b, c); }

namespace detail {
inline void ldmatrix(std::uint32_t (&r)[4], const void* shared_row, bool transposed,
                     emulator::Place place) {
    // The lane reads its own row, so that bounds, banks and sanitizers see an ordinary access.
    const auto row =
        load_shared_vec<4>(static_cast<const std::uint32_t*>(shared_row), place.line, place.file);
    emulator::MatrixRows lane{{row[0], row[1], row[2], row[3]}, {}, transposed};
    emulator::load_matrices(lane, place);
    for (int i = 0; i < 4; ++i) {
        r[i] = lane.result[i];
    }
}

inline void make_copy(const emulator::AsyncCopy& copy) {
    using Words = Vec<std::uint32_t, 4>;
    *static_cast<Words*>(copy.destination) =
        copy.source == nullptr ? Words{} : *static_cast<const Words*>(copy.source);
    if (emulator::execution.observed) {
        emulator::observe(emulator::Access::shared_store, copy.destination, 16, copy.place);
    }
}
}  // namespace detail

inline void ldmatrix_x4(std::uint32_t (&r)[4], const void* shared_row, int line = __builtin_LINE(),
                        const char* file = __builtin_FILE()) {
    detail::ldmatrix(r, shared_row, false, {file, line});
}
inline void ldmatrix_x4_trans(std::uint32_t (&r)[4], const void* shared_row,
                              int line = __builtin_LINE(), const char* file = __builtin_FILE()) {
    detail::ldmatrix(r, shared_row, true, {file, line});
}

// Adds products one after the other in float; hardware adds them in an order of its own.
template <typename T>
void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                  int line = __builtin_LINE(), const char* file = __builtin_FILE()) {
    static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Half>);
    emulator::MatrixMultiply lane{{a[0], a[1], a[2], a[3]},
                                  {b[0], b[1]},
                                  {d[0], d[1], d[2], d[3]},
                                  std::is_same_v<T, BFloat16>};
    emulator::multiply_matrices(lane, {file, line});
    for (int i = 0; i < 4; ++i) {
        d[i] = lane.accumulator[i];
    }
}

inline void cp_async_16(void* shared_destination, const void* global_source, bool valid = true,
                        int line = __builtin_LINE(), const char* file = __builtin_FILE()) {
    const emulator::Place place{file, line};
    if (reinterpret_cast<std::uintptr_t>(shared_destination) % 16 != 0 ||
        !emulator::is_shared(shared_destination, 16)) {
        emulator::fail_shared(shared_destination, 16, 16, emulator::Access::shared_store, place);
    }
    if (valid) {
        detail::check_global(global_source, 16, 16, emulator::Access::global_load, place);
    }
    const emulator::AsyncCopy copy{shared_destination, valid ? global_source : nullptr, place};
    if (emulator::copies_at_issue()) {
        detail::make_copy(copy);
    } else {
        emulator::async_push(copy);
    }
}
inline void cp_async_commit(int line = __builtin_LINE(), const char* file = __builtin_FILE()) {
    emulator::async_commit({file, line});
}
template <int N>
void cp_async_wait() {
    emulator::async_limit_groups(N);
    emulator::AsyncCopy copy;
    while (emulator::async_pop(copy)) {
        detail::make_copy(copy);
    }
}

#endif

// exp(x) of a difference to a peak; NaN stays NaN.
template <typename A>
PVF_DEVICE A exponential(A x) {
    return exp2(x * A(1.4426950408889634));
}

}  // namespace pyvitfast::device
