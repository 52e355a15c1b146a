// The emulator as tests and launchers see it: its error, its settings and its counters.
//
// A kernel source is built with -std=c++20 -x c++ -DPYVITFAST_EMULATED and linked with all of
// csrc/emulator/*.cpp. For AddressSanitizer both get -fsanitize=address. For ThreadSanitizer only
// the kernel sources get -fsanitize=thread, and csrc/emulator gets -DPYVITFAST_EMULATOR_TSAN: the
// emulator reads the data of all threads by design.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace pyvitfast {

// Thrown by launch() when a kernel, or the launch itself, is wrong. The message names the kernel,
// the source line, the block and the threads. Visible also in a library with hidden symbols, so
// that another one can catch it.
class __attribute__((visibility("default"))) EmulatorError : public std::runtime_error {
   public:
    using std::runtime_error::runtime_error;
};

// Settings, by the last part of the environment variable that gives the initial value:
//   PYVITFAST_EMULATOR_ORDER      forward (default), reverse or random: blocks, warps and lanes
//   PYVITFAST_EMULATOR_SEED       seed of the random order (default 0)
//   PYVITFAST_EMULATOR_ASYNC      when cp.async copies: issue (default) or wait
//   PYVITFAST_EMULATOR_COUNT      1 counts sectors and wavefronts
//   PYVITFAST_EMULATOR_RACECHECK  1 looks for races through the wrapped accesses; it takes 72 bytes
//                                 for each byte of global memory that a launch touches
//   PYVITFAST_EMULATOR_MAX_SHARED shared memory of one block in bytes after opting in
// A value set here overrides the environment; an empty one returns to it. Throws
// std::invalid_argument for an unknown name or value.
void emulator_configure(const std::string& name, const std::string& value);

void emulator_reset_counters();

// Counters by kernel since the last reset. "bytes_moved" is 32 bytes for each sector of each
// request: there is no cache model, so a line read twice counts twice. A request is what the lanes
// of one warp ask for at one place between two barriers of the block, each for the n-th time; a
// long loop without sync_threads therefore keeps its requests in memory until the block ends.
std::string emulator_counters_json();

}  // namespace pyvitfast
