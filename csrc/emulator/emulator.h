// The emulator as tests and launchers see it: its error, its settings and its counters.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace pyvitfast {

// Thrown by launch() when a kernel, or the launch itself, is wrong. The message names the kernel,
// the source line, the block and the threads.
class EmulatorError : public std::runtime_error {
   public:
    using std::runtime_error::runtime_error;
};

// Settings, by the last part of the environment variable that gives the initial value:
//   PYVITFAST_EMULATOR_ORDER      forward (default), reverse or random: blocks, warps and lanes
//   PYVITFAST_EMULATOR_SEED       seed of the random order (default 0)
//   PYVITFAST_EMULATOR_ASYNC      when cp.async copies: issue (default) or wait
//   PYVITFAST_EMULATOR_COUNT      1 counts sectors and wavefronts
//   PYVITFAST_EMULATOR_RACECHECK  1 looks for races through the wrapped accesses
//   PYVITFAST_EMULATOR_MAX_SHARED shared memory of one block in bytes after opting in
// A value set here overrides the environment; an empty one returns to it. Throws
// std::invalid_argument for an unknown name or value.
void emulator_configure(const std::string& name, const std::string& value);

void emulator_reset_counters();

// Counters by kernel since the last reset. "bytes_moved" is 32 bytes for each sector of each
// request: there is no cache model, so a line read twice counts twice.
std::string emulator_counters_json();

}  // namespace pyvitfast
