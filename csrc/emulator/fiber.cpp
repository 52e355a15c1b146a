#include "emulator/fiber.h"

#include <cstdint>

#include "emulator/sanitizer.h"

#if !PYVITFAST_FIBER_UCONTEXT
// Saves the registers that a called function must preserve, swaps stacks, restores them.
__asm__(R"(
.text
.hidden pyvitfast_swap_stacks
.globl pyvitfast_swap_stacks
.type pyvitfast_swap_stacks, @function
pyvitfast_swap_stacks:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size pyvitfast_swap_stacks, .-pyvitfast_swap_stacks
)");
extern "C" void pyvitfast_swap_stacks(void** save, void* load);
#endif

namespace pyvitfast::emulator {

namespace {
Fiber* left_fiber = nullptr;  // the fiber that the last switch left
}  // namespace

void Fiber::adopt_current() {
#if PYVITFAST_TSAN
    sanitizer_fiber_ = __tsan_get_current_fiber();
#endif
}

void Fiber::create(char* stack, std::size_t bytes, void (*entry)()) {
    stack_ = stack;
    bytes_ = bytes;
    fake_stack_ = nullptr;
#if PYVITFAST_FIBER_UCONTEXT
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#else
    auto* top = reinterpret_cast<void**>((reinterpret_cast<std::uintptr_t>(stack) + bytes) &
                                         ~std::uintptr_t{15});
    *--top = nullptr;  // return address of entry: ends backtraces
    *--top = reinterpret_cast<void*>(entry);
    for (int saved_register = 0; saved_register < 6; ++saved_register) {
        *--top = nullptr;
    }
    stack_pointer_ = top;
#endif
#if PYVITFAST_TSAN
    sanitizer_fiber_ = __tsan_create_fiber(0);
#endif
}

void Fiber::destroy() {
#if PYVITFAST_TSAN
    __tsan_destroy_fiber(sanitizer_fiber_);
#endif
}

void Fiber::switch_to(Fiber& next, [[maybe_unused]] bool final) {
    left_fiber = this;
#if PYVITFAST_ASAN
    __sanitizer_start_switch_fiber(final ? nullptr : &fake_stack_, next.stack_, next.bytes_);
#endif
#if PYVITFAST_TSAN
    __tsan_switch_to_fiber(next.sanitizer_fiber_, __tsan_switch_to_fiber_no_sync);
#endif
#if PYVITFAST_FIBER_UCONTEXT
    swapcontext(&context_, &next.context_);
#else
    pyvitfast_swap_stacks(&stack_pointer_, next.stack_pointer_);
#endif
    finish_switch(fake_stack_);
}

void Fiber::started() { finish_switch(nullptr); }

// Completes the switch on the side of the fiber that now runs.
void Fiber::finish_switch([[maybe_unused]] void* fake_stack) {
#if PYVITFAST_ASAN
    const void* bottom = nullptr;
    std::size_t bytes = 0;
    __sanitizer_finish_switch_fiber(fake_stack, &bottom, &bytes);
    left_fiber->stack_ = static_cast<char*>(const_cast<void*>(bottom));
    left_fiber->bytes_ = bytes;
#endif
}

}  // namespace pyvitfast::emulator
