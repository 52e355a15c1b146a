#pragma once

#include <cstdint>

#include "float_type.h"
#include "portable/quantizer.h"
#include "portable/spsa_noise.h"

namespace pyvitfast {

struct UpdateTensor {
    void* grad;
    ScaleLayout layout;
    int64_t numel;
    int64_t offset;      // of its first element in the whole tensor
    int64_t tile_begin;  // first of this tensor's blocks in the launch
    uint32_t id;
    FloatType type;
};

struct UpdateOptions {
    uint64_t seed;
    double sqrt_beta;
    const double* sqnorm;
    const double* slopes;
    float spread;  // sqrt(1 - beta)
    Noise noise;
    uint32_t direction;
    int32_t directions;
};

// A launch's parameters hold at most 32,764 bytes; more tensors take another launch.
constexpr int kMaxUpdateTensors = 360;
constexpr int kUpdateThreads = 256;
constexpr int kUpdateQuads = 4;  // groups of four elements a thread
constexpr int kUpdateTile = kUpdateThreads * kUpdateQuads * 4;

// Tiles lie on the Philox blocks of the whole tensor, where a shard may begin in between.
PVF_HOST_DEVICE int64_t update_tiles(int64_t numel, int64_t offset) {
    return numel == 0 ? 0 : (offset % 4 + numel + kUpdateTile - 1) / kUpdateTile;
}

struct SpsaUpdateParams {
    UpdateTensor entries[kMaxUpdateTensors];
    UpdateOptions options;
    int64_t tiles;
    int32_t count;
};

constexpr int64_t kUpdatePart = 16384;

struct SpsaUpdateCpu {
    // Elements [begin, end).
    void (*part)(const UpdateTensor&, const UpdateOptions&, int64_t begin, int64_t end);
};

}  // namespace pyvitfast
