// Function and kernel qualifiers that nvcc, the emulator build and plain host code all understand.
#pragma once

#if defined(__CUDACC__) && defined(PYVITFAST_EMULATED)
#error "PYVITFAST_EMULATED is for the g++ build of a .cu file; nvcc compiles the real thing"
#endif

#if defined(__CUDACC__)
#define PVF_HOST_DEVICE __host__ __device__ __forceinline__
#define PVF_DEVICE __device__ __forceinline__
#define PVF_KERNEL __global__ void
#define PVF_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#else
// Always inlined, also without optimisation: CPU kernels are compiled once per instruction set, and
// an out-of-line copy would be a weak symbol that the linker may take from the AVX-512 object.
#define PVF_HOST_DEVICE inline __attribute__((always_inline))
#define PVF_DEVICE inline
// Exported, so that the emulator finds the kernel's name in the dynamic symbol table.
#define PVF_KERNEL __attribute__((visibility("default"))) void
#define PVF_LAUNCH_BOUNDS(threads, blocks)
#if defined(PYVITFAST_EMULATED)
#define __grid_constant__
#endif
#endif

// Only in nvcc's device pass: its host compiler would warn of a pragma that it does not know.
#if defined(__CUDA_ARCH__)
#define PVF_UNROLL _Pragma("unroll")
#define PVF_NO_UNROLL _Pragma("unroll 1")
#else
#define PVF_UNROLL
#define PVF_NO_UNROLL
#endif
