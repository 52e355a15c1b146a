// The language in which kernels are written: CUDA under nvcc, the emulator under g++ with
// PYVITFAST_EMULATED. A .cu file that uses only these names compiles unchanged with both.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "portable/platform.h"
#include "portable/vec.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#elif defined(PYVITFAST_EMULATED)
#include <cstring>
#include <tuple>
#include <utility>

#include "emulator/runtime.h"
#else
#error "device.h is for nvcc or for g++ with PYVITFAST_EMULATED; host code includes vec.h"
#endif

namespace pyvitfast::device {

using pyvitfast::Accumulate;
using pyvitfast::BFloat16;
using pyvitfast::from_float;
using pyvitfast::Half;
using pyvitfast::to_float;
using pyvitfast::Vec;

inline constexpr unsigned kWarpSize = 32;
inline constexpr unsigned kFullMask = 0xffffffffu;

#if defined(__CUDACC__)

using Dim3 = dim3;
using Stream = cudaStream_t;
using LaunchStatus = cudaError_t;
inline constexpr LaunchStatus kLaunchOk = cudaSuccess;

struct Index {
    unsigned x, y, z;
};

PVF_DEVICE Index thread_idx() { return {threadIdx.x, threadIdx.y, threadIdx.z}; }
PVF_DEVICE Index block_idx() { return {blockIdx.x, blockIdx.y, blockIdx.z}; }
PVF_DEVICE Index block_dim() { return {blockDim.x, blockDim.y, blockDim.z}; }
PVF_DEVICE Index grid_dim() { return {gridDim.x, gridDim.y, gridDim.z}; }
PVF_DEVICE unsigned linear_thread_id() {
    return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}
PVF_DEVICE unsigned lane_id() { return linear_thread_id() % kWarpSize; }
PVF_DEVICE unsigned warp_id() { return linear_thread_id() / kWarpSize; }

PVF_DEVICE void sync_threads() { __syncthreads(); }
PVF_DEVICE void sync_warp(unsigned mask = kFullMask) { __syncwarp(mask); }
PVF_DEVICE void thread_fence() { __threadfence(); }

namespace detail {
// The shuffle instructions move 32 or 64 bits; narrower types travel in 32.
template <typename T>
PVF_DEVICE auto shuffle_word(T value) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8);
    if constexpr (sizeof(T) == 8) {
        return __builtin_bit_cast(unsigned long long, value);
    } else if constexpr (sizeof(T) == 4) {
        return __builtin_bit_cast(unsigned, value);
    } else {
        return static_cast<unsigned>(__builtin_bit_cast(unsigned short, value));
    }
}
template <typename T, typename Word>
PVF_DEVICE T from_shuffle_word(Word word) {
    if constexpr (sizeof(T) == 2) {
        return __builtin_bit_cast(T, static_cast<unsigned short>(word));
    } else {
        return __builtin_bit_cast(T, word);
    }
}
}  // namespace detail

template <typename T>
PVF_DEVICE T shuffle_xor(T value, int lane_mask, unsigned mask = kFullMask) {
    return detail::from_shuffle_word<T>(
        __shfl_xor_sync(mask, detail::shuffle_word(value), lane_mask));
}
template <typename T>
PVF_DEVICE T shuffle_down(T value, unsigned delta, unsigned mask = kFullMask) {
    return detail::from_shuffle_word<T>(__shfl_down_sync(mask, detail::shuffle_word(value), delta));
}
template <typename T>
PVF_DEVICE T shuffle(T value, int source_lane, unsigned mask = kFullMask) {
    return detail::from_shuffle_word<T>(
        __shfl_sync(mask, detail::shuffle_word(value), source_lane));
}
PVF_DEVICE unsigned ballot(bool predicate, unsigned mask = kFullMask) {
    return __ballot_sync(mask, predicate);
}
PVF_DEVICE bool any(bool predicate, unsigned mask = kFullMask) {
    return __any_sync(mask, predicate);
}
PVF_DEVICE bool all(bool predicate, unsigned mask = kFullMask) {
    return __all_sync(mask, predicate);
}

// Each returns the value before the operation. Integers only: float atomics would make results
// depend on the order of arrival.
PVF_DEVICE std::int32_t atomic_add(std::int32_t* p, std::int32_t v) { return atomicAdd(p, v); }
PVF_DEVICE std::uint32_t atomic_add(std::uint32_t* p, std::uint32_t v) { return atomicAdd(p, v); }
PVF_DEVICE std::int32_t atomic_or(std::int32_t* p, std::int32_t v) { return atomicOr(p, v); }
PVF_DEVICE std::uint32_t atomic_or(std::uint32_t* p, std::uint32_t v) { return atomicOr(p, v); }
PVF_DEVICE std::int32_t atomic_max(std::int32_t* p, std::int32_t v) { return atomicMax(p, v); }
PVF_DEVICE std::uint32_t atomic_max(std::uint32_t* p, std::uint32_t v) { return atomicMax(p, v); }

#define PVF_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define PVF_DYNAMIC_SHARED(type, name)                                \
    extern __shared__ __align__(16) unsigned char pvf_shared_bytes[]; \
    type* const name = reinterpret_cast<type*>(pvf_shared_bytes)

namespace detail {
template <std::size_t Bytes>
struct Word;
template <>
struct Word<1> {
    using type = unsigned char;
};
template <>
struct Word<2> {
    using type = unsigned short;
};
template <>
struct Word<4> {
    using type = unsigned;
};
template <>
struct Word<8> {
    using type = uint2;
};
template <>
struct Word<16> {
    using type = uint4;
};
}  // namespace detail

template <typename T>
PVF_DEVICE T load(const T* p) {
    return *p;
}
template <typename T>
PVF_DEVICE void store(T* p, std::type_identity_t<T> value) {
    *p = value;
}
template <typename T>
PVF_DEVICE T load_shared(const T* p) {
    return *p;
}
template <typename T>
PVF_DEVICE void store_shared(T* p, std::type_identity_t<T> value) {
    *p = value;
}

namespace detail {
// Through a built-in vector type, so that the access is one instruction whatever T is.
template <bool Streaming, typename V>
PVF_DEVICE V load_words(const void* p) {
    constexpr std::size_t bytes = sizeof(V) < 16 ? sizeof(V) : 16;
    using W = typename Word<bytes>::type;
    struct Words {
        W word[sizeof(V) / bytes];
    } words;
    PVF_UNROLL
    for (std::size_t i = 0; i < sizeof(V) / bytes; ++i) {
        const W* source = static_cast<const W*>(p) + i;
        words.word[i] = Streaming ? __ldcs(source) : *source;
    }
    return __builtin_bit_cast(V, words);
}
template <typename V>
PVF_DEVICE void store_words(void* p, const V& value) {
    constexpr std::size_t bytes = sizeof(V) < 16 ? sizeof(V) : 16;
    using W = typename Word<bytes>::type;
    struct Words {
        W word[sizeof(V) / bytes];
    };
    const Words words = __builtin_bit_cast(Words, value);
    PVF_UNROLL
    for (std::size_t i = 0; i < sizeof(V) / bytes; ++i) {
        static_cast<W*>(p)[i] = words.word[i];
    }
}
}  // namespace detail

// The address is aligned to alignof(Vec<T, N>). Vectors above 16 bytes take several accesses.
template <int N, typename T>
PVF_DEVICE Vec<T, N> load_vec(const T* p) {
    return detail::load_words<false, Vec<T, N>>(p);
}
// For data read once: marks the lines as first to be evicted.
template <int N, typename T>
PVF_DEVICE Vec<T, N> load_vec_streaming(const T* p) {
    return detail::load_words<true, Vec<T, N>>(p);
}
template <typename T, int N>
PVF_DEVICE void store_vec(T* p, Vec<T, N> value) {
    detail::store_words(p, value);
}
template <int N, typename T>
PVF_DEVICE Vec<T, N> load_shared_vec(const T* p) {
    return detail::load_words<false, Vec<T, N>>(p);
}
template <typename T, int N>
PVF_DEVICE void store_shared_vec(T* p, Vec<T, N> value) {
    detail::store_words(p, value);
}

// Starts the kernel; problems that the launch itself has are returned.
template <typename... Parameters, typename... Arguments>
LaunchStatus launch(void (*kernel)(Parameters...), Dim3 grid, Dim3 block,
                    std::size_t dynamic_shared_bytes, Stream stream, Arguments&&... arguments) {
    kernel<<<grid, block, dynamic_shared_bytes, stream>>>(static_cast<Arguments&&>(arguments)...);
    return cudaGetLastError();
}

// Needed before a launch with more than 48 KiB of shared memory.
template <typename... Parameters>
LaunchStatus allow_dynamic_shared(void (*kernel)(Parameters...), std::size_t bytes) {
    return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(bytes));
}

inline const char* launch_error_string(LaunchStatus status) { return cudaGetErrorString(status); }

inline LaunchStatus memset_async(void* p, int value, std::size_t bytes, Stream stream) {
    return cudaMemsetAsync(p, value, bytes, stream);
}

// Copies from device to host memory and waits for the stream.
inline LaunchStatus copy_to_host(void* destination, const void* source, std::size_t bytes,
                                 Stream stream) {
    const LaunchStatus status =
        cudaMemcpyAsync(destination, source, bytes, cudaMemcpyDeviceToHost, stream);
    return status == kLaunchOk ? cudaStreamSynchronize(stream) : status;
}

#else  // PYVITFAST_EMULATED

struct Dim3 {
    unsigned x, y, z;
    constexpr Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Opaque: launches run to their end at once, so every stream is the same.
using Stream = void*;

// Errors are thrown as EmulatorError, with more detail than a code carries.
enum class LaunchStatus { ok };
inline constexpr LaunchStatus kLaunchOk = LaunchStatus::ok;

using emulator::Index;

inline Index thread_idx() { return emulator::execution.thread->index; }
inline Index block_idx() { return emulator::execution.block_index; }
inline Index block_dim() { return emulator::execution.block_size; }
inline Index grid_dim() { return emulator::execution.grid_size; }
inline unsigned linear_thread_id() { return emulator::execution.thread->linear; }
inline unsigned lane_id() { return emulator::execution.thread->lane; }
inline unsigned warp_id() { return emulator::execution.thread->warp; }

inline void sync_threads(int line = __builtin_LINE(), const char* file = __builtin_FILE()) {
    emulator::sync_threads({file, line});
}
inline void sync_warp(unsigned mask = kFullMask, int line = __builtin_LINE(),
                      const char* file = __builtin_FILE()) {
    emulator::sync_warp(mask, {file, line});
}
inline void thread_fence() { emulator::thread_fence(); }

namespace detail {
template <typename T>
T shuffle(T value, unsigned source, unsigned mask, const char* operation, emulator::Place place) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8);
    std::uint64_t word = 0;
    std::memcpy(&word, &value, sizeof(T));
    word = emulator::shuffle(word, source, mask, operation, place);
    std::memcpy(&value, &word, sizeof(T));
    return value;
}
}  // namespace detail

template <typename T>
T shuffle_xor(T value, int lane_mask, unsigned mask = kFullMask, int line = __builtin_LINE(),
              const char* file = __builtin_FILE()) {
    const unsigned source = lane_id() ^ static_cast<unsigned>(lane_mask);
    return detail::shuffle(value, source < kWarpSize ? source : lane_id(), mask, "shuffle_xor",
                           {file, line});
}
template <typename T>
T shuffle_down(T value, unsigned delta, unsigned mask = kFullMask, int line = __builtin_LINE(),
               const char* file = __builtin_FILE()) {
    const unsigned source = lane_id() + delta;
    return detail::shuffle(value, source < kWarpSize ? source : lane_id(), mask, "shuffle_down",
                           {file, line});
}
template <typename T>
T shuffle(T value, int source_lane, unsigned mask = kFullMask, int line = __builtin_LINE(),
          const char* file = __builtin_FILE()) {
    return detail::shuffle(value, static_cast<unsigned>(source_lane) % kWarpSize, mask, "shuffle",
                           {file, line});
}
inline unsigned ballot(bool predicate, unsigned mask = kFullMask, int line = __builtin_LINE(),
                       const char* file = __builtin_FILE()) {
    return emulator::ballot(predicate, mask, "ballot", {file, line});
}
inline bool any(bool predicate, unsigned mask = kFullMask, int line = __builtin_LINE(),
                const char* file = __builtin_FILE()) {
    return emulator::ballot(predicate, mask, "any", {file, line}) != 0;
}
inline bool all(bool predicate, unsigned mask = kFullMask, int line = __builtin_LINE(),
                const char* file = __builtin_FILE()) {
    return emulator::ballot(predicate, mask, "all", {file, line}) == mask;
}

// A pointer, not an array: sizeof(name) is not the same with both compilers.
#define PVF_SHARED(type, name, count)                                               \
    static const char name##_declaration = 0;                                       \
    type* const name = static_cast<type*>(::pyvitfast::emulator::static_shared(     \
        &name##_declaration, #name, sizeof(type) * static_cast<std::size_t>(count), \
        ::pyvitfast::emulator::Place{__FILE__, __LINE__}))
#define PVF_DYNAMIC_SHARED(type, name)     \
    type* const name = static_cast<type*>( \
        ::pyvitfast::emulator::dynamic_shared(::pyvitfast::emulator::Place{__FILE__, __LINE__}))

namespace detail {
inline void check_global(const void* p, std::size_t alignment, std::size_t bytes,
                         emulator::Access access, emulator::Place place) {
    const auto address = reinterpret_cast<std::uintptr_t>(p);
    if ((address & (alignment - 1)) != 0 || address < 4096) [[unlikely]] {
        emulator::fail_global(p, alignment, access, place);
    }
    if (emulator::execution.observed) [[unlikely]] {
        emulator::observe(access, p, static_cast<unsigned>(bytes), place);
    }
}
inline void check_shared(const void* p, std::size_t alignment, std::size_t bytes,
                         emulator::Access access, emulator::Place place) {
    const auto address = reinterpret_cast<std::uintptr_t>(p);
    if ((address & (alignment - 1)) != 0 || !emulator::is_shared(p, bytes)) [[unlikely]] {
        emulator::fail_shared(p, bytes, alignment, access, place);
    }
    if (emulator::execution.observed) [[unlikely]] {
        emulator::observe(access, p, static_cast<unsigned>(bytes), place);
    }
}
template <bool Shared>
inline void check_access(const void* p, std::size_t alignment, std::size_t bytes, bool is_store,
                         emulator::Place place) {
    using emulator::Access;
    // Wider than 16 bytes is several instructions, each a request of its own.
    for (std::size_t offset = 0; offset < bytes; offset += 16) {
        const char* part = static_cast<const char*>(p) + offset;
        const std::size_t size = bytes - offset < 16 ? bytes - offset : 16;
        if constexpr (Shared) {
            check_shared(part, alignment, size,
                         is_store ? Access::shared_store : Access::shared_load, place);
        } else {
            check_global(part, alignment, size,
                         is_store ? Access::global_store : Access::global_load, place);
        }
    }
}

// acq_rel: the "last block" pattern orders plain accesses by an atomic after a fence, and
// ThreadSanitizer does not understand fences.
template <typename T, typename Operation>
T atomic(T* p, emulator::Place place, Operation operation) {
    static_assert(std::is_integral_v<T>, "float atomics would make results depend on timing");
    check_global(p, alignof(T), sizeof(T), emulator::Access::global_atomic, place);
    emulator::count_atomic(place);
    return operation(p);
}
}  // namespace detail

template <typename T>
    requires(std::is_same_v<T, std::int32_t> || std::is_same_v<T, std::uint32_t>)
T atomic_add(T* p, std::type_identity_t<T> v, int line = __builtin_LINE(),
             const char* file = __builtin_FILE()) {
    return detail::atomic(p, {file, line},
                          [v](T* q) { return __atomic_fetch_add(q, v, __ATOMIC_ACQ_REL); });
}
template <typename T>
    requires(std::is_same_v<T, std::int32_t> || std::is_same_v<T, std::uint32_t>)
T atomic_or(T* p, std::type_identity_t<T> v, int line = __builtin_LINE(),
            const char* file = __builtin_FILE()) {
    return detail::atomic(p, {file, line},
                          [v](T* q) { return __atomic_fetch_or(q, v, __ATOMIC_ACQ_REL); });
}
template <typename T>
    requires(std::is_same_v<T, std::int32_t> || std::is_same_v<T, std::uint32_t>)
T atomic_max(T* p, std::type_identity_t<T> v, int line = __builtin_LINE(),
             const char* file = __builtin_FILE()) {
    return detail::atomic(p, {file, line}, [v](T* q) {
        T old = __atomic_load_n(q, __ATOMIC_ACQUIRE);
        while (!__atomic_compare_exchange_n(q, &old, old > v ? old : v, false, __ATOMIC_ACQ_REL,
                                            __ATOMIC_ACQUIRE)) {
        }
        return old;
    });
}

template <typename T>
T load(const T* p, int line = __builtin_LINE(), const char* file = __builtin_FILE()) {
    detail::check_access<false>(p, alignof(T), sizeof(T), false, {file, line});
    return *p;
}
template <typename T>
void store(T* p, std::type_identity_t<T> value, int line = __builtin_LINE(),
           const char* file = __builtin_FILE()) {
    detail::check_access<false>(p, alignof(T), sizeof(T), true, {file, line});
    *p = value;
}
template <int N, typename T>
Vec<T, N> load_vec(const T* p, int line = __builtin_LINE(), const char* file = __builtin_FILE()) {
    detail::check_access<false>(p, alignof(Vec<T, N>), sizeof(Vec<T, N>), false, {file, line});
    return *reinterpret_cast<const Vec<T, N>*>(p);
}
template <int N, typename T>
Vec<T, N> load_vec_streaming(const T* p, int line = __builtin_LINE(),
                             const char* file = __builtin_FILE()) {
    return load_vec<N>(p, line, file);
}
template <typename T, int N>
void store_vec(T* p, Vec<T, N> value, int line = __builtin_LINE(),
               const char* file = __builtin_FILE()) {
    detail::check_access<false>(p, alignof(Vec<T, N>), sizeof(Vec<T, N>), true, {file, line});
    *reinterpret_cast<Vec<T, N>*>(p) = value;
}

template <typename T>
T load_shared(const T* p, int line = __builtin_LINE(), const char* file = __builtin_FILE()) {
    detail::check_access<true>(p, alignof(T), sizeof(T), false, {file, line});
    return *p;
}
template <typename T>
void store_shared(T* p, std::type_identity_t<T> value, int line = __builtin_LINE(),
                  const char* file = __builtin_FILE()) {
    detail::check_access<true>(p, alignof(T), sizeof(T), true, {file, line});
    *p = value;
}
template <int N, typename T>
Vec<T, N> load_shared_vec(const T* p, int line = __builtin_LINE(),
                          const char* file = __builtin_FILE()) {
    detail::check_access<true>(p, alignof(Vec<T, N>), sizeof(Vec<T, N>), false, {file, line});
    return *reinterpret_cast<const Vec<T, N>*>(p);
}
template <typename T, int N>
void store_shared_vec(T* p, Vec<T, N> value, int line = __builtin_LINE(),
                      const char* file = __builtin_FILE()) {
    detail::check_access<true>(p, alignof(Vec<T, N>), sizeof(Vec<T, N>), true, {file, line});
    *reinterpret_cast<Vec<T, N>*>(p) = value;
}

// Takes the place of the stream parameter of launch, to note where the launch stands.
struct LaunchStream {
    emulator::Place place;
    LaunchStream(Stream, int line = __builtin_LINE(), const char* file = __builtin_FILE())
        : place{file, line} {}
};

// Runs the kernel to its end. Throws EmulatorError when the launch or the kernel is wrong.
template <typename... Parameters, typename... Arguments>
LaunchStatus launch(void (*kernel)(Parameters...), Dim3 grid, Dim3 block,
                    std::size_t dynamic_shared_bytes, LaunchStream stream,
                    Arguments&&... arguments) {
    std::tuple<std::remove_cv_t<Parameters>...> parameters(std::forward<Arguments>(arguments)...);
    auto call = [&] { std::apply(kernel, parameters); };
    emulator::launch({.kernel = reinterpret_cast<const void*>(kernel),
                      .run = [](void* c) { (*static_cast<decltype(call)*>(c))(); },
                      .call = &call,
                      .grid = {grid.x, grid.y, grid.z},
                      .block = {block.x, block.y, block.z},
                      .dynamic_shared_bytes = dynamic_shared_bytes,
                      .parameter_bytes = (std::size_t{0} + ... + sizeof(Parameters)),
                      .place = stream.place});
    return kLaunchOk;
}

template <typename... Parameters>
LaunchStatus allow_dynamic_shared(void (*kernel)(Parameters...), std::size_t bytes) {
    emulator::allow_dynamic_shared(reinterpret_cast<const void*>(kernel), bytes);
    return kLaunchOk;
}

inline const char* launch_error_string(LaunchStatus) { return "no error"; }

inline LaunchStatus memset_async(void* p, int value, std::size_t bytes, Stream) {
    std::memset(p, value, bytes);
    return kLaunchOk;
}

inline LaunchStatus copy_to_host(void* destination, const void* source, std::size_t bytes, Stream) {
    std::memcpy(destination, source, bytes);
    return kLaunchOk;
}

#endif

}  // namespace pyvitfast::device
