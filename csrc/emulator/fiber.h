// A stack of its own and a way to switch to it. One fiber stands for one CUDA thread.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(PYVITFAST_EMULATOR_UCONTEXT)
#include <ucontext.h>
#define PYVITFAST_FIBER_UCONTEXT 1
#else
#define PYVITFAST_FIBER_UCONTEXT 0
#endif

namespace pyvitfast::emulator {

class Fiber {
   public:
    // The fiber of the calling thread, to switch back to.
    void adopt_current();
    // A fiber that calls entry() on its first switch; entry must switch away and never return.
    void create(char* stack, std::size_t bytes, void (*entry)());
    void destroy();

    // Leaves *this, which is running, for `next`. `final` says that *this is never resumed.
    void switch_to(Fiber& next, bool final = false);
    // To be called first in the entry function.
    static void started();

   private:
    static void finish_switch(void* fake_stack);

    char* stack_ = nullptr;
    std::size_t bytes_ = 0;
#if PYVITFAST_FIBER_UCONTEXT
    ucontext_t context_;
#else
    void* stack_pointer_ = nullptr;
#endif
    void* fake_stack_ = nullptr;       // AddressSanitizer's
    void* sanitizer_fiber_ = nullptr;  // ThreadSanitizer's
};

}  // namespace pyvitfast::emulator
