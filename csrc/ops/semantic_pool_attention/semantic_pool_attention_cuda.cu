#include "ops/semantic_pool_attention/semantic_pool_attention.h"
#include "ops/semantic_pool_attention/semantic_pool_attention_math.h"
#include "portable/intrinsics.h"
#include "portable/reduce.h"
#include "portable/strided_product_device.h"

namespace pyvitfast {

namespace {

constexpr int kThreads = kPoolThreads;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = kPoolTile;
constexpr int kScores = kTile * kTile;  // of a tile of queries with a tile of rows
static_assert(kScores == kThreads);

template <typename A>
PVF_DEVICE A load_or(const void* vector, int64_t at, A otherwise) {
    return vector == nullptr ? otherwise : load(part<A>(vector, at));
}

// Mean and inverse deviation of `count` values, by a warp; value(i) is asked for twice.
template <typename A>
struct WarpMoments {
    A mean;
    A rstd;

    template <typename F>
    PVF_DEVICE WarpMoments(int64_t count, double eps, const F& value) {
        A total = A(0);
        for (int64_t i = lane_id(); i < count; i += 32) {
            total += value(i);
        }
        mean = warp_sum(total) / static_cast<A>(count);
        A squares = A(0);
        for (int64_t i = lane_id(); i < count; i += 32) {
            const A off = value(i) - mean;
            squares = fma(off, off, squares);
        }
        rstd = rsqrt(warp_sum(squares) / static_cast<A>(count) + static_cast<A>(eps));
    }
};

// A block a row of the weights.
template <typename A>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kThreads, 2)
    semantic_pool_fold_kernel(const __grid_constant__ SemanticPoolParams p) {
    const int64_t row = block_idx().x;
    const int64_t c = p.channels;
    A shift = A(0);
    for (int64_t i = thread_idx().x; i < c; i += kThreads) {
        const A gamma = load_or(p.gamma, i, A(1));
        const A v = load(part<A>(p.v_weight, row * c + i));
        store(part<A>(p.k_folded, row * c + i),
              load(part<A>(p.k_weight, row * c + i)) * static_cast<A>(p.scale) * gamma);
        if (p.norm) {
            store(part<A>(p.v_folded, row * c + i), v * gamma);
        }
        shift = fma(v, load_or(p.beta, i, A(0)), shift);
    }
    shift = block_sum(p.beta == nullptr ? A(0) : shift);
    if (thread_idx().x == 0) {
        store(part<A>(p.v_bias_folded, row), load_or(p.v_bias, row, A(0)) + shift);
    }
}

// A warp a query.
template <typename A>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kThreads, 2)
    semantic_pool_prepare_kernel(const __grid_constant__ SemanticPoolParams p) {
    const int64_t c = p.channels;
    const int64_t row = static_cast<int64_t>(block_idx().x) * kWarps + warp_id();
    if (row >= p.batch * p.queries) {
        return;
    }
    const auto value = [&](int64_t i) { return load(part<A>(p.query, row * c + i)); };
    A mean = A(0);
    A rstd = A(1);
    if (p.norm) {
        const WarpMoments<A> moments(c, p.eps, value);
        mean = moments.mean;
        rstd = moments.rstd;
    }
    const auto start = [&](void* rows, const void* bias, int64_t i) {
        if (rows != nullptr) {
            store(part<A>(rows, row * c + i), load_or(bias, i, A(0)));
        }
    };
    for (int64_t i = lane_id(); i < c; i += 32) {
        const A hat = p.norm ? (value(i) - mean) * rstd : value(i);
        store(part<A>(p.query_norm, row * c + i),
              p.norm ? hat * load_or(p.gamma, i, A(1)) + load_or(p.beta, i, A(0)) : hat);
        start(p.q, p.q_bias, i);
        start(p.mixed, p.v_bias_folded, i);
        start(p.out, p.proj_bias, i);
    }
}

// What a block holds in shared memory. Rows of channels are padded, so that rows start in
// different banks.
template <typename A>
struct PoolShared {
    A* queries;  // [kTile, C]: u
    A* hats;     // [kTile, C] of the tokens
    A* sums;     // [kTile, C]
    A* partial;  // [kWarps, kTile, kTile] scores by warp
    A* scores;   // [kTile, kTile], queries down
    A* slopes;   // [kTile, kTile]
    A* peak;     // [kTile] each
    A* total;
    A* factor;
    A* rstd;
    int stride;

    PVF_DEVICE PoolShared(A* memory, int64_t channels)
        : stride(static_cast<int>(pool_row_stride(channels))) {
        queries = memory;
        hats = queries + kTile * stride;
        sums = hats + kTile * stride;
        partial = sums + kTile * stride;
        scores = partial + kWarps * kScores;
        slopes = scores + kScores;
        peak = slopes + kScores;
        total = peak + kTile;
        factor = total + kTile;
        rstd = factor + kTile;
    }
};

// Rows [first, first + kTile) of [R, C] with zeros below the last, and behind the channels.
template <typename A>
PVF_DEVICE void load_wide_rows(const A* from, int64_t first, int64_t rows, int64_t channels, A* to,
                               int stride) {
    for (int at = static_cast<int>(thread_idx().x); at < kTile * stride; at += kThreads) {
        const int row = at / stride;
        const int i = at % stride;
        const bool there = first + row < rows && i < channels;
        store_shared(to + at, there ? load(from + (first + row) * channels + i) : A(0));
    }
}

// Hats of rows [first, first + kTile) of an image below `last`, with zeros where there is nothing.
// A warp takes whole rows, so no thread waits for another warp.
template <typename A>
PVF_DEVICE void load_hats(const SemanticPoolParams& p, int64_t image, int64_t first, int64_t last,
                          const PoolShared<A>& shared) {
    const int64_t c = p.channels;
    for (int row = static_cast<int>(warp_id()); row < kTile; row += kWarps) {
        A* const to = shared.hats + row * shared.stride;
        const bool there = first + row < last;
        if (there) {
            const TokenPlace place = place_in(p.before, p.tokens, first + row);
            with_float_summed_in<A>(place.rows->type, [&]<typename T>(Type<T>) {
                const T* from = static_cast<const T*>(place.rows->data) +
                                image * place.rows->batch + place.at * place.rows->row;
                for (int64_t i = lane_id(); i < c; i += 32) {
                    store_shared(to + i, static_cast<A>(to_float(load(from + i))));
                }
            });
        }
        if (there && p.norm) {
            // A lane meets its own values only.
            const WarpMoments<A> moments(c, p.eps, [&](int64_t i) { return load_shared(to + i); });
            for (int64_t i = lane_id(); i < c; i += 32) {
                store_shared(to + i, (load_shared(to + i) - moments.mean) * moments.rstd);
            }
            if (lane_id() == 0) {
                store_shared(shared.rstd + row, moments.rstd);
                const int64_t at = image * rows_of_image(p) + first + row;
                if (p.rstd != nullptr) {
                    store(part<A>(p.mean, at), moments.mean);
                    store(part<A>(p.rstd, at), moments.rstd);
                }
            }
        }
        for (int64_t i = (there ? c : 0) + lane_id(); i < shared.stride; i += 32) {
            store_shared(to + i, A(0));
        }
    }
}

// scores[r][n] = queries r . hats n. Warps share the channels out, a lane has two queries and four
// rows; each thread adds one score up in the end.
template <typename A>
PVF_DEVICE void dot_tiles(const PoolShared<A>& shared, int64_t channels, A* scores) {
    constexpr int kStep = 4;
    constexpr int kOwnQueries = 2;
    constexpr int kOwnRows = 4;
    const int query = static_cast<int>(lane_id()) / 4 * kOwnQueries;
    const int row = static_cast<int>(lane_id()) % 4;
    A sums[kOwnQueries][kOwnRows] = {};
    for (int i = static_cast<int>(warp_id()) * kStep; i < channels; i += kWarps * kStep) {
        Vec<A, kStep> left[kOwnQueries];
        PVF_UNROLL
        for (int q = 0; q < kOwnQueries; ++q) {
            left[q] = load_shared_vec<kStep>(shared.queries + (query + q) * shared.stride + i);
        }
        PVF_UNROLL
        for (int n = 0; n < kOwnRows; ++n) {
            const auto right =
                load_shared_vec<kStep>(shared.hats + (row + 4 * n) * shared.stride + i);
            PVF_UNROLL
            for (int q = 0; q < kOwnQueries; ++q) {
                PVF_UNROLL
                for (int k = 0; k < kStep; ++k) {
                    sums[q][n] = fma(left[q][k], right[k], sums[q][n]);
                }
            }
        }
    }
    PVF_UNROLL
    for (int q = 0; q < kOwnQueries; ++q) {
        PVF_UNROLL
        for (int n = 0; n < kOwnRows; ++n) {
            store_shared(shared.partial + warp_id() * kScores + (query + q) * kTile + row + 4 * n,
                         sums[q][n]);
        }
    }
    sync_threads();
    A sum = A(0);
    PVF_UNROLL
    for (int warp = 0; warp < kWarps; ++warp) {
        sum += load_shared(shared.partial + warp * kScores + thread_idx().x);
    }
    store_shared(scores + thread_idx().x, sum);
}

// sums[r] = factor[r] * sums[r] + weights[r] . hats, four queries and four channels a thread.
template <typename A, typename F>
PVF_DEVICE void add_hats(const PoolShared<A>& shared, const A* weights, int64_t channels,
                         const F& factor) {
    constexpr int kStep = 4;
    const int columns = static_cast<int>((channels + kStep - 1) / kStep);
    for (int at = static_cast<int>(thread_idx().x); at < columns * kTile / kStep; at += kThreads) {
        const int i = at % columns * kStep;
        const int first = at / columns * kStep;
        Vec<A, kStep> sums[kStep];
        PVF_UNROLL
        for (int q = 0; q < kStep; ++q) {
            sums[q] = load_shared_vec<kStep>(shared.sums + (first + q) * shared.stride + i);
            const A by = factor(first + q);
            PVF_UNROLL
            for (int k = 0; k < kStep; ++k) {
                sums[q][k] *= by;
            }
        }
        for (int n = 0; n < kTile; ++n) {
            const auto hat = load_shared_vec<kStep>(shared.hats + n * shared.stride + i);
            PVF_UNROLL
            for (int q = 0; q < kStep; ++q) {
                const A weight = load_shared(weights + (first + q) * kTile + n);
                PVF_UNROLL
                for (int k = 0; k < kStep; ++k) {
                    sums[q][k] = fma(weight, hat[k], sums[q][k]);
                }
            }
        }
        PVF_UNROLL
        for (int q = 0; q < kStep; ++q) {
            store_shared_vec(shared.sums + (first + q) * shared.stride + i, sums[q]);
        }
    }
}

template <typename A>
PVF_DEVICE void clear_sums(const PoolShared<A>& shared) {
    for (int at = static_cast<int>(thread_idx().x); at < kTile * shared.stride; at += kThreads) {
        store_shared(shared.sums + at, A(0));
    }
}

// The place of a block among (image, tile of queries with heads, split).
struct PoolBlock {
    int64_t image;
    int64_t query;  // first row of [R, C]
    int64_t split;
    int64_t first;  // row of [before; tokens]
    int64_t last;
};

PVF_DEVICE PoolBlock place_of_block(const SemanticPoolParams& p) {
    const int64_t groups = (p.heads * p.queries + kTile - 1) / kTile;
    const int64_t block = block_idx().x;
    PoolBlock place;
    place.split = block % p.splits;
    place.query = block / p.splits % groups * kTile;
    place.image = block / p.splits / groups;
    place.first = place.split * p.rows_per_split;
    const int64_t end = place.first + p.rows_per_split;
    place.last = end < rows_of_image(p) ? end : rows_of_image(p);
    return place;
}

// Sums of a block to rows of [B, R, C] or [B, splits, R, C].
template <typename A, typename F>
PVF_DEVICE void store_sums(const SemanticPoolParams& p, const PoolBlock& place,
                           const PoolShared<A>& shared, void* alone, const F& factor) {
    const int64_t c = p.channels;
    const int64_t rows = p.heads * p.queries;
    const int64_t base = p.splits == 1 ? place.image : place.image * p.splits + place.split;
    A* const to = part<A>(p.splits == 1 ? alone : p.partial, (base * rows + place.query) * c);
    for (int64_t at = thread_idx().x; at < kTile * c; at += kThreads) {
        const int row = static_cast<int>(at / c);
        if (place.query + row < rows) {
            store(to + at, load_shared(shared.sums + row * shared.stride + at % c) * factor(row));
        }
    }
}

template <typename A>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kThreads, 2)
    semantic_pool_attend_kernel(const __grid_constant__ SemanticPoolParams p) {
    PVF_DYNAMIC_SHARED(A, memory);
    const PoolShared<A> shared(memory, p.channels);
    const PoolBlock place = place_of_block(p);
    const int64_t rows = p.heads * p.queries;
    const int thread = static_cast<int>(thread_idx().x);
    load_wide_rows(part<A>(static_cast<const void*>(p.u), place.image * rows * p.channels),
                   place.query, rows, p.channels, shared.queries, shared.stride);
    clear_sums(shared);
    if (thread < kTile) {
        store_shared(shared.peak + thread, -A(INFINITY));
        store_shared(shared.total + thread, A(0));
    }
    for (int64_t first = place.first; first < place.last; first += kTile) {
        load_hats(p, place.image, first, place.last, shared);
        sync_threads();
        dot_tiles(shared, p.channels, shared.scores);
        sync_threads();
        // Half a warp a query, a lane a row.
        const int query = thread / kTile;
        const bool there = first + thread % kTile < place.last;
        const A score = there ? load_shared(shared.scores + thread) : -A(INFINITY);
        A peak = score;
        PVF_UNROLL
        for (int step = kTile / 2; step > 0; step /= 2) {
            peak = Max{}(peak, shuffle_xor(peak, step));
        }
        const A before = load_shared(shared.peak + query);
        peak = Max{}(peak, before);
        const A own = there ? exponential(score - peak) : A(0);
        A total = own;
        PVF_UNROLL
        for (int step = kTile / 2; step > 0; step /= 2) {
            total += shuffle_xor(total, step);
        }
        store_shared(shared.scores + thread, own);
        sync_warp();
        if (thread % kTile == 0) {
            const A factor = first == place.first ? A(0) : exponential(before - peak);
            store_shared(shared.peak + query, peak);
            store_shared(shared.factor + query, factor);
            store_shared(shared.total + query, load_shared(shared.total + query) * factor + total);
        }
        sync_threads();
        add_hats(shared, shared.scores, p.channels,
                 [&](int q) { return load_shared(shared.factor + q); });
        sync_threads();
    }
    store_sums(p, place, shared, p.context, [&](int row) {
        return p.splits == 1 ? A(1) / load_shared(shared.total + row) : A(1);
    });
    if (thread < kTile && place.query + thread < rows) {
        const bool alone = p.splits == 1;
        const int64_t base = alone ? place.image : place.image * p.splits + place.split;
        const int64_t at = base * rows + place.query + thread;
        store(part<A>(alone ? p.peak : p.partial_peak, at), load_shared(shared.peak + thread));
        store(part<A>(alone ? p.total : p.partial_total, at), load_shared(shared.total + thread));
    }
}

// A warp a row of [B, R].
template <typename A>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kThreads, 2)
    semantic_pool_combine_kernel(const __grid_constant__ SemanticPoolParams p) {
    const int64_t rows = p.heads * p.queries;
    const int64_t row = static_cast<int64_t>(block_idx().x) * kWarps + warp_id();
    if (row >= p.batch * rows) {
        return;
    }
    const auto at = [&](int64_t split) {
        return (row / rows * p.splits + split) * rows + row % rows;
    };
    A peak = load(part<A>(p.partial_peak, at(0)));
    for (int64_t s = 1; s < p.splits; ++s) {
        peak = Max{}(peak, load(part<A>(p.partial_peak, at(s))));
    }
    const auto factor = [&](int64_t s) {
        return exponential(load(part<A>(p.partial_peak, at(s))) - peak);
    };
    A total = A(0);
    for (int64_t s = 0; s < p.splits; ++s) {
        total = fma(factor(s), load(part<A>(p.partial_total, at(s))), total);
    }
    for (int64_t i = lane_id(); i < p.channels; i += 32) {
        A sum = A(0);
        for (int64_t s = 0; s < p.splits; ++s) {
            sum = fma(factor(s), load(part<A>(p.partial, at(s) * p.channels + i)), sum);
        }
        store(part<A>(p.context, row * p.channels + i), sum / total);
    }
    if (lane_id() == 0) {
        store(part<A>(p.peak, row), peak);
        store(part<A>(p.total, row), total);
    }
}

// A warp a row of [B, R].
template <typename A>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kThreads, 2)
    semantic_pool_delta_kernel(const __grid_constant__ SemanticPoolParams p) {
    const int64_t row = static_cast<int64_t>(block_idx().x) * kWarps + warp_id();
    if (row >= p.batch * p.heads * p.queries) {
        return;
    }
    A sum = A(0);
    for (int64_t i = lane_id(); i < p.channels; i += 32) {
        const int64_t at = row * p.channels + i;
        sum = fma(load(part<A>(p.d_context, at)), load(part<A>(p.context, at)), sum);
    }
    sum = warp_sum(sum);
    if (lane_id() == 0) {
        store(part<A>(p.delta, row), sum);
    }
}

// A block a tile of rows of an image, past all queries: slopes of the scores, and of the rows.
template <typename A>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kThreads, 2)
    semantic_pool_rows_backward_kernel(const __grid_constant__ SemanticPoolParams p) {
    PVF_DYNAMIC_SHARED(A, memory);
    const PoolShared<A> shared(memory, p.channels);
    const int64_t c = p.channels;
    const int64_t count = rows_of_image(p);
    const int64_t tiles = (count + kTile - 1) / kTile;
    const int64_t image = static_cast<int64_t>(block_idx().x) / tiles;
    const int64_t first = static_cast<int64_t>(block_idx().x) % tiles * kTile;
    const int64_t rows = p.heads * p.queries;
    const int thread = static_cast<int>(thread_idx().x);
    load_hats(p, image, first, count, shared);
    clear_sums(shared);
    // sums[n] += weights[r][n] * queries r; four rows and four channels a thread.
    const auto add_queries = [&](const A* weights) {
        constexpr int kStep = 4;
        const int columns = static_cast<int>((c + kStep - 1) / kStep);
        for (int at = thread; at < columns * kTile / kStep; at += kThreads) {
            const int i = at % columns * kStep;
            const int row = at / columns * kStep;
            Vec<A, kStep> sums[kStep];
            PVF_UNROLL
            for (int n = 0; n < kStep; ++n) {
                sums[n] = load_shared_vec<kStep>(shared.sums + (row + n) * shared.stride + i);
            }
            for (int q = 0; q < kTile; ++q) {
                const auto query = load_shared_vec<kStep>(shared.queries + q * shared.stride + i);
                const auto weight = load_shared_vec<kStep>(weights + q * kTile + row);
                PVF_UNROLL
                for (int n = 0; n < kStep; ++n) {
                    PVF_UNROLL
                    for (int k = 0; k < kStep; ++k) {
                        sums[n][k] = fma(weight[n], query[k], sums[n][k]);
                    }
                }
            }
            PVF_UNROLL
            for (int n = 0; n < kStep; ++n) {
                store_shared_vec(shared.sums + (row + n) * shared.stride + i, sums[n]);
            }
        }
    };
    const A* const slopes = part<A>(static_cast<const void*>(p.d_context), image * rows * c);
    const A* const u = part<A>(static_cast<const void*>(p.u), image * rows * c);
    for (int64_t query = 0; query < rows; query += kTile) {
        sync_threads();
        load_wide_rows(u, query, rows, c, shared.queries, shared.stride);
        sync_threads();
        dot_tiles(shared, c, shared.scores);
        sync_threads();
        load_wide_rows(slopes, query, rows, c, shared.queries, shared.stride);
        sync_threads();
        dot_tiles(shared, c, shared.slopes);
        // From here each thread has its own score.
        const int64_t own = image * rows + query + thread / kTile;
        const int64_t row = first + thread % kTile;
        A probability = A(0);
        A slope = A(0);
        if (query + thread / kTile < rows && row < count) {
            probability =
                exponential(load_shared(shared.scores + thread) - load(part<A>(p.peak, own))) /
                load(part<A>(p.total, own));
            slope = semantic_pool::score_slope(probability, load_shared(shared.slopes + thread),
                                               load(part<A>(p.delta, own)));
            store(part<A>(p.d_scores, own * count + row), slope);
        }
        store_shared(shared.scores + thread, probability);
        store_shared(shared.slopes + thread, slope);
        sync_threads();
        add_queries(shared.scores);
        sync_threads();
        load_wide_rows(u, query, rows, c, shared.queries, shared.stride);
        sync_threads();
        add_queries(shared.slopes);
    }
    sync_threads();
    for (int local = static_cast<int>(warp_id()); local < kTile; local += kWarps) {
        if (first + local >= count) {
            continue;
        }
        const A* slope = shared.sums + local * shared.stride;
        const A* hat = shared.hats + local * shared.stride;
        A mean_slope = A(0);
        A mean_product = A(0);
        A rstd = A(1);
        if (p.norm) {
            for (int64_t i = lane_id(); i < c; i += 32) {
                mean_slope += load_shared(slope + i);
                mean_product = fma(load_shared(slope + i), load_shared(hat + i), mean_product);
            }
            mean_slope = warp_sum(mean_slope) / static_cast<A>(c);
            mean_product = warp_sum(mean_product) / static_cast<A>(c);
            rstd = load_shared(shared.rstd + local);
        }
        const TokenPlace place = place_in(p.d_before, p.d_tokens, first + local);
        with_float_summed_in<A>(place.rows->type, [&]<typename T>(Type<T>) {
            T* const to = static_cast<T*>(place.rows->data) + image * place.rows->batch +
                          place.at * place.rows->row;
            for (int64_t i = lane_id(); i < c; i += 32) {
                const A own = load_shared(slope + i);
                const A before = p.norm ? semantic_pool::norm_slope(own, load_shared(hat + i), rstd,
                                                                    mean_slope, mean_product)
                                        : own;
                store(to + i, from_float<T>(static_cast<Accumulate<T>>(before)));
            }
        });
    }
}

// The slopes of u, as the contexts in the forward: a weighted sum of hats.
template <typename A>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kThreads, 2)
    semantic_pool_queries_backward_kernel(const __grid_constant__ SemanticPoolParams p) {
    PVF_DYNAMIC_SHARED(A, memory);
    const PoolShared<A> shared(memory, p.channels);
    const PoolBlock place = place_of_block(p);
    const int64_t rows = p.heads * p.queries;
    const int thread = static_cast<int>(thread_idx().x);
    clear_sums(shared);
    for (int64_t first = place.first; first < place.last; first += kTile) {
        load_hats(p, place.image, first, place.last, shared);
        const int64_t query = place.query + thread / kTile;
        const int64_t row = first + thread % kTile;
        const int64_t at = (place.image * rows + query) * rows_of_image(p) + row;
        store_shared(shared.slopes + thread,
                     query < rows && row < place.last ? load(part<A>(p.d_scores, at)) : A(0));
        sync_threads();
        add_hats(shared, shared.slopes, p.channels, [](int) { return A(1); });
        sync_threads();
    }
    store_sums(p, place, shared, p.d_u, [](int) { return A(1); });
}

// A warp a row of [B, R].
template <typename A>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kThreads, 2)
    semantic_pool_combine_backward_kernel(const __grid_constant__ SemanticPoolParams p) {
    const int64_t rows = p.heads * p.queries;
    const int64_t row = static_cast<int64_t>(block_idx().x) * kWarps + warp_id();
    if (row >= p.batch * rows) {
        return;
    }
    for (int64_t i = lane_id(); i < p.channels; i += 32) {
        A sum = A(0);
        for (int64_t s = 0; s < p.splits; ++s) {
            const int64_t at = (row / rows * p.splits + s) * rows + row % rows;
            sum += load(part<A>(p.partial, at * p.channels + i));
        }
        store(part<A>(p.d_u, row * p.channels + i), sum);
    }
}

// A warp a query.
template <typename A>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kThreads, 2)
    semantic_pool_finish_kernel(const __grid_constant__ SemanticPoolParams p) {
    const int64_t c = p.channels;
    const int64_t row = static_cast<int64_t>(block_idx().x) * kWarps + warp_id();
    if (row >= p.batch * p.queries) {
        return;
    }
    const auto upstream = [&](int64_t i) { return load(part<A>(p.d_query_norm, row * c + i)); };
    if (!p.norm) {
        for (int64_t i = lane_id(); i < c; i += 32) {
            store(part<A>(p.d_query, row * c + i), upstream(i));
        }
        return;
    }
    const auto value = [&](int64_t i) { return load(part<A>(p.query, row * c + i)); };
    const WarpMoments<A> moments(c, p.eps, value);
    const auto hat = [&](int64_t i) { return (value(i) - moments.mean) * moments.rstd; };
    const auto slope = [&](int64_t i) { return upstream(i) * load_or(p.gamma, i, A(1)); };
    A mean_slope = A(0);
    A mean_product = A(0);
    for (int64_t i = lane_id(); i < c; i += 32) {
        mean_slope += slope(i);
        mean_product = fma(slope(i), hat(i), mean_product);
    }
    mean_slope = warp_sum(mean_slope) / static_cast<A>(c);
    mean_product = warp_sum(mean_product) / static_cast<A>(c);
    for (int64_t i = lane_id(); i < c; i += 32) {
        store(part<A>(p.d_query, row * c + i),
              semantic_pool::norm_slope(slope(i), hat(i), moments.rstd, mean_slope, mean_product));
        store(part<A>(p.query_norm, row * c + i), hat(i) * upstream(i));
    }
}

// A thread a channel.
template <typename A>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kThreads, 2)
    semantic_pool_unfold_kernel(const __grid_constant__ SemanticPoolParams p) {
    const int64_t c = p.channels;
    const int64_t i = static_cast<int64_t>(block_idx().x) * kThreads + thread_idx().x;
    if (i >= c) {
        return;
    }
    A d_gamma = A(0);
    A d_beta = A(0);
    for (int64_t row = 0; p.norm && row < p.batch * p.queries; ++row) {
        d_gamma += load(part<A>(p.query_norm, row * c + i));
        d_beta += load(part<A>(p.d_query_norm, row * c + i));
    }
    const A gamma = load_or(p.gamma, i, A(1));
    const A beta = load_or(p.beta, i, A(0));
    for (int64_t row = 0; row < c; ++row) {
        A* const d_k = part<A>(p.d_k_weight, row * c + i);
        A* const d_v = part<A>(p.d_v_weight, row * c + i);
        const A slope = load(d_k) * static_cast<A>(p.scale);
        store(d_k, slope * gamma);
        if (p.norm) {
            const A v = load(part<A>(p.v_weight, row * c + i));
            const A d_bias = load(part<A>(p.d_v_bias, row));
            d_gamma += load(part<A>(p.k_weight, row * c + i)) * slope + v * load(d_v);
            d_beta = fma(d_bias, v, d_beta);
            store(d_v, load(d_v) * gamma + d_bias * beta);
        }
    }
    if (p.norm) {
        store(part<A>(p.d_gamma, i), d_gamma);
        store(part<A>(p.d_beta, i), d_beta);
    }
}

using Kernel = void (*)(SemanticPoolParams);

const char* run(Kernel kernel, int64_t blocks, std::size_t shared, const SemanticPoolParams& p,
                void* stream) {
    if (blocks == 0) {
        return nullptr;
    }
    if (shared > 0) {
        const LaunchStatus status = allow_dynamic_shared(kernel, shared);
        if (status != kLaunchOk) {
            return launch_result(status);
        }
    }
    const Dim3 grid{static_cast<unsigned>(blocks), 1, 1};
    return launch_result(launch(kernel, grid, Dim3{kThreads, 1, 1}, shared, as_stream(stream), p));
}

int64_t in_parts(int64_t count, int64_t most) { return (count + most - 1) / most; }

template <typename A>
std::size_t shared_bytes(const SemanticPoolParams& p) {
    return static_cast<std::size_t>(pool_shared_values(p.channels)) * sizeof(A);
}

template <typename A>
const char* attend(const SemanticPoolParams& p, void* stream) {
    const int64_t rows = p.heads * p.queries;
    const char* problem =
        run(semantic_pool_attend_kernel<A>, p.batch * in_parts(rows, kTile) * p.splits,
            shared_bytes<A>(p), p, stream);
    if (problem == nullptr && p.splits > 1) {
        problem =
            run(semantic_pool_combine_kernel<A>, in_parts(p.batch * rows, kWarps), 0, p, stream);
    }
    return problem;
}

template <typename A>
const char* attend_backward(const SemanticPoolParams& p, void* stream) {
    const int64_t rows = p.heads * p.queries;
    const char* problem =
        run(semantic_pool_delta_kernel<A>, in_parts(p.batch * rows, kWarps), 0, p, stream);
    if (problem == nullptr) {
        problem = run(semantic_pool_rows_backward_kernel<A>,
                      p.batch * in_parts(rows_of_image(p), kTile), shared_bytes<A>(p), p, stream);
    }
    if (problem == nullptr) {
        problem = run(semantic_pool_queries_backward_kernel<A>,
                      p.batch * in_parts(rows, kTile) * p.splits, shared_bytes<A>(p), p, stream);
    }
    if (problem == nullptr && p.splits > 1) {
        problem = run(semantic_pool_combine_backward_kernel<A>, in_parts(p.batch * rows, kWarps), 0,
                      p, stream);
    }
    return problem;
}

}  // namespace

const char* semantic_pool_product_cuda(const StridedProduct& product, void* stream) {
    return launch_strided_product(product, stream);
}

const char* semantic_pool_fold_cuda(const SemanticPoolParams& p, bool wide, void* stream) {
    return run(wide ? semantic_pool_fold_kernel<double> : semantic_pool_fold_kernel<float>,
               p.channels, 0, p, stream);
}

const char* semantic_pool_prepare_cuda(const SemanticPoolParams& p, bool wide, void* stream) {
    return run(wide ? semantic_pool_prepare_kernel<double> : semantic_pool_prepare_kernel<float>,
               in_parts(p.batch * p.queries, kWarps), 0, p, stream);
}

const char* semantic_pool_attend_cuda(const SemanticPoolParams& p, bool wide, void* stream) {
    return wide ? attend<double>(p, stream) : attend<float>(p, stream);
}

const char* semantic_pool_attend_backward_cuda(const SemanticPoolParams& p, bool wide,
                                               void* stream) {
    return wide ? attend_backward<double>(p, stream) : attend_backward<float>(p, stream);
}

const char* semantic_pool_finish_cuda(const SemanticPoolParams& p, bool wide, void* stream) {
    return run(wide ? semantic_pool_finish_kernel<double> : semantic_pool_finish_kernel<float>,
               in_parts(p.batch * p.queries, kWarps), 0, p, stream);
}

const char* semantic_pool_unfold_cuda(const SemanticPoolParams& p, bool wide, void* stream) {
    return run(wide ? semantic_pool_unfold_kernel<double> : semantic_pool_unfold_kernel<float>,
               in_parts(p.channels, kThreads), 0, p, stream);
}

}  // namespace pyvitfast
