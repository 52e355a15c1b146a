#pragma once

#include <cstdint>

#include "float_type.h"
#include "portable/quantizer.h"
#include "portable/spsa_noise.h"

namespace pyvitfast {

struct PerturbTensor {
    const float* weight;
    const void* grad;
    void* plus;  // `directions` tensors of numel elements, one after the other
    void* minus;
    ScaleLayout layout;
    int64_t numel;
    int64_t offset;      // of its first element in the whole tensor
    int64_t tile_begin;  // first of this tensor's blocks in the launch
    uint32_t id;
    FloatType grad_type;
    FloatType out_type;
};

struct PerturbOptions {
    uint64_t seed;
    double sqrt_beta;
    const double* sqnorm;
    float spread;  // sqrt(1 - beta)
    float eps_bar;
    Levels levels;
    Noise noise;
    uint32_t direction;
    int32_t directions;
};

// A launch's parameters hold at most 32,764 bytes; more tensors take another launch.
constexpr int kMaxPerturbTensors = 280;
constexpr int kPerturbThreads = 256;
constexpr int kPerturbQuads = 4;  // groups of four elements a thread
constexpr int kPerturbTile = kPerturbThreads * kPerturbQuads * 4;

// Tiles lie on the Philox blocks of the whole tensor, where a shard may begin in between.
PVF_HOST_DEVICE int64_t perturb_tiles(int64_t numel, int64_t offset) {
    return numel == 0 ? 0 : (offset % 4 + numel + kPerturbTile - 1) / kPerturbTile;
}

struct SpsaPerturbParams {
    PerturbTensor entries[kMaxPerturbTensors];
    PerturbOptions options;
    int64_t tiles;
    int32_t count;
};

constexpr int64_t kPerturbPart = 16384;

struct SpsaPerturbCpu {
    // Elements [begin, end) of all directions and both signs.
    void (*part)(const PerturbTensor&, const PerturbOptions&, int64_t begin, int64_t end);
};

}  // namespace pyvitfast
