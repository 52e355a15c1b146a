// Announcements to AddressSanitizer and ThreadSanitizer; nothing in a plain build.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define PYVITFAST_ASAN 1
#else
#define PYVITFAST_ASAN 0
#endif

// The emulator's own sources are compiled without -fsanitize=thread, since they read the data of
// all threads by design, so __SANITIZE_THREAD__ cannot tell.
#if defined(PYVITFAST_EMULATOR_TSAN)
#include <sanitizer/tsan_interface.h>
#define PYVITFAST_TSAN 1
#else
#define PYVITFAST_TSAN 0
#endif

namespace pyvitfast::emulator {

inline void tsan_acquire([[maybe_unused]] void* token) {
#if PYVITFAST_TSAN
    __tsan_acquire(token);
#endif
}

inline void tsan_release([[maybe_unused]] void* token) {
#if PYVITFAST_TSAN
    __tsan_release(token);
#endif
}

inline void asan_poison([[maybe_unused]] const void* p, [[maybe_unused]] std::size_t bytes) {
#if PYVITFAST_ASAN
    __asan_poison_memory_region(p, bytes);
#endif
}

inline void asan_unpoison([[maybe_unused]] const void* p, [[maybe_unused]] std::size_t bytes) {
#if PYVITFAST_ASAN
    __asan_unpoison_memory_region(p, bytes);
#endif
}

}  // namespace pyvitfast::emulator
