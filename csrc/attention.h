#pragma once

// What the attention ops share: windows of queries over windows of a grid of keys. Plain attention
// is one window over a grid of one line.

#include <cstdint>

#include "float_type.h"
#include "portable/platform.h"

namespace pyvitfast {

// Queries: row r of head h of window (y, x) of entry b is at data + b * batch + y * line + x *
// column + r * row + h * head, in elements; keys likewise with the place in the grid and no row.
// The channels of a head are neighbours.
struct AttentionRows {
    void* data;
    int64_t batch;
    int64_t line;
    int64_t column;
    int64_t row;
    int64_t head;
};

struct AttentionBias {
    const void* data;
    int64_t batch;
    int64_t head;
    int64_t row;
    int64_t key;
    FloatType type;
};

// Arrays without a type hold floats, or doubles in a double call, densely. A group is a head of a
// window of an entry: ((b * windows[0] + y) * windows[1] + x) * heads + h.
struct AttentionParams {
    int64_t batch;
    int64_t heads;
    int64_t width;       // channels of a head
    int64_t queries;     // of a window
    int64_t before;      // keys of a window that stand before those of the grid
    int64_t windows[2];  // down, across
    int64_t grid[2];
    int64_t valid[2];  // keys at or past these are never read
    int64_t window[2];
    int64_t stride[2];
    int64_t offset[2];
    int64_t splits;  // of the keys of a group
    int64_t keys_per_split;
    double scale;
    FloatType type;  // of all rows

    AttentionRows q;
    AttentionRows k;
    AttentionRows v;
    AttentionRows k_before;
    AttentionRows v_before;
    AttentionRows o;
    AttentionBias bias;  // null data: none
    void* lse;           // [groups, queries]

    void* partial;        // [groups, splits, queries, width]; in the backward parts of d_q
    void* partial_peak;   // [groups, splits, queries]
    void* partial_total;  // [groups, splits, queries]

    AttentionRows d_o;
    AttentionRows d_q;
    AttentionRows d_k;
    AttentionRows d_v;
    AttentionRows d_k_before;
    AttentionRows d_v_before;
    const void* d_lse;  // [groups, queries]; null: zeros
    void* delta;        // [groups, queries] d_o . o - d_lse
    void* d_bias;       // [groups, queries, before + keys] of the bias's type; null: not wanted
    // Keys of the grid that a task of the CPU backward takes: whole lines, or a part of one.
    int64_t tile_lines;
    int64_t tile_columns;
};

struct AttentionGroup {
    int64_t index;
    int64_t entry;
    int64_t down;
    int64_t across;
    int64_t head;
};

PVF_HOST_DEVICE AttentionGroup attention_group(const AttentionParams& p, int64_t index) {
    const int64_t window = index / p.heads;
    return {index, window / p.windows[1] / p.windows[0], window / p.windows[1] % p.windows[0],
            window % p.windows[1], index % p.heads};
}

PVF_HOST_DEVICE int64_t attention_groups(const AttentionParams& p) {
    return p.batch * p.windows[0] * p.windows[1] * p.heads;
}

struct Span {
    int64_t first;
    int64_t count;
};

PVF_HOST_DEVICE Span span_within(int64_t begin, int64_t end, int64_t low, int64_t high) {
    begin = begin > low ? begin : low;
    end = end < high ? end : high;
    return {begin, end > begin ? end - begin : 0};
}

// Lines (axis 0) or columns (axis 1) of the grid that a window reads.
PVF_HOST_DEVICE Span keys_of_window(const AttentionParams& p, int axis, int64_t at) {
    const int64_t begin = at * p.stride[axis] + p.offset[axis];
    return span_within(begin, begin + p.window[axis], 0, p.valid[axis]);
}

// Windows that read any of `count` lines or columns.
PVF_HOST_DEVICE Span windows_of_keys(const AttentionParams& p, int axis, int64_t first,
                                     int64_t count) {
    const int64_t low =
        first - p.offset[axis] - p.window[axis];              // a window that begins here misses
    const int64_t high = first + count - 1 - p.offset[axis];  // the last one begins here
    const int64_t begin = low < 0 ? 0 : low / p.stride[axis] + 1;
    const int64_t end = high < 0 ? 0 : high / p.stride[axis] + 1;
    return span_within(begin, end, 0, p.windows[axis]);
}

PVF_HOST_DEVICE int64_t row_offset(const AttentionRows& rows, const AttentionGroup& g,
                                   int64_t row) {
    return g.entry * rows.batch + g.down * rows.line + g.across * rows.column + row * rows.row +
           g.head * rows.head;
}

PVF_HOST_DEVICE int64_t key_offset(const AttentionRows& rows, int64_t entry, int64_t head,
                                   int64_t line, int64_t column) {
    return entry * rows.batch + line * rows.line + column * rows.column + head * rows.head;
}

PVF_HOST_DEVICE int64_t bias_offset(const AttentionBias& bias, const AttentionGroup& g,
                                    int64_t query, int64_t key) {
    return g.entry * bias.batch + g.head * bias.head + query * bias.row + key * bias.key;
}

// Keys of a window that nothing clips, those before the grid's included.
PVF_HOST_DEVICE int64_t most_keys(const AttentionParams& p) {
    const int64_t lines = p.window[0] < p.valid[0] ? p.window[0] : p.valid[0];
    const int64_t columns = p.window[1] < p.valid[1] ? p.window[1] : p.valid[1];
    return p.before + lines * columns;
}

// Tasks of the CPU backward: tiles of the grid, then the keys before it, a group each.
PVF_HOST_DEVICE int64_t tiles_along(int64_t count, int64_t tile) {
    return (count + tile - 1) / tile;
}
PVF_HOST_DEVICE int64_t attention_grid_tiles(const AttentionParams& p) {
    return p.batch * p.heads * tiles_along(p.grid[0], p.tile_lines) *
           tiles_along(p.grid[1], p.tile_columns);
}

template <typename A>
PVF_HOST_DEVICE A* entry_of(void* array, int64_t at) {
    return static_cast<A*>(array) + at;
}
template <typename A>
PVF_HOST_DEVICE const A* entry_of(const void* array, int64_t at) {
    return static_cast<const A*>(array) + at;
}

struct AttentionCpu {
    // Splits [begin, end) of all groups.
    void (*forward)(const AttentionParams&, int64_t begin, int64_t end);
    // Groups [begin, end): the splits' partial results into o and lse.
    void (*combine)(const AttentionParams&, int64_t begin, int64_t end);
    // Groups [begin, end): delta.
    void (*prepare)(const AttentionParams&, int64_t begin, int64_t end);
    // Tiles [begin, end) of the keys: d_k, d_v, d_bias, and for plain attention parts of d_q.
    void (*key_slopes)(const AttentionParams&, int64_t begin, int64_t end);
    // Groups [begin, end): d_q, from its parts for plain attention.
    void (*query_slopes)(const AttentionParams&, int64_t begin, int64_t end);
};

// Queries, keys of a block and threads of the CUDA kernels.
constexpr int kAttentionQueries = 16;
constexpr int kAttentionThreads = 128;
constexpr int kAttentionKeys = 64;  // of a tile in the forward
constexpr int kAttentionKeysBackward = 32;

// Channels of a head that the CUDA kernels hold.
constexpr int64_t kAttentionMostWidth = 128;

// Splits of a group's keys: two blocks a multiprocessor of a large GPU, 64 keys each at least.
PVF_HOST_DEVICE int64_t attention_cuda_splits(int64_t groups, int64_t queries, int64_t keys) {
    constexpr int64_t kBlocks = 264;
    const int64_t blocks = groups * tiles_along(queries, kAttentionQueries);
    const int64_t wanted = blocks > 0 ? tiles_along(kBlocks, blocks) : 1;
    const int64_t most = keys > kAttentionKeys ? keys / kAttentionKeys : 1;
    return wanted < most ? wanted : most;
}

// Floats from one row of a tile in shared memory to the next: neighbouring rows are read together,
// 16 bytes a lane, so the distance is an odd number of those.
PVF_HOST_DEVICE int64_t attention_row_stride(int64_t width, bool wide) {
    const int64_t values = wide ? 2 : 4;
    const int64_t vectors = (width + values - 1) / values;
    return (vectors + 1 - vectors % 2) * values;
}

// Bytes of shared memory of a block.
PVF_HOST_DEVICE int64_t attention_forward_shared(int64_t width, bool wide) {
    const int64_t keys = wide ? 32 : kAttentionKeys;
    return (wide ? 8 : 4) * ((kAttentionQueries + 2 * keys) * attention_row_stride(width, wide) +
                             kAttentionQueries * keys);
}
PVF_HOST_DEVICE int64_t attention_backward_shared(int64_t width, bool wide) {
    return (wide ? 8 : 4) * 2 *
           ((kAttentionQueries + kAttentionKeysBackward) * attention_row_stride(width, wide) +
            kAttentionQueries * kAttentionKeysBackward);
}

struct AttentionCuda {
    const char* (*forward)(const AttentionParams&, void* stream);
    const char* (*backward)(const AttentionParams&, void* stream);
};

}  // namespace pyvitfast
