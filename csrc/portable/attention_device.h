// Attention of a few queries on CUDA, for the attention ops. A block of four warps takes 16 queries
// of a group. Tiles of keys and values go through shared memory as floats; a lane has the scores of
// one or two keys for the four queries of its warp, so that a softmax needs its own warp only, and
// sums up columns of the result. The ops read each key for few queries, so bandwidth is the limit,
// not arithmetic.
#pragma once

#include "attention.h"
#include "portable/device.h"
#include "portable/intrinsics.h"
#include "portable/launch_result.h"
#include "portable/reduce.h"

namespace pyvitfast {
namespace {

using namespace device;

constexpr int kAttentionWarps = kAttentionThreads / 32;
constexpr int kWarpQueries = kAttentionQueries / kAttentionWarps;
constexpr int kWarpKeys = kAttentionKeysBackward / kAttentionWarps;

// Keys of a lane in the forward. Doubles only have to be right.
template <typename A>
constexpr int kLaneKeys = sizeof(A) == 8 ? 1 : kAttentionKeys / 32;

// Values that a lane takes from shared memory together.
template <typename A>
constexpr int kTogether = 16 / static_cast<int>(sizeof(A));

template <typename A>
constexpr A kMinusInfinity = -static_cast<A>(__builtin_huge_valf());

// The rows of a tile, widened, from where `row_at(i)` points to: `count` of them and zeros after.
template <typename A, typename T, typename F>
PVF_DEVICE void fill_tile(A* tile, int stride, int width, int rows, int count, A factor,
                          const F& row_at) {
    constexpr int kVector = 16 / static_cast<int>(sizeof(T));
    const int vectors = (width + kVector - 1) / kVector;
    PVF_NO_UNROLL
    for (int at = static_cast<int>(thread_idx().x); at < rows * vectors; at += kAttentionThreads) {
        const int row = at / vectors;
        const int column = at % vectors * kVector;
        A* to = tile + row * stride + column;
        if (row >= count) {
            for (int i = 0; i < kVector && column + i < stride; ++i) {
                store_shared(to + i, A(0));
            }
            continue;
        }
        const T* from = row_at(row) + column;
        if (column + kVector <= width && reinterpret_cast<std::uintptr_t>(from) % 16 == 0) {
            const auto values = load_vec<kVector>(from);
            PVF_UNROLL
            for (int i = 0; i < kVector; i += kTogether<A>) {
                Vec<A, kTogether<A>> part;
                PVF_UNROLL
                for (int j = 0; j < kTogether<A>; ++j) {
                    part[j] = static_cast<A>(to_float(values[i + j])) * factor;
                }
                store_shared_vec(to + i, part);
            }
        } else {
            for (int i = 0; i < kVector && column + i < stride; ++i) {
                const bool inside = column + i < width;
                store_shared(to + i,
                             inside ? static_cast<A>(to_float(load(from + i))) * factor : A(0));
            }
        }
    }
    // What is left between the last vector and the next row takes part in the products too.
    for (int at = static_cast<int>(thread_idx().x); at < rows; at += kAttentionThreads) {
        for (int column = vectors * kVector; column < stride; ++column) {
            store_shared(tile + at * stride + column, A(0));
        }
    }
}

// Where the keys of a group lie.
struct GroupKeys {
    AttentionGroup group;
    Span lines;
    Span columns;

    PVF_DEVICE GroupKeys(const AttentionParams& p, const AttentionGroup& g)
        : group(g), lines(keys_of_window(p, 0, g.down)), columns(keys_of_window(p, 1, g.across)) {}

    PVF_DEVICE int64_t count(const AttentionParams& p) const {
        return p.before + lines.count * columns.count;
    }

    template <typename T>
    PVF_DEVICE const T* row(const AttentionParams& p, const AttentionRows& before,
                            const AttentionRows& grid, int64_t key) const {
        if (key < p.before) {
            return static_cast<const T*>(before.data) + row_offset(before, group, key);
        }
        const auto within = static_cast<std::uint32_t>(key - p.before);
        const auto across = static_cast<std::uint32_t>(columns.count);
        return static_cast<const T*>(grid.data) + key_offset(grid, group.entry, group.head,
                                                             lines.first + within / across,
                                                             columns.first + within % across);
    }
};

// out[i][j] = sum over channels of the warp's row i of `left` times the lane's row j of `right`.
template <typename A, int kRows, int kLaneRows>
PVF_DEVICE void dot_rows(const A* left, const A* right, int stride, int width,
                         A (&out)[kRows][kLaneRows]) {
    PVF_UNROLL
    for (int i = 0; i < kRows; ++i) {
        PVF_UNROLL
        for (int j = 0; j < kLaneRows; ++j) {
            out[i][j] = A(0);
        }
    }
    const A* const own = right + static_cast<int>(lane_id()) * stride;
    PVF_NO_UNROLL
    for (int c = 0; c < width; c += kTogether<A>) {
        Vec<A, kTogether<A>> values[kLaneRows];
        PVF_UNROLL
        for (int j = 0; j < kLaneRows; ++j) {
            values[j] = load_shared_vec<kTogether<A>>(own + j * 32 * stride + c);
        }
        PVF_UNROLL
        for (int i = 0; i < kRows; ++i) {
            const auto row = load_shared_vec<kTogether<A>>(left + i * stride + c);
            PVF_UNROLL
            for (int j = 0; j < kLaneRows; ++j) {
                PVF_UNROLL
                for (int e = 0; e < kTogether<A>; ++e) {
                    out[i][j] = fma(row[e], values[j][e], out[i][j]);
                }
            }
        }
    }
}

// sums[i][j] += sum over n of factors[i * factor_stride + n * factor_step] * rows[n][column j], for
// the lane's columns lane, lane + 32, ..
template <typename A, int kRows, int kColumns>
PVF_DEVICE void add_rows(const A* factors, int factor_stride, int factor_step, const A* rows,
                         int stride, int count, int width, A (&sums)[kRows][kColumns]) {
    PVF_NO_UNROLL
    for (int n = 0; n < count; ++n) {
        A values[kColumns];
        PVF_UNROLL
        for (int j = 0; j < kColumns; ++j) {
            const int column = static_cast<int>(lane_id()) + 32 * j;
            values[j] = column < width ? load_shared(rows + n * stride + column) : A(0);
        }
        PVF_UNROLL
        for (int i = 0; i < kRows; ++i) {
            const A factor = load_shared(factors + i * factor_stride + n * factor_step);
            PVF_UNROLL
            for (int j = 0; j < kColumns; ++j) {
                sums[i][j] = fma(factor, values[j], sums[i][j]);
            }
        }
    }
}

template <typename A>
PVF_DEVICE A bias_at(const AttentionParams& p, const AttentionGroup& g, int64_t query,
                     int64_t key) {
    A value = A(0);
    with_float_summed_in<A>(p.bias.type, [&]<typename T>(Type<T>) {
        value = static_cast<A>(to_float(
            load(static_cast<const T*>(p.bias.data) + bias_offset(p.bias, g, query, key))));
    });
    return value;
}

template <typename A>
PVF_DEVICE A logarithm_of_sum(A peak, A total) {
    if (total == A(0)) {
        return kMinusInfinity<A>;
    }
    return peak == -kMinusInfinity<A> ? peak : peak + device::log(total);
}

struct BlockQueries {
    AttentionGroup group;
    int64_t split;
    int64_t first;
    int count;

    PVF_DEVICE explicit BlockQueries(const AttentionParams& p) {
        const int64_t tiles = tiles_along(p.queries, kAttentionQueries);
        const int64_t block = block_idx().x;
        group = attention_group(p, block / tiles / p.splits);
        split = block / tiles % p.splits;
        first = block % tiles * kAttentionQueries;
        count = static_cast<int>(p.queries - first < kAttentionQueries ? p.queries - first
                                                                       : kAttentionQueries);
    }
};

// Brings the keys and values of the block's split a tile at a time; body(first, count) of each.
template <typename T, int kKeys, typename A, typename F>
PVF_DEVICE void for_key_tiles(const AttentionParams& p, const BlockQueries& block,
                              const GroupKeys& of, A* keys, A* values, int stride, int width,
                              const F& body) {
    const int64_t begin = block.split * p.keys_per_split;
    const int64_t all = of.count(p);
    const int64_t end = begin + p.keys_per_split < all ? begin + p.keys_per_split : all;
    PVF_NO_UNROLL
    for (int64_t first = begin; first < end; first += kKeys) {
        const int count = static_cast<int>(end - first < kKeys ? end - first : kKeys);
        sync_threads();  // the last tile has been read
        fill_tile<A, T>(keys, stride, width, kKeys, count, A(1),
                        [&](int row) { return of.row<T>(p, p.k_before, p.k, first + row); });
        fill_tile<A, T>(values, stride, width, kKeys, count, A(1),
                        [&](int row) { return of.row<T>(p, p.v_before, p.v, first + row); });
        sync_threads();
        body(first, count);
    }
}

// A block: 16 queries of a group over a split of its keys.
template <typename A, typename T, int kColumns>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kAttentionThreads, sizeof(A) == 8 ? 2 : 4)
    attention_forward_kernel(const __grid_constant__ AttentionParams p) {
    constexpr int kKeys = 32 * kLaneKeys<A>;
    PVF_DYNAMIC_SHARED(A, shared);
    const int width = static_cast<int>(p.width);
    const int stride = static_cast<int>(attention_row_stride(p.width, sizeof(A) == 8));
    A* const queries = shared;
    A* const keys = queries + kAttentionQueries * stride;
    A* const values = keys + kKeys * stride;
    A* const weights = values + kKeys * stride;
    const BlockQueries block(p);
    const GroupKeys of(p, block.group);
    const int warp_first = static_cast<int>(warp_id()) * kWarpQueries;
    const int lane = static_cast<int>(lane_id());
    fill_tile<A, T>(queries, stride, width, kAttentionQueries, block.count, static_cast<A>(p.scale),
                    [&](int row) {
                        return static_cast<const T*>(p.q.data) +
                               row_offset(p.q, block.group, block.first + row);
                    });
    A peak[kWarpQueries];
    A total[kWarpQueries];
    A sums[kWarpQueries][kColumns];
    PVF_UNROLL
    for (int i = 0; i < kWarpQueries; ++i) {
        peak[i] = kMinusInfinity<A>;
        total[i] = A(0);
        PVF_UNROLL
        for (int j = 0; j < kColumns; ++j) {
            sums[i][j] = A(0);
        }
    }
    const auto attend = [&](int64_t first, int count) {
        A scores[kWarpQueries][kLaneKeys<A>];
        dot_rows(queries + warp_first * stride, keys, stride, width, scores);
        PVF_UNROLL
        for (int i = 0; i < kWarpQueries; ++i) {
            A greatest = peak[i];
            PVF_UNROLL
            for (int j = 0; j < kLaneKeys<A>; ++j) {
                const int key = lane + 32 * j;
                if (key >= count) {
                    scores[i][j] = kMinusInfinity<A>;
                } else if (p.bias.data != nullptr && warp_first + i < block.count) {
                    scores[i][j] +=
                        bias_at<A>(p, block.group, block.first + warp_first + i, first + key);
                }
                greatest = Max{}(greatest, scores[i][j]);
            }
            greatest = warp_max(greatest);
            const A from = greatest == kMinusInfinity<A> ? A(0) : greatest;
            const A shrink = exponential(peak[i] - from);
            A sum = A(0);
            PVF_UNROLL
            for (int j = 0; j < kLaneKeys<A>; ++j) {
                const A weight = exponential(scores[i][j] - from);
                sum += weight;
                store_shared(weights + (warp_first + i) * kKeys + lane + 32 * j, weight);
            }
            total[i] = fma(total[i], shrink, warp_sum(sum));
            peak[i] = greatest;
            PVF_UNROLL
            for (int j = 0; j < kColumns; ++j) {
                sums[i][j] *= shrink;
            }
        }
        sync_warp();
        add_rows(weights + warp_first * kKeys, kKeys, 1, values, stride, count, width, sums);
    };
    for_key_tiles<T, kKeys>(p, block, of, keys, values, stride, width, attend);
    PVF_UNROLL
    for (int i = 0; i < kWarpQueries; ++i) {
        if (warp_first + i >= block.count) {
            continue;
        }
        const int64_t query = block.first + warp_first + i;
        const int64_t at = (block.group.index * p.splits + block.split) * p.queries + query;
        const A share = total[i] == A(0) ? A(0) : A(1) / total[i];
        PVF_UNROLL
        for (int j = 0; j < kColumns; ++j) {
            const int column = lane + 32 * j;
            if (column >= width) {
                continue;
            }
            if (p.splits > 1) {
                store(entry_of<A>(p.partial, at * p.width + column), sums[i][j]);
            } else {
                store(entry_of<T>(p.o.data, row_offset(p.o, block.group, query) + column),
                      from_float<T>(static_cast<Accumulate<T>>(sums[i][j] * share)));
            }
        }
        if (lane == 0) {
            if (p.splits > 1) {
                store(entry_of<A>(p.partial_peak, at), peak[i]);
                store(entry_of<A>(p.partial_total, at), total[i]);
            } else {
                store(entry_of<A>(p.lse, at), logarithm_of_sum(peak[i], total[i]));
            }
        }
    }
}

// A warp: one query, its splits in order.
template <typename A, typename T>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kAttentionThreads, 2)
    attention_combine_kernel(const __grid_constant__ AttentionParams p) {
    const int64_t row = static_cast<int64_t>(block_idx().x) * kAttentionWarps + warp_id();
    if (row >= attention_groups(p) * p.queries) {
        return;
    }
    const AttentionGroup g = attention_group(p, row / p.queries);
    const int64_t query = row % p.queries;
    const auto at = [&](int64_t split) { return (g.index * p.splits + split) * p.queries + query; };
    A peak = kMinusInfinity<A>;
    for (int64_t s = 0; s < p.splits; ++s) {
        peak = Max{}(peak, load(entry_of<A>(p.partial_peak, at(s))));
    }
    const A from = peak == kMinusInfinity<A> ? A(0) : peak;
    A total = A(0);
    for (int64_t s = 0; s < p.splits; ++s) {
        const A factor = exponential(load(entry_of<A>(p.partial_peak, at(s))) - from);
        total = fma(factor, load(entry_of<A>(p.partial_total, at(s))), total);
    }
    const A share = total == A(0) ? A(0) : A(1) / total;
    for (int64_t column = lane_id(); column < p.width; column += 32) {
        A sum = A(0);
        for (int64_t s = 0; s < p.splits; ++s) {
            const A factor = exponential(load(entry_of<A>(p.partial_peak, at(s))) - from);
            sum = fma(factor, load(entry_of<A>(p.partial, at(s) * p.width + column)), sum);
        }
        store(entry_of<T>(p.o.data, row_offset(p.o, g, query) + column),
              from_float<T>(static_cast<Accumulate<T>>(sum * share)));
    }
    if (lane_id() == 0) {
        store(entry_of<A>(p.lse, row), logarithm_of_sum(peak, total));
    }
}

// A warp: delta of one query.
template <typename A, typename T>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kAttentionThreads, 2)
    attention_delta_kernel(const __grid_constant__ AttentionParams p) {
    const int64_t row = static_cast<int64_t>(block_idx().x) * kAttentionWarps + warp_id();
    if (row >= attention_groups(p) * p.queries) {
        return;
    }
    const AttentionGroup g = attention_group(p, row / p.queries);
    const T* slope = static_cast<const T*>(p.d_o.data) + row_offset(p.d_o, g, row % p.queries);
    const T* out = static_cast<const T*>(p.o.data) + row_offset(p.o, g, row % p.queries);
    A sum = A(0);
    for (int64_t c = lane_id(); c < p.width; c += 32) {
        sum = fma(static_cast<A>(to_float(load(slope + c))),
                  static_cast<A>(to_float(load(out + c))), sum);
    }
    sum = warp_sum(sum);
    if (lane_id() == 0) {
        store(entry_of<A>(p.delta, row),
              p.d_lse == nullptr ? sum : sum - load(entry_of<A>(p.d_lse, row)));
    }
}

// Shared memory of the backward kernels: two tiles of queries, two of keys, and what lies between.
template <typename A>
struct BackwardTiles {
    static constexpr int kKeys = kAttentionKeysBackward;
    int width;
    int stride;
    A* rows;    // queries, scaled
    A* slopes;  // of o
    A* keys;
    A* values;
    A* weights;       // [queries, keys]
    A* score_slopes;  // [queries, keys]

    PVF_DEVICE BackwardTiles(const AttentionParams& p, A* shared)
        : width(static_cast<int>(p.width)),
          stride(static_cast<int>(attention_row_stride(p.width, sizeof(A) == 8))) {
        rows = shared;
        slopes = rows + kAttentionQueries * stride;
        keys = slopes + kAttentionQueries * stride;
        values = keys + kKeys * stride;
        weights = values + kKeys * stride;
        score_slopes = weights + kAttentionQueries * kKeys;
    }

    template <typename T>
    PVF_DEVICE void bring_queries(const AttentionParams& p, const AttentionGroup& g, int64_t first,
                                  int count) {
        fill_tile<A, T>(
            rows, stride, width, kAttentionQueries, count, static_cast<A>(p.scale), [&](int row) {
                return static_cast<const T*>(p.q.data) + row_offset(p.q, g, first + row);
            });
        fill_tile<A, T>(slopes, stride, width, kAttentionQueries, count, A(1), [&](int row) {
            return static_cast<const T*>(p.d_o.data) + row_offset(p.d_o, g, first + row);
        });
    }

    // The weights of a tile and the slopes of its scores. The lane's key is key `key` of the group,
    // or none where that is negative.
    PVF_DEVICE void make(const AttentionParams& p, const AttentionGroup& g, int64_t first_query,
                         int count, int64_t key) {
        const int warp_first = static_cast<int>(warp_id()) * kWarpQueries;
        const int lane = static_cast<int>(lane_id());
        A scores[kWarpQueries][1];
        A products[kWarpQueries][1];
        dot_rows(rows + warp_first * stride, keys, stride, width, scores);
        dot_rows(slopes + warp_first * stride, values, stride, width, products);
        PVF_UNROLL
        for (int i = 0; i < kWarpQueries; ++i) {
            const int64_t query = first_query + warp_first + i;
            A weight = A(0);
            A slope = A(0);
            if (warp_first + i < count && key >= 0) {
                const int64_t at = g.index * p.queries + query;
                const A lse = load(entry_of<A>(p.lse, at));
                A score = scores[i][0];
                if (p.bias.data != nullptr) {
                    score += bias_at<A>(p, g, query, key);
                }
                weight = exponential(score - (lse == kMinusInfinity<A> ? A(0) : lse));
                slope = weight * (products[i][0] - load(entry_of<A>(p.delta, at)));
            }
            store_shared(weights + (warp_first + i) * kKeys + lane, weight);
            store_shared(score_slopes + (warp_first + i) * kKeys + lane, slope);
        }
    }
};

// A block: a tile of keys, in a line of the grid or before it, over all windows that read it. d_k
// and d_v have one owner, so nothing is added up between blocks.
template <typename A, typename T, int kColumns, bool kBefore>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kAttentionThreads, sizeof(A) == 8 ? 1 : 3)
    attention_key_slopes_kernel(const __grid_constant__ AttentionParams p) {
    constexpr int kKeys = kAttentionKeysBackward;
    PVF_DYNAMIC_SHARED(A, shared);
    BackwardTiles<A> tiles(p, shared);
    const int64_t block = block_idx().x;
    const int64_t in_line = tiles_along(kBefore ? p.before : p.grid[1], kKeys);
    const int64_t first = block % in_line * kKeys;
    const int lane = static_cast<int>(lane_id());
    const int warp_first = static_cast<int>(warp_id()) * kWarpKeys;
    AttentionGroup g{};
    int64_t line = 0;
    Span down{0, 1};
    Span across{0, 1};
    int64_t present = p.before - first;
    if constexpr (kBefore) {
        g = attention_group(p, block / in_line);
    } else {
        present = p.grid[1] - first;
        line = block / in_line % p.grid[0];
        g.head = block / in_line / p.grid[0] % p.heads;
        g.entry = block / in_line / p.grid[0] / p.heads;
        down = windows_of_keys(p, 0, line, 1);
        across = windows_of_keys(p, 1, first, present < kKeys ? present : kKeys);
    }
    const int count = static_cast<int>(present < kKeys ? present : kKeys);
    const auto row_of = [&](const AttentionRows& before, const AttentionRows& grid, int row) {
        return kBefore ? static_cast<T*>(before.data) + row_offset(before, g, first + row)
                       : static_cast<T*>(grid.data) +
                             key_offset(grid, g.entry, g.head, line, first + row);
    };
    fill_tile<A, T>(tiles.keys, tiles.stride, tiles.width, kKeys, count, A(1),
                    [&](int row) { return row_of(p.k_before, p.k, row); });
    fill_tile<A, T>(tiles.values, tiles.stride, tiles.width, kKeys, count, A(1),
                    [&](int row) { return row_of(p.v_before, p.v, row); });
    A d_k[kWarpKeys][kColumns];
    A d_v[kWarpKeys][kColumns];
    PVF_UNROLL
    for (int i = 0; i < kWarpKeys; ++i) {
        PVF_UNROLL
        for (int j = 0; j < kColumns; ++j) {
            d_k[i][j] = d_v[i][j] = A(0);
        }
    }
    for (int64_t window = 0; window < down.count * across.count; ++window) {
        int64_t key = first + lane;
        bool read = lane < count;
        if constexpr (!kBefore) {
            g.down = down.first + window / across.count;
            g.across = across.first + window % across.count;
            g.index =
                ((g.entry * p.windows[0] + g.down) * p.windows[1] + g.across) * p.heads + g.head;
            const Span lines = keys_of_window(p, 0, g.down);
            const Span columns = keys_of_window(p, 1, g.across);
            read = read && line >= lines.first && line < lines.first + lines.count &&
                   key >= columns.first && key < columns.first + columns.count;
            key = p.before + (line - lines.first) * columns.count + key - columns.first;
        }
        for (int64_t first_query = 0; first_query < p.queries; first_query += kAttentionQueries) {
            const int64_t left = p.queries - first_query;
            const int queries =
                static_cast<int>(left < kAttentionQueries ? left : kAttentionQueries);
            sync_threads();  // the last tiles have been read
            tiles.template bring_queries<T>(p, g, first_query, queries);
            sync_threads();
            tiles.make(p, g, first_query, queries, read ? key : -1);
            if (p.d_bias != nullptr && read) {
                with_float_summed_in<A>(p.bias.type, [&]<typename S>(Type<S>) {
                    const int64_t keys = p.before + p.grid[1];
                    const int own = static_cast<int>(warp_id()) * kWarpQueries;
                    for (int i = own; i < own + kWarpQueries && i < queries; ++i) {
                        const A slope = load_shared(tiles.score_slopes + i * kKeys + lane);
                        store(entry_of<S>(p.d_bias,
                                          (g.index * p.queries + first_query + i) * keys + key),
                              from_float<S>(static_cast<Accumulate<S>>(slope)));
                    }
                });
            }
            sync_threads();
            add_rows(tiles.weights + warp_first, 1, kKeys, tiles.slopes, tiles.stride, queries,
                     tiles.width, d_v);
            add_rows(tiles.score_slopes + warp_first, 1, kKeys, tiles.rows, tiles.stride, queries,
                     tiles.width, d_k);
        }
    }
    PVF_UNROLL
    for (int i = 0; i < kWarpKeys; ++i) {
        if (warp_first + i >= count) {
            continue;
        }
        T* const to_k = row_of(p.d_k_before, p.d_k, warp_first + i);
        T* const to_v = row_of(p.d_v_before, p.d_v, warp_first + i);
        PVF_UNROLL
        for (int j = 0; j < kColumns; ++j) {
            const int column = lane + 32 * j;
            if (column < tiles.width) {
                store(to_k + column, from_float<T>(static_cast<Accumulate<T>>(d_k[i][j])));
                store(to_v + column, from_float<T>(static_cast<Accumulate<T>>(d_v[i][j])));
            }
        }
    }
}

// A block: d_q of 16 queries of a group over a split of its keys. Weights are made again rather
// than read: they would be more bytes than the keys.
template <typename A, typename T, int kColumns>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kAttentionThreads, sizeof(A) == 8 ? 2 : 4)
    attention_query_slopes_kernel(const __grid_constant__ AttentionParams p) {
    constexpr int kKeys = kAttentionKeysBackward;
    PVF_DYNAMIC_SHARED(A, shared);
    BackwardTiles<A> tiles(p, shared);
    const BlockQueries block(p);
    const GroupKeys of(p, block.group);
    const int warp_first = static_cast<int>(warp_id()) * kWarpQueries;
    const int lane = static_cast<int>(lane_id());
    tiles.template bring_queries<T>(p, block.group, block.first, block.count);
    A d_q[kWarpQueries][kColumns];
    PVF_UNROLL
    for (int i = 0; i < kWarpQueries; ++i) {
        PVF_UNROLL
        for (int j = 0; j < kColumns; ++j) {
            d_q[i][j] = A(0);
        }
    }
    const auto add_slopes = [&](int64_t first, int count) {
        tiles.make(p, block.group, block.first, block.count, lane < count ? first + lane : -1);
        sync_warp();
        add_rows(tiles.score_slopes + warp_first * kKeys, kKeys, 1, tiles.keys, tiles.stride, count,
                 tiles.width, d_q);
    };
    for_key_tiles<T, kKeys>(p, block, of, tiles.keys, tiles.values, tiles.stride, tiles.width,
                            add_slopes);
    PVF_UNROLL
    for (int i = 0; i < kWarpQueries; ++i) {
        if (warp_first + i >= block.count) {
            continue;
        }
        const int64_t query = block.first + warp_first + i;
        const int64_t at = (block.group.index * p.splits + block.split) * p.queries + query;
        PVF_UNROLL
        for (int j = 0; j < kColumns; ++j) {
            const int column = lane + 32 * j;
            if (column >= tiles.width) {
                continue;
            }
            if (p.splits > 1) {
                store(entry_of<A>(p.partial, at * p.width + column), d_q[i][j]);
            } else {
                store(
                    entry_of<T>(p.d_q.data, row_offset(p.d_q, block.group, query) + column),
                    from_float<T>(static_cast<Accumulate<T>>(d_q[i][j] * static_cast<A>(p.scale))));
            }
        }
    }
}

// A warp: d_q of one query, its splits in order.
template <typename A, typename T>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kAttentionThreads, 2)
    attention_add_query_slopes_kernel(const __grid_constant__ AttentionParams p) {
    const int64_t row = static_cast<int64_t>(block_idx().x) * kAttentionWarps + warp_id();
    if (row >= attention_groups(p) * p.queries) {
        return;
    }
    const AttentionGroup g = attention_group(p, row / p.queries);
    const int64_t query = row % p.queries;
    for (int64_t column = lane_id(); column < p.width; column += 32) {
        A sum = A(0);
        for (int64_t s = 0; s < p.splits; ++s) {
            const int64_t at = (g.index * p.splits + s) * p.queries + query;
            sum += load(entry_of<A>(p.partial, at * p.width + column));
        }
        store(entry_of<T>(p.d_q.data, row_offset(p.d_q, g, query) + column),
              from_float<T>(static_cast<Accumulate<T>>(sum * static_cast<A>(p.scale))));
    }
}

// One launch after another while all goes well.
class Launches {
   public:
    Launches(const AttentionParams& p, void* stream) : p_(p), stream_(as_stream(stream)) {}

    using Kernel = void (*)(AttentionParams);

    void run(Kernel kernel, int64_t blocks, int64_t shared_bytes = 0) {
        if (blocks == 0 || status_ != kLaunchOk) {
            return;
        }
        const auto bytes = static_cast<std::size_t>(shared_bytes);
        status_ = bytes > 48 * 1024 ? allow_dynamic_shared(kernel, bytes) : kLaunchOk;
        if (status_ == kLaunchOk) {
            status_ = launch(kernel, Dim3{static_cast<unsigned>(blocks), 1, 1},
                             Dim3{kAttentionThreads, 1, 1}, bytes, stream_, p_);
        }
    }
    const char* result() const { return launch_result(status_); }

   private:
    const AttentionParams& p_;
    Stream stream_;
    LaunchStatus status_ = kLaunchOk;
};

// Calls f<A, T, kColumns>() for the dtype of the rows and the columns of a lane.
template <typename F>
void with_attention_kernels(const AttentionParams& p, const F& f) {
    with_float(p.type, [&]<typename T>(Type<T>) {
        using A = Accumulate<T>;
        if (p.width <= 32) {
            f.template operator()<A, T, 1>();
        } else if (p.width <= 64) {
            f.template operator()<A, T, 2>();
        } else {
            f.template operator()<A, T, 4>();
        }
    });
}

const char* launch_attention_forward(const AttentionParams& p, void* stream) {
    Launches launches(p, stream);
    const int64_t groups = attention_groups(p);
    const int64_t blocks = groups * p.splits * tiles_along(p.queries, kAttentionQueries);
    with_attention_kernels(p, [&]<typename A, typename T, int kColumns>() {
        launches.run(attention_forward_kernel<A, T, kColumns>, blocks,
                     attention_forward_shared(p.width, sizeof(A) == 8));
        if (p.splits > 1) {
            launches.run(attention_combine_kernel<A, T>,
                         tiles_along(groups * p.queries, kAttentionWarps));
        }
    });
    return launches.result();
}

const char* launch_attention_backward(const AttentionParams& p, void* stream) {
    Launches launches(p, stream);
    const int64_t groups = attention_groups(p);
    const int64_t row_blocks = tiles_along(groups * p.queries, kAttentionWarps);
    const int64_t shared = attention_backward_shared(p.width, p.type == FloatType::kFloat64);
    constexpr int64_t kKeys = kAttentionKeysBackward;
    with_attention_kernels(p, [&]<typename A, typename T, int kColumns>() {
        launches.run(attention_delta_kernel<A, T>, row_blocks);
        launches.run(attention_key_slopes_kernel<A, T, kColumns, false>,
                     p.batch * p.heads * p.grid[0] * tiles_along(p.grid[1], kKeys), shared);
        launches.run(attention_key_slopes_kernel<A, T, kColumns, true>,
                     groups * tiles_along(p.before, kKeys), shared);
        launches.run(attention_query_slopes_kernel<A, T, kColumns>,
                     groups * p.splits * tiles_along(p.queries, kAttentionQueries), shared);
        if (p.splits > 1) {
            launches.run(attention_add_query_slopes_kernel<A, T>, row_blocks);
        }
    });
    return launches.result();
}

}  // namespace
}  // namespace pyvitfast
