// What portable/device.h calls in the emulator build. Kernels do not include this themselves.
#pragma once

#include <cstddef>
#include <cstdint>

#include "emulator/emulator.h"

namespace pyvitfast::emulator {

struct Index {
    unsigned x, y, z;
};

struct ThreadContext {
    Index index;
    unsigned linear, lane, warp;
};

// State of the launch in progress. A plain global: all fibers run on the thread that holds the
// launch lock, and a thread_local address could be cached across a fiber switch.
struct Execution {
    const ThreadContext* thread;
    Index block_index, block_size, grid_size;
    bool observed;  // counting or race checking is on
};
extern Execution execution;

// Where a wrapped operation stands in the kernel source.
struct Place {
    const char* file;
    int line;
};

enum class Access : std::uint8_t {
    global_load,
    global_store,
    global_atomic,
    shared_load,
    shared_store
};

// These throw EmulatorError with kernel, place, block and thread.
[[noreturn]] void fail_global(const void* address, std::size_t alignment, Access access,
                              Place place);
[[noreturn]] void fail_shared(const void* address, std::size_t bytes, std::size_t alignment,
                              Access access, Place place);
// Fails when a thread spins.
void count_atomic(Place place);
void observe(Access access, const void* address, unsigned bytes, Place place);

// True if all the bytes belong to one shared array of the running block.
bool is_shared(const void* address, std::size_t bytes);
void* static_shared(const void* declaration, const char* name, std::size_t bytes, Place place);
void* dynamic_shared(Place place);

void sync_threads(Place place);
void sync_warp(unsigned mask, Place place);
void thread_fence();
unsigned ballot(bool predicate, unsigned mask, const char* operation, Place place);
// Returns the value that lane `source` passed.
std::uint64_t shuffle(std::uint64_t value, unsigned source, unsigned mask, const char* operation,
                      Place place);

struct MatrixRows {
    std::uint32_t row[4];     // the 16 bytes at this lane's address
    std::uint32_t result[4];  // one register a matrix
    bool transposed;
};
void load_matrices(MatrixRows& lane, Place place);

struct MatrixMultiply {
    std::uint32_t a[4];
    std::uint32_t b[2];
    float accumulator[4];
    bool bfloat16;
};
void multiply_matrices(MatrixMultiply& lane, Place place);

// cp.async in wait mode: the copies that are due are made by the caller, whose code a sanitizer
// sees.
struct AsyncCopy {
    void* destination;
    const void* source;  // null fills with zeros
    Place place;
};
bool copies_at_issue();
void async_push(const AsyncCopy& copy);
void async_commit(Place place);
void async_limit_groups(unsigned groups);  // marks all but the newest `groups` groups as due
bool async_pop(AsyncCopy& copy);           // takes one due copy

struct LaunchRequest {
    const void* kernel;
    void (*run)(void* call);
    void* call;
    Index grid, block;
    std::size_t dynamic_shared_bytes;
    std::size_t parameter_bytes;
    Place place;
};
void launch(const LaunchRequest& request);
void allow_dynamic_shared(const void* kernel, std::size_t bytes);

}  // namespace pyvitfast::emulator
