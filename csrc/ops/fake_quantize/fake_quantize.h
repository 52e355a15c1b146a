#pragma once

#include <cstdint>

#include "float_type.h"
#include "portable/quantizer.h"

namespace pyvitfast {

// What stands in for the derivative of rounding.
enum class Mask : int32_t {
    kLsq = 0,
    kRounded = 1,
    kIdentity = 2,
    kHardtanh = 3,
    kTanh = 4,
    kApproxSign = 5
};

struct QuantizeTensor {
    const void* weight;
    const void* upstream;  // backward only
    void* out;             // the levels, or the gradient of the weight
    void* scale_grad;      // backward only
    ScaleLayout layout;
    int64_t numel;
    int64_t tile_begin;  // first of this tensor's blocks in the launch
    int64_t sums_begin;  // first of this tensor's partial sums; backward only
    FloatType weight_type;
    FloatType other_type;  // of the levels, and of the gradient that comes back for them
};

struct QuantizeOptions {
    Levels levels;
    Mask mask;
    int32_t scale_gradient;  // 1: LSQ's factor on the gradients of scales
};

// A launch's parameters hold at most 32,764 bytes; more tensors take another launch.
constexpr int kMaxQuantizeTensors = 300;
constexpr int kQuantizeThreads = 256;
constexpr int kQuantizeWarps = kQuantizeThreads / 32;
constexpr int kQuantizeQuads = 4;  // groups of four elements a thread
constexpr int kQuantizeTile = kQuantizeThreads * kQuantizeQuads * 4;

struct FakeQuantizeParams {
    QuantizeTensor entries[kMaxQuantizeTensors];
    QuantizeOptions options;
    int64_t tiles;
    int32_t count;
    double* sums;      // backward: one a chunk of each segment
    int32_t* tickets;  // backward: one zero a tensor
};

PVF_HOST_DEVICE int64_t quantize_tiles(int64_t numel) {
    return (numel + kQuantizeTile - 1) / kQuantizeTile;
}

// Backward works by chunks of segments, the elements that share a scale.
PVF_HOST_DEVICE int64_t chunks_of_segment(const QuantizeTensor& tensor) {
    return (segment_most(tensor.layout, tensor.numel) + kSumChunk - 1) / kSumChunk;
}
PVF_HOST_DEVICE int64_t quantize_chunks(const QuantizeTensor& tensor) {
    return tensor.numel == 0
               ? 0
               : segment_count(tensor.layout, tensor.numel) * chunks_of_segment(tensor);
}
PVF_HOST_DEVICE int64_t quantize_backward_tiles(const QuantizeTensor& tensor) {
    return (quantize_chunks(tensor) + kQuantizeWarps - 1) / kQuantizeWarps;
}

struct Chunk {
    int64_t begin;
    int64_t count;
};

PVF_HOST_DEVICE Chunk chunk_at(const QuantizeTensor& tensor, int64_t chunk) {
    const int64_t each = chunks_of_segment(tensor);
    const int64_t segment = chunk / each;
    const int64_t first = (chunk - segment * each) * kSumChunk;
    const int64_t left = segment_size(tensor.layout, segment, tensor.numel) - first;
    return {segment_begin(tensor.layout, segment) + first, left < 0           ? 0
                                                           : left < kSumChunk ? left
                                                                              : int64_t{kSumChunk}};
}

constexpr int64_t kQuantizePart = 16384;

struct FakeQuantizeCpu {
    // Elements [begin, end).
    void (*part)(const QuantizeTensor&, const QuantizeOptions&, int64_t begin, int64_t end);
    // Gradient of the weights of a chunk; returns its part of the scale's.
    double (*chunk)(const QuantizeTensor&, const QuantizeOptions&, int64_t chunk);
    // Gradient of the scale of a segment, from the chunks' parts.
    void (*scale)(const QuantizeTensor&, const QuantizeOptions&, int64_t segment,
                  const double* sums);
};

}  // namespace pyvitfast
