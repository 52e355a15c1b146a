// Launchers of the emulator's test kernels. Where there is a `bug` parameter, true plants the
// mistake that a detector must find and false is the corrected kernel.
#pragma once

#include <cstdint>

#include "portable/device.h"

namespace pyvitfast::testing {

void block_sums(const float* x, double* out, unsigned blocks, unsigned threads, std::int64_t n);
void reduce_kinds(const float* x, float* sum, float* max, std::int32_t* count, unsigned threads);
void votes(std::uint32_t* out);
template <typename T>
void gemm(const T* a, const T* b, float* c, int m, int n, int k);
void transpose(const float* x, float* out, int size, bool bug);
void random_bits(std::uint32_t* out, unsigned count, std::uint64_t seed, std::uint64_t offset);
void copy_large_shared(const float* x, float* out, int count);
void copy_vectors(const float* x, float* out, unsigned count);
void total_by_last_block(const float* x, float* partial, std::uint32_t* counter, float* out,
                         unsigned blocks, bool bug);
void record_order(std::uint32_t* counter, std::uint32_t* out, unsigned blocks, unsigned threads);

void divergent_barrier(float* out, bool bug);
void early_exit_barrier(float* out, bool bug);
void early_exit_shuffle(float* out, bool bug);
void shuffle_outside_mask(float* out, bool bug);
void caller_outside_mask(float* out, bool bug);
void missing_barrier(float* out, bool bug);
void missing_warp_barrier(float* out, bool bug);
void missing_wait(const float* x, float* out, bool bug);
void reused_buffer(const float* x, float* out, int tiles, bool bug);
void write_after_read(float* out, bool bug);
void spin(std::uint32_t* flags, bool bug);
void block_race(std::uint32_t* out, bool bug);
void mixed_atomic(std::uint32_t* out, bool bug);
void shared_overflow_raw(float* out, bool bug);
void shared_overflow_wrapped(float* out, bool bug);
void shared_underflow(float* out, bool bug);
void not_shared(const float* x, float* out, bool bug);
void global_overflow(const float* x, float* out, unsigned count, bool bug);
void misaligned_vector(const float* x, float* out, bool bug);
void null_pointer(const float* x, float* out);
void misaligned_copy(const float* x, float* out, bool bug);
void no_dynamic_shared(float* out, bool bug);
void launch_size(float* out, device::Dim3 grid, device::Dim3 block, std::size_t shared);
void opt_in(float* out, std::size_t allowed, std::size_t shared);
#if defined(PYVITFAST_EMULATED)  // nvcc refuses these already
void oversize_parameters(float* out);
void oversize_static_shared(float* out);
void launching_kernel(float* out);
void throwing_kernel(float* out);
#endif

}  // namespace pyvitfast::testing
