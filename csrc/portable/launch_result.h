#pragma once

#include "portable/device.h"

namespace pyvitfast::device {

// What launchers give the adaptors, which see no CUDA header: null, or what went wrong.
inline const char* launch_result(LaunchStatus status) {
    return status == kLaunchOk ? nullptr : launch_error_string(status);
}

inline Stream as_stream(void* stream) { return static_cast<Stream>(stream); }

}  // namespace pyvitfast::device
