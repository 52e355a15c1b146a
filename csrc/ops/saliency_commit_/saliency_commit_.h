#pragma once

#include <cstdint>

#include "portable/platform.h"

namespace pyvitfast {

struct SaliencyCommitParams {
    void* acc;              // [units] float or double
    int64_t* counts;        // [2] committed, skipped
    const void* workspace;  // [size] as acc
    const void* indptr;     // [units + 1] int32 or int64
    const void* indices;    // [entries] as indptr
    const void* coeff;      // [units] as acc, or null: 1
    void* squares;          // [units] scratch, as acc
    int32_t* unclean;       // one flag, 0 at launch
    int64_t units;
    int64_t size;
    int64_t entries;
    int32_t wide;          // acc is double
    int32_t wide_indices;  // int64
};

constexpr int kCommitThreads = 256;
constexpr int64_t kCommitMaxBlocks = 1024;  // each thread strides over the rest

PVF_HOST_DEVICE int64_t commit_blocks(int64_t work) {
    const int64_t blocks = (work + kCommitThreads - 1) / kCommitThreads;
    return blocks < 1 ? 1 : blocks < kCommitMaxBlocks ? blocks : kCommitMaxBlocks;
}

struct SaliencyCommitCpu {
    // True when indptr and indices of units [begin, end) point into the workspace.
    bool (*valid)(const SaliencyCommitParams&, int64_t begin, int64_t end);
    // True when workspace entries [begin, end) are finite.
    bool (*finite)(const SaliencyCommitParams&, int64_t begin, int64_t end);
    // Squares of units [begin, end) into scratch; true when they are finite.
    bool (*square)(const SaliencyCommitParams&, int64_t begin, int64_t end);
    void (*add)(const SaliencyCommitParams&, int64_t begin, int64_t end);
};

}  // namespace pyvitfast
