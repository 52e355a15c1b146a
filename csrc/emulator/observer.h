// Counting of memory transactions and checking for races, from the accesses that runtime reports.
#pragma once

#include <cstdint>
#include <string>

#include "emulator/runtime.h"

namespace pyvitfast::emulator {

struct ObserverSettings {
    bool count = false;
    bool check_races = false;
};

void observer_begin_launch(const std::string& kernel, ObserverSettings settings,
                           const void* shared_base, std::size_t shared_bytes, std::uint64_t blocks,
                           unsigned threads_per_block);
void observer_begin_block(std::uint64_t block);
void observer_barrier();  // all threads of the block have met
void observer_warp_barrier(unsigned warp);
void observer_fence();
void observer_end_block();
void observer_end_launch();

// Returns an empty string or the description of a race.
std::string observer_access(Access access, const void* address, unsigned bytes, Place place,
                            const ThreadContext& thread);

void observer_reset();
std::string observer_json();

}  // namespace pyvitfast::emulator
