#pragma once

#include <cstdint>

#include "float_type.h"
#include "portable/quantizer.h"

namespace pyvitfast {

struct SqnormTensor {
    const void* grad;
    ScaleLayout layout;
    int64_t numel;
    int64_t chunk_begin;  // first of this tensor's chunk sums
    int64_t tile_begin;   // first of this tensor's blocks in the launch
    FloatType type;
};

// A launch's parameters hold at most 32,764 bytes; more tensors take another launch.
constexpr int kMaxSqnormTensors = 400;
constexpr int kSqnormThreads = 256;
constexpr int kSqnormWarps = kSqnormThreads / 32;

PVF_HOST_DEVICE int64_t sqnorm_chunks(int64_t numel) { return (numel + kSumChunk - 1) / kSumChunk; }
PVF_HOST_DEVICE int64_t sqnorm_blocks(int64_t numel) {
    return (sqnorm_chunks(numel) + kSqnormWarps - 1) / kSqnormWarps;
}

struct ScaledSqnormParams {
    SqnormTensor entries[kMaxSqnormTensors];
    int32_t count;
    int64_t tiles;
    int64_t all_tiles;  // of all launches: the last block of them finishes
    int64_t all_chunks;
    double* sums;     // one a chunk, then one for each 1024 of these
    int32_t* ticket;  // a zero
    double* result;
};

struct ScaledSqnormCpu {
    // The sum of elements [begin, end), one chunk.
    double (*chunk)(const SqnormTensor&, int64_t begin, int64_t end);
    // The sum of all chunk sums, which are overwritten.
    double (*total)(double* sums, int64_t count);
};

}  // namespace pyvitfast
