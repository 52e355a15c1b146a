#include "ops/linear_cross_attention/linear_cross_attention.h"
#include "ops/linear_cross_attention/linear_cross_attention_math.h"
#include "portable/device.h"
#include "portable/intrinsics.h"
#include "portable/launch_result.h"
#include "portable/multi_tensor.h"
#include "portable/reduce.h"
#include "portable/vec.h"

namespace pyvitfast {

using namespace device;

namespace {

constexpr int kThreads = kCrossAttentionThreads;
constexpr int kWarps = kThreads / 32;
constexpr int kHeadGroup = 8;  // heads that a loop or a matrix instruction takes together

PVF_HOST_DEVICE int padded_heads(int64_t heads) {
    return static_cast<int>((heads + kHeadGroup - 1) / kHeadGroup) * kHeadGroup;
}

// Calls f with the Type of an element that goes with sums of A.
template <typename A, typename F>
PVF_DEVICE void with_element_type(FloatType type, const F& f) {
    if constexpr (sizeof(A) == 8) {
        f(Type<double>{});
    } else {
        with_narrow_float(type, f);
    }
}

template <typename A>
PVF_DEVICE A load_element(const MatrixView& view, int64_t at) {
    A value = A(0);
    with_element_type<A>(view.type, [&]<typename T>(Type<T>) {
        value = static_cast<A>(to_float(load(static_cast<const T*>(view.data) + at)));
    });
    return value;
}

template <typename A>
PVF_DEVICE void store_element(const MatrixView& view, int64_t at, A value) {
    with_element_type<A>(view.type, [&]<typename T>(Type<T>) {
        T* to = static_cast<T*>(const_cast<void*>(view.data)) + at;
        store(to, from_float<T>(static_cast<Accumulate<T>>(value)));
    });
}

template <typename A>
PVF_DEVICE A load_or(const MatrixView& view, int64_t at, A otherwise) {
    return view.data == nullptr ? otherwise : load_element<A>(view, at);
}

template <typename A>
PVF_DEVICE A* part(void* array, int64_t at) {
    return array == nullptr ? nullptr : static_cast<A*>(array) + at;
}

// exp(x) of a difference to a peak; NaN stays NaN.
template <typename A>
PVF_DEVICE A exponential(A x) {
    return exp2(x * A(1.4426950408889634));
}

// --- Products ---------------------------------------------------------------------------------

constexpr int kProductDepth = 32;  // of the chunks that go through shared memory
constexpr int kThreadRows = 2;
constexpr int kThreadCols = 4;
constexpr int kThreadsAcross = kProductTileCols / kThreadCols;
static_assert(kProductTileRows / kThreadRows * kThreadsAcross == kThreads);

// One chunk of a factor into shared memory as [depth][span + 1]; neighbouring threads take what are
// neighbours in memory, which of the two directions that may be.
template <typename A, int kSpan>
PVF_DEVICE void stage(const MatrixView& view, int64_t entry, int64_t span_stride,
                      int64_t depth_stride, int64_t span0, int64_t spans, int64_t depth0,
                      int64_t depths, A* shared) {
    for (int i = static_cast<int>(thread_idx().x); i < kSpan * kProductDepth; i += kThreads) {
        const bool along_span = span_stride == 1;
        const int span = along_span ? i % kSpan : i / kProductDepth;
        const int depth = along_span ? i / kSpan : i % kProductDepth;
        A value = A(0);
        if (span0 + span < spans && depth0 + depth < depths) {
            value = view.data == nullptr
                        ? A(1)
                        : load_element<A>(view, entry * view.batch + (span0 + span) * span_stride +
                                                    (depth0 + depth) * depth_stride);
        }
        store_shared(&shared[depth * (kSpan + 1) + span], value);
    }
}

template <typename A>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kThreads, 2)
    cross_attention_products_kernel(const __grid_constant__ ProductTable table) {
    PVF_SHARED(A, left, kProductDepth * (kProductTileRows + 1));
    PVF_SHARED(A, right, kProductDepth * (kProductTileCols + 1));
    const int64_t block = block_idx().x;
    const Product& p = entry_of_tile(table.products, table.count, block);
    const int64_t local = block - p.tile_begin;
    const int64_t col_tiles = product_col_tiles(p);
    const int64_t row_tiles = product_row_tiles(p);
    const int64_t col0 = local % col_tiles * kProductTileCols;
    const int64_t row0 = local / col_tiles % row_tiles * kProductTileRows;
    const int64_t entry = local / col_tiles / row_tiles;
    const int row = static_cast<int>(thread_idx().x) / kThreadsAcross * kThreadRows;
    const int col = static_cast<int>(thread_idx().x) % kThreadsAcross;
    A sums[kThreadRows][kThreadCols] = {};
    for (int64_t k = 0; k < p.k; k += kProductDepth) {
        stage<A, kProductTileRows>(p.left, entry, p.left.row, p.left.col, row0, p.m, k, p.k,
                                   &left[0]);
        stage<A, kProductTileCols>(p.right, entry, p.right.col, p.right.row, col0, p.n, k, p.k,
                                   &right[0]);
        sync_threads();
        for (int depth = 0; depth < kProductDepth; ++depth) {
            A a[kThreadRows];
            PVF_UNROLL
            for (int i = 0; i < kThreadRows; ++i) {
                a[i] = load_shared(&left[depth * (kProductTileRows + 1) + row + i]);
            }
            PVF_UNROLL
            for (int j = 0; j < kThreadCols; ++j) {
                // Columns of a thread are far apart, so that a warp reads neighbours.
                const A b =
                    load_shared(&right[depth * (kProductTileCols + 1) + col + j * kThreadsAcross]);
                PVF_UNROLL
                for (int i = 0; i < kThreadRows; ++i) {
                    sums[i][j] = fma(a[i], b, sums[i][j]);
                }
            }
        }
        sync_threads();
    }
    PVF_UNROLL
    for (int j = 0; j < kThreadCols; ++j) {
        const int64_t n = col0 + col + j * kThreadsAcross;
        if (n >= p.n) {
            continue;
        }
        const A bias = load_or<A>(p.bias, entry * p.bias.batch + n * p.bias.col, A(0));
        PVF_UNROLL
        for (int i = 0; i < kThreadRows; ++i) {
            const int64_t m = row0 + row + i;
            if (m < p.m) {
                store_element<A>(p.out, entry * p.out.batch + m * p.out.row + n * p.out.col,
                                 sums[i][j] * static_cast<A>(p.alpha) + bias);
            }
        }
    }
}

// --- The query --------------------------------------------------------------------------------

template <typename A>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kThreads, 2)
    cross_attention_normalize_query_kernel(const __grid_constant__ CrossAttentionParams p) {
    const int64_t b = block_idx().x;
    const int64_t c = p.channels;
    A* hat = part<A>(p.query_hat, b * c);
    const auto value = [&](int64_t i) { return load_element<A>(p.query, b * p.query.row + i); };
    if (!p.norm) {
        for (int64_t i = thread_idx().x; i < c; i += kThreads) {
            store(hat + i, value(i));
        }
        return;
    }
    A total = A(0);
    for (int64_t i = thread_idx().x; i < c; i += kThreads) {
        total += value(i);
    }
    const A mean = block_sum(total) / static_cast<A>(c);
    A squares = A(0);
    for (int64_t i = thread_idx().x; i < c; i += kThreads) {
        const A off = value(i) - mean;
        squares = fma(off, off, squares);
    }
    const A variance = block_sum(squares) / static_cast<A>(c);
    const A rstd = rsqrt(variance + static_cast<A>(p.eps));
    for (int64_t i = thread_idx().x; i < c; i += kThreads) {
        const A normal = (value(i) - mean) * rstd;
        store(hat + i, normal);
        store(part<A>(p.query_norm, b * c + i),
              normal * load_or<A>(p.gamma, i, A(1)) + load_or<A>(p.beta, i, A(0)));
    }
    if (p.rstd != nullptr && thread_idx().x == 0) {
        store(part<A>(p.rstd, b * (1 + p.tokens)), rstd);
    }
}

template <typename A>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kThreads, 2)
    cross_attention_finish_query_kernel(const __grid_constant__ CrossAttentionParams p) {
    const int64_t b = block_idx().x;
    const int64_t c = p.channels;
    const A* hat = part<A>(p.query_hat, b * c);
    const A* as_query = part<A>(p.d_query_norm, b * c);
    const A* as_row = part<A>(p.d_query_hat, b * c);
    const auto slope = [&](int64_t i) {
        return load(as_row + i) + load(as_query + i) * load_or<A>(p.gamma, i, A(1));
    };
    A mean_slope = A(0);
    A mean_product = A(0);
    A rstd = A(1);
    if (p.norm) {
        for (int64_t i = thread_idx().x; i < c; i += kThreads) {
            mean_slope += slope(i);
            mean_product = fma(slope(i), load(hat + i), mean_product);
        }
        mean_slope = block_sum(mean_slope) / static_cast<A>(c);
        mean_product = block_sum(mean_product) / static_cast<A>(c);
        rstd = load(part<A>(p.rstd, b * (1 + p.tokens)));
    }
    for (int64_t i = thread_idx().x; i < c; i += kThreads) {
        const A own = slope(i);
        store_element<A>(
            p.d_query, b * p.d_query.row + i,
            p.norm ? cross_attention::norm_slope(own, load(hat + i), rstd, mean_slope, mean_product)
                   : own);
        if (p.norm) {
            A* d_gamma = part<A>(p.d_gamma_rows, b * c + i);
            A* d_beta = part<A>(p.d_beta_rows, b * c + i);
            store(d_gamma, load(d_gamma) + load(as_query + i) * load(hat + i));
            store(d_beta, load(d_beta) + load(as_query + i));
        }
    }
}

// --- Rows of a split --------------------------------------------------------------------------

// The query, in an image's first split, and tokens after it.
struct SplitRows {
    int64_t image;
    int64_t split;
    int64_t first_token;
    int64_t queries;
    int64_t count;  // the query included
};

PVF_DEVICE SplitRows rows_of_block(const CrossAttentionParams& p) {
    SplitRows rows;
    rows.image = static_cast<int64_t>(block_idx().x) / p.splits;
    rows.split = static_cast<int64_t>(block_idx().x) % p.splits;
    rows.first_token = rows.split * p.tokens_per_split;
    rows.queries = rows.split == 0 ? 1 : 0;
    const int64_t left = p.tokens - rows.first_token;
    rows.count = rows.queries + (left < p.tokens_per_split ? left : p.tokens_per_split);
    return rows;
}

template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// Values i, i + 1, .. of a row to f(i, value), shared out over a warp; whole vectors where the row
// is aligned.
template <typename T, typename F>
PVF_DEVICE void each_of_row(const T* row, int64_t count, const F& f) {
    constexpr int kStep = kVector<T>;
    const bool aligned = reinterpret_cast<uintptr_t>(row) % 16 == 0 && count % kStep == 0;
    if (aligned) {
        for (int64_t i = lane_id() * kStep; i < count; i += 32 * kStep) {
            const auto values = load_vec_streaming<kStep>(row + i);
            PVF_UNROLL
            for (int k = 0; k < kStep; ++k) {
                f(i + k, to_float(values[k]));
            }
        }
    } else {
        for (int64_t i = lane_id(); i < count; i += 32) {
            f(i, to_float(load(row + i)));
        }
    }
}

// A tile of rows into shared memory as hats of type S; a warp takes whole rows, so no thread waits
// for another warp. Rows that do not exist become zeros. kKnown: mean and deviation are there.
template <typename A, typename T, typename S, int kTileRows, bool kKnown>
PVF_DEVICE void load_rows(const CrossAttentionParams& p, const SplitRows& rows, int64_t first,
                          S* tile, int64_t stride) {
    const int64_t c = p.channels;
    for (int local = static_cast<int>(warp_id()); local < kTileRows; local += kWarps) {
        S* to = tile + local * stride;
        const int64_t row = first + local;
        const auto put = [&](int64_t i, A value) {
            store_shared(to + i, from_float<S>(static_cast<Accumulate<S>>(value)));
        };
        if (row >= rows.count) {
            for (int64_t i = lane_id(); i < c; i += 32) {
                put(i, A(0));
            }
            continue;
        }
        if (row < rows.queries) {
            for (int64_t i = lane_id(); i < c; i += 32) {
                put(i, load(part<A>(p.query_hat, rows.image * c + i)));
            }
            continue;
        }
        const int64_t token = rows.first_token + row - rows.queries;
        const T* from =
            static_cast<const T*>(p.token.data) + rows.image * p.token.batch + token * p.token.row;
        if (!p.norm) {
            each_of_row(from, c, [&](int64_t i, A value) { put(i, value); });
            continue;
        }
        A mean = A(0);
        A rstd = A(0);
        A* kept_mean = part<A>(p.mean, rows.image * p.tokens + token);
        A* kept_rstd = part<A>(p.rstd, rows.image * (1 + p.tokens) + 1 + token);
        if constexpr (kKnown) {
            mean = load(kept_mean);
            rstd = load(kept_rstd);
            each_of_row(from, c, [&](int64_t i, A value) { put(i, (value - mean) * rstd); });
        } else {
            // The row as it is goes through shared memory, where the next two passes find it.
            A total = A(0);
            each_of_row(from, c, [&](int64_t i, A value) {
                put(i, value);
                total += value;
            });
            mean = warp_sum(total) / static_cast<A>(c);
            sync_warp();
            A squares = A(0);
            for (int64_t i = lane_id(); i < c; i += 32) {
                const A off = static_cast<A>(to_float(load_shared(to + i))) - mean;
                squares = fma(off, off, squares);
            }
            rstd = rsqrt(warp_sum(squares) / static_cast<A>(c) + static_cast<A>(p.eps));
            for (int64_t i = lane_id(); i < c; i += 32) {
                put(i, (static_cast<A>(to_float(load_shared(to + i))) - mean) * rstd);
            }
            if (kept_mean != nullptr && lane_id() == 0) {
                store(kept_mean, mean);
                store(kept_rstd, rstd);
            }
        }
    }
}

// Running peaks and sums of a block's heads, in shared memory.
template <typename A>
struct Running {
    A* peak;
    A* total;
    A* factor;  // by which this tile shrinks what was summed before
};

template <typename A>
PVF_DEVICE void start_running(const Running<A>& running, int heads) {
    for (int j = static_cast<int>(thread_idx().x); j < heads; j += kThreads) {
        store_shared(running.peak + j, -A(INFINITY));
        store_shared(running.total + j, A(0));
    }
}

// One warp a head, one lane a row: score(row) of the tile's rows that exist becomes exp(score -
// peak), handed to put(head, row, value) for every row of the tile.
template <typename A, int kTileRows, typename Score, typename Put>
PVF_DEVICE void softmax_tile(const CrossAttentionParams& p, const SplitRows& rows, int64_t first,
                             int heads, const Running<A>& running, const Score& score,
                             const Put& put) {
    static_assert(kTileRows <= 32);
    for (int j = static_cast<int>(warp_id()); j < heads; j += kWarps) {
        const int row = static_cast<int>(lane_id());
        const bool there = row < kTileRows && first + row < rows.count && j < p.heads;
        const A own = there ? score(row, j) : -A(INFINITY);
        if (there && p.scores != nullptr) {
            const int64_t token = 1 + rows.first_token + first + row - rows.queries;
            store(part<A>(p.scores, (rows.image * p.heads + j) * (1 + p.tokens) + token), own);
        }
        const A before = load_shared(running.peak + j);
        const A highest = warp_max(own);
        const A peak = highest > before || highest != highest ? highest : before;
        // A head that only pads, or a first tile: nothing was summed before.
        const A factor = before == -A(INFINITY) ? A(0) : exponential(before - peak);
        const A value = there ? exponential(own - peak) : A(0);
        const A sum = warp_sum(value);
        if (row < kTileRows) {
            put(j, row, value);
        }
        sync_warp();  // all lanes have read the old peak
        if (row == 0) {
            store_shared(running.peak + j, peak);
            store_shared(running.total + j, load_shared(running.total + j) * factor + sum);
            store_shared(running.factor + j, factor);
        }
    }
}

// The sums of a split to where they belong: final ones when the image has one split.
template <typename A>
PVF_DEVICE void store_context(const CrossAttentionParams& p, const SplitRows& rows, int64_t j,
                              int64_t i, A sum, A total) {
    const int64_t c = p.channels;
    if (p.splits > 1) {
        const int64_t at = ((rows.image * p.splits + rows.split) * p.heads + j) * c;
        store(part<A>(p.partial, at + i), sum);
        return;
    }
    const int64_t at = (rows.image * p.heads + j) * c + i;
    const A hat = sum / total;
    store(part<A>(p.context_hat, at), hat);
    if (p.norm) {
        store(part<A>(p.context, at),
              hat * load_or<A>(p.gamma, i, A(1)) + load_or<A>(p.beta, i, A(0)));
    }
}

template <typename A>
PVF_DEVICE void store_running(const CrossAttentionParams& p, const SplitRows& rows,
                              const Running<A>& running) {
    const int j = static_cast<int>(thread_idx().x);
    for (int64_t head = j; head < p.heads; head += kThreads) {
        const A peak = load_shared(running.peak + head);
        const A total = load_shared(running.total + head);
        if (p.splits > 1) {
            const int64_t at = (rows.image * p.splits + rows.split) * p.heads + head;
            store(part<A>(p.partial_peak, at), peak);
            store(part<A>(p.partial_total, at), total);
        } else {
            store(part<A>(p.peak, rows.image * p.heads + head), peak);
            store(part<A>(p.total, rows.image * p.heads + head), total);
        }
    }
}

// gamma times each of an image's vectors [heads, C] into shared memory; gamma is read once.
template <typename A>
PVF_DEVICE void stage_vectors(const CrossAttentionParams& p, const A* vectors, int heads,
                              A* shared) {
    for (int64_t i = thread_idx().x; i < p.channels; i += kThreads) {
        const A gamma = load_or<A>(p.gamma, i, A(1));
        for (int j = 0; j < heads; ++j) {
            store_shared(shared + j * p.channels + i, load(vectors + j * p.channels + i) * gamma);
        }
    }
}

// --- Attention without matrix units -----------------------------------------------------------

constexpr int kTile = kCrossAttentionTile;

// out[j * kTile + row] = vectors[j] . tile[row] for all heads; a warp takes two rows.
template <typename A>
PVF_DEVICE void dot_tile(const A* vectors, const A* tile, int64_t channels, int heads, A* out) {
    constexpr int kRows = kTile / kWarps;
    const int row0 = static_cast<int>(warp_id()) * kRows;
    for (int group = 0; group < heads; group += kHeadGroup) {
        A sums[kRows][kHeadGroup] = {};
        for (int64_t i = lane_id(); i < channels; i += 32) {
            A values[kRows];
            PVF_UNROLL
            for (int r = 0; r < kRows; ++r) {
                values[r] = load_shared(tile + (row0 + r) * channels + i);
            }
            PVF_UNROLL
            for (int j = 0; j < kHeadGroup; ++j) {
                if (group + j < heads) {
                    const A other = load_shared(vectors + (group + j) * channels + i);
                    PVF_UNROLL
                    for (int r = 0; r < kRows; ++r) {
                        sums[r][j] = fma(values[r], other, sums[r][j]);
                    }
                }
            }
        }
        PVF_UNROLL
        for (int j = 0; j < kHeadGroup; ++j) {
            PVF_UNROLL
            for (int r = 0; r < kRows; ++r) {
                const A total = warp_sum(sums[r][j]);
                if (lane_id() == 0 && group + j < heads) {
                    store_shared(out + (group + j) * kTile + row0 + r, total);
                }
            }
        }
    }
}

// sums[j] = factor[j] * sums[j] + sum over rows of weights[j * kTile + row] * tile[row].
template <typename A>
PVF_DEVICE void sum_tile(const A* weights, const A* tile, const A* factor, int64_t channels,
                         int heads, A* sums) {
    for (int64_t i = thread_idx().x; i < channels; i += kThreads) {
        for (int group = 0; group < heads; group += kHeadGroup) {
            A own[kHeadGroup];
            PVF_UNROLL
            for (int j = 0; j < kHeadGroup; ++j) {
                const bool there = group + j < heads;
                const A shrink =
                    there && factor != nullptr ? load_shared(factor + group + j) : A(1);
                own[j] = there ? load_shared(sums + (group + j) * channels + i) * shrink : A(0);
            }
            for (int row = 0; row < kTile; ++row) {
                const A value = load_shared(tile + row * channels + i);
                PVF_UNROLL
                for (int j = 0; j < kHeadGroup; ++j) {
                    if (group + j < heads) {
                        own[j] =
                            fma(load_shared(weights + (group + j) * kTile + row), value, own[j]);
                    }
                }
            }
            PVF_UNROLL
            for (int j = 0; j < kHeadGroup; ++j) {
                if (group + j < heads) {
                    store_shared(sums + (group + j) * channels + i, own[j]);
                }
            }
        }
    }
}

template <typename A, typename T>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kThreads, 1)
    cross_attention_attend_kernel(const __grid_constant__ CrossAttentionParams p) {
    PVF_DYNAMIC_SHARED(A, shared);
    const int64_t c = p.channels;
    const int h = static_cast<int>(p.heads);
    const SplitRows rows = rows_of_block(p);
    A* const tile = shared;
    A* const gamma_u = tile + kTile * c;
    A* const sums = gamma_u + h * c;
    A* const weights = sums + h * c;
    const Running<A> running{weights + h * kTile, weights + h * kTile + h,
                             weights + h * kTile + 2 * h};
    stage_vectors(p, part<A>(p.u, rows.image * h * c), h, gamma_u);
    for (int64_t at = thread_idx().x; at < h * c; at += kThreads) {
        store_shared(sums + at, A(0));
    }
    start_running(running, h);
    for (int64_t first = 0; first < rows.count; first += kTile) {
        load_rows<A, T, A, kTile, false>(p, rows, first, tile, c);
        sync_threads();
        dot_tile(gamma_u, tile, c, h, weights);
        sync_threads();
        softmax_tile<A, kTile>(
            p, rows, first, h, running,
            [&](int row, int j) { return load_shared(weights + j * kTile + row); },
            [&](int j, int row, A value) { store_shared(weights + j * kTile + row, value); });
        sync_threads();
        sum_tile(weights, tile, running.factor, c, h, sums);
        sync_threads();
    }
    for (int64_t at = thread_idx().x; at < h * c; at += kThreads) {
        store_context(p, rows, at / c, at % c, load_shared(sums + at),
                      load_shared(running.total + at / c));
    }
    store_running(p, rows, running);
}

// --- Attention on matrix units ----------------------------------------------------------------

constexpr int kMmaTile = 32;  // rows
constexpr int kMmaRowTiles = kMmaTile / 16;
constexpr int kMmaParts = kWarps / kMmaRowTiles;  // warps that share the channels of a row tile
constexpr int kMmaPad = 8;  // elements, so that eight rows lie in different banks

struct MmaLayout {
    int64_t stride;  // of rows, of tile and of u
    int64_t heads;   // padded
    int64_t sums;    // byte offsets from here on
    int64_t scores;
    int64_t running;
    int64_t scales;
    int64_t tile;
    int64_t u;
    int64_t weights;
    int64_t bytes;
};

PVF_HOST_DEVICE MmaLayout mma_layout(int64_t channels, int64_t heads) {
    MmaLayout layout;
    layout.stride = channels + kMmaPad;
    layout.heads = padded_heads(heads);
    layout.sums = 0;
    layout.scores = layout.sums + channels * layout.heads * 4;
    layout.running = layout.scores + kMmaParts * kMmaTile * layout.heads * 4;
    layout.scales = layout.running + 3 * layout.heads * 4;
    layout.tile = layout.scales + layout.heads * 4;
    layout.u = layout.tile + kMmaTile * layout.stride * 2;
    layout.weights = layout.u + 2 * layout.heads * layout.stride * 2;
    layout.bytes = layout.weights + 2 * layout.heads * (kMmaTile + kMmaPad) * 2;
    return layout;
}

// A value as the sum of two 16-bit ones: together they hold twice the bits.
template <typename T>
PVF_DEVICE void store_halves(T* high, T* low, float value) {
    const T upper = from_float<T>(value);
    store_shared(high, upper);
    store_shared(low, from_float<T>(value - to_float(upper)));
}

// The greatest power of two not above the greatest |u| of a head, inverted: float16 has few small
// numbers, so u is brought near one before it is split.
PVF_DEVICE float inverse_scale(float greatest) {
    const bool usable = greatest > 1e-30f && greatest < 1e30f;
    return usable ? bits_float((254u << 23) - (float_bits(greatest) & 0x7f800000u)) : 1.0f;
}

template <typename T>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kThreads, 1)
    cross_attention_attend_mma_kernel(const __grid_constant__ CrossAttentionParams p) {
    PVF_DYNAMIC_SHARED(unsigned char, shared);
    const int c = static_cast<int>(p.channels);
    const MmaLayout layout = mma_layout(c, p.heads);
    const int stride = static_cast<int>(layout.stride);
    const int heads = static_cast<int>(layout.heads);
    const int lane = static_cast<int>(lane_id());
    const int warp = static_cast<int>(warp_id());
    const SplitRows rows = rows_of_block(p);
    float* const sums = reinterpret_cast<float*>(shared + layout.sums);
    float* const scores = reinterpret_cast<float*>(shared + layout.scores);
    float* const states = reinterpret_cast<float*>(shared + layout.running);
    float* const scales = reinterpret_cast<float*>(shared + layout.scales);
    T* const tile = reinterpret_cast<T*>(shared + layout.tile);
    T* const u_high = reinterpret_cast<T*>(shared + layout.u);
    T* const u_low = u_high + heads * stride;
    T* const weights_high = reinterpret_cast<T*>(shared + layout.weights);
    constexpr int kWeightsStride = kMmaTile + kMmaPad;
    T* const weights_low = weights_high + heads * kWeightsStride;
    const Running<float> running{states, states + heads, states + 2 * heads};

    // u passes through the room of the sums, which are not needed yet.
    stage_vectors(p, part<float>(p.u, rows.image * p.heads * c), static_cast<int>(p.heads), sums);
    sync_threads();
    for (int j = warp; j < heads; j += kWarps) {
        const float* gamma_u = sums + j * c;
        const int count = j < p.heads ? c : 0;
        float greatest = 0.0f;
        for (int i = lane; i < count; i += 32) {
            const float value = load_shared(gamma_u + i);
            const float size = value < 0.0f ? -value : value;
            greatest = size > greatest ? size : greatest;
        }
        const float scale = inverse_scale(warp_max(greatest));
        for (int i = lane; i < c; i += 32) {
            const float value = i < count ? load_shared(gamma_u + i) * scale : 0.0f;
            store_halves(u_high + j * stride + i, u_low + j * stride + i, value);
        }
        if (lane == 0) {
            store_shared(scales + j, 1.0f / scale);
        }
    }
    sync_threads();
    for (int at = static_cast<int>(thread_idx().x); at < c * heads; at += kThreads) {
        store_shared(sums + at, 0.0f);
    }
    start_running(running, heads);

    for (int64_t first = 0; first < rows.count; first += kMmaTile) {
        load_rows<float, T, T, kMmaTile, false>(p, rows, first, tile, stride);
        sync_threads();
        // Scores: rows on the 16 side, heads on the 8 side, channels shared out over the warps of a
        // row tile; their parts are added in order below.
        {
            const int row0 = warp % kMmaRowTiles * 16;
            const int share = warp / kMmaRowTiles;
            for (int group = 0; group < heads; group += kHeadGroup) {
                float d[4] = {};
                for (int k = share * 16; k < c; k += kMmaParts * 16) {
                    std::uint32_t a[4];
                    ldmatrix_x4(a, tile + (row0 + lane % 16) * stride + k + lane / 16 * 8);
                    std::uint32_t b[4];
                    const T* half = lane < 16 ? u_high : u_low;
                    ldmatrix_x4(b, half + (group + lane % 8) * stride + k + lane / 8 % 2 * 8);
                    const std::uint32_t high[2] = {b[0], b[1]};
                    const std::uint32_t low[2] = {b[2], b[3]};
                    mma_m16n8k16<T>(d, a, high);
                    mma_m16n8k16<T>(d, a, low);
                }
                PVF_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const int row = row0 + lane / 4 + i / 2 * 8;
                    const int head = group + lane % 4 * 2 + i % 2;
                    store_shared(scores + (share * heads + head) * kMmaTile + row, d[i]);
                }
            }
        }
        sync_threads();
        softmax_tile<float, kMmaTile>(
            p, rows, first, heads, running,
            [&](int row, int j) {
                float total = 0.0f;
                PVF_UNROLL
                for (int share = 0; share < kMmaParts; ++share) {
                    total += load_shared(scores + (share * heads + j) * kMmaTile + row);
                }
                return total * load_shared(scales + j);
            },
            [&](int j, int row, float value) {
                const int at = j * kWeightsStride + row;
                store_halves(weights_high + at, weights_low + at, value);
            });
        sync_threads();
        // Context: channels on the 16 side, heads on the 8 side, rows summed; a warp's sums stay
        // with it, four a lane.
        for (int block = warp; block < c / 16; block += kWarps) {
            for (int group = 0; group < heads; group += kHeadGroup) {
                float* own =
                    sums + ((block * (heads / kHeadGroup) + group / kHeadGroup) * 32 + lane) * 4;
                auto kept = load_shared_vec<4>(own);
                float d[4];
                PVF_UNROLL
                for (int i = 0; i < 4; ++i) {
                    d[i] = kept[i] * load_shared(running.factor + group + lane % 4 * 2 + i % 2);
                }
                PVF_UNROLL
                for (int k = 0; k < kMmaTile; k += 16) {
                    std::uint32_t a[4];
                    const int row = k + lane / 16 * 8 + lane % 8;
                    ldmatrix_x4_trans(a, tile + row * stride + block * 16 + lane / 8 % 2 * 8);
                    std::uint32_t b[4];
                    const T* half = lane < 16 ? weights_high : weights_low;
                    ldmatrix_x4(b,
                                half + (group + lane % 8) * kWeightsStride + k + lane / 8 % 2 * 8);
                    const std::uint32_t high[2] = {b[0], b[1]};
                    const std::uint32_t low[2] = {b[2], b[3]};
                    mma_m16n8k16<T>(d, a, high);
                    mma_m16n8k16<T>(d, a, low);
                }
                PVF_UNROLL
                for (int i = 0; i < 4; ++i) {
                    kept[i] = d[i];
                }
                store_shared_vec(own, kept);
            }
        }
        sync_threads();
    }
    for (int block = warp; block < c / 16; block += kWarps) {
        for (int group = 0; group < heads; group += kHeadGroup) {
            const auto kept = load_shared_vec<4>(
                sums + ((block * (heads / kHeadGroup) + group / kHeadGroup) * 32 + lane) * 4);
            PVF_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int channel = block * 16 + lane / 4 + i / 2 * 8;
                const int head = group + lane % 4 * 2 + i % 2;
                if (head < p.heads) {
                    store_context(p, rows, head, channel, kept[i],
                                  load_shared(running.total + head));
                }
            }
        }
    }
    store_running(p, rows, running);
}

// --- Backward ---------------------------------------------------------------------------------

template <typename A, typename T>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kThreads, 1)
    cross_attention_attend_backward_kernel(const __grid_constant__ CrossAttentionParams p) {
    PVF_DYNAMIC_SHARED(A, shared);
    const int64_t c = p.channels;
    const int h = static_cast<int>(p.heads);
    const SplitRows rows = rows_of_block(p);
    A* const tile = shared;
    A* const vectors = tile + kTile * c;  // slopes of the contexts, then u; both times gamma
    A* const sums = vectors + 2 * h * c;
    A* const weights = sums + h * c;           // attention, then slopes of the scores, [2 H, rows]
    A* const means = weights + 2 * h * kTile;  // of the vectors' rows
    A* const deltas = means + 2 * h;
    A* const row_means = deltas + h;  // of each row's slope, then of slope * hat
    stage_vectors(p, part<A>(p.d_context, rows.image * h * c), h, vectors);
    stage_vectors(p, part<A>(p.u, rows.image * h * c), h, vectors + h * c);
    for (int64_t at = thread_idx().x; at < h * c; at += kThreads) {
        store_shared(sums + at, A(0));
    }
    sync_threads();
    for (int j = static_cast<int>(warp_id()); j < 2 * h; j += kWarps) {
        A total = A(0);
        A product = A(0);
        for (int64_t i = lane_id(); i < c; i += 32) {
            const A value = load_shared(vectors + j * c + i);
            total += value;
            if (j < h) {
                product =
                    fma(value, load(part<A>(p.context_hat, (rows.image * h + j) * c + i)), product);
            }
        }
        total = warp_sum(total);
        product = warp_sum(product);
        if (lane_id() == 0) {
            store_shared(means + j, total / static_cast<A>(c));
            if (j < h) {
                store_shared(deltas + j, product);
            }
        }
    }
    for (int64_t first = 0; first < rows.count; first += kTile) {
        load_rows<A, T, A, kTile, true>(p, rows, first, tile, c);
        sync_threads();
        A* const slopes = weights + h * kTile;
        dot_tile(vectors, tile, c, h, slopes);
        sync_threads();
        // One thread a row: its attention, the slopes of its scores, and from them the means that
        // LayerNorm's gradient needs, without another pass over the channels.
        const int row = static_cast<int>(thread_idx().x);
        if (row < kTile) {
            const bool there = first + row < rows.count;
            A mean = A(0);
            A product = A(0);
            for (int j = 0; j < h; ++j) {
                A attention = A(0);
                A slope = A(0);
                if (there) {
                    const int64_t head = rows.image * h + j;
                    const int64_t token = 1 + rows.first_token + first + row - rows.queries;
                    const A score = load(part<A>(p.scores, head * (1 + p.tokens) + token));
                    attention = exponential(score - load(part<A>(p.peak, head))) /
                                load(part<A>(p.total, head));
                    const A dot = load_shared(slopes + j * kTile + row);
                    slope = attention * (dot - load_shared(deltas + j));
                    mean += attention * load_shared(means + j) + slope * load_shared(means + h + j);
                    product += attention * dot + slope * score;
                }
                store_shared(weights + j * kTile + row, attention);
                store_shared(slopes + j * kTile + row, slope);
            }
            store_shared(row_means + row, mean);
            store_shared(row_means + kTile + row, product / static_cast<A>(c));
        }
        sync_threads();
        for (int64_t i = thread_idx().x; i < c; i += kThreads) {
            A own[kTile] = {};
            for (int j = 0; j < 2 * h; ++j) {
                const A value = load_shared(vectors + j * c + i);
                PVF_UNROLL
                for (int r = 0; r < kTile; ++r) {
                    own[r] = fma(load_shared(weights + j * kTile + r), value, own[r]);
                }
            }
            PVF_UNROLL
            for (int r = 0; r < kTile; ++r) {
                const int64_t at = first + r;
                if (at < rows.queries) {
                    store(part<A>(p.d_query_hat, rows.image * c + i), own[r]);
                } else if (at < rows.count) {
                    const int64_t token = rows.first_token + at - rows.queries;
                    A slope = own[r];
                    if (p.norm) {
                        slope = cross_attention::norm_slope(
                            slope, load_shared(tile + r * c + i),
                            load(part<A>(p.rstd, rows.image * (1 + p.tokens) + 1 + token)),
                            load_shared(row_means + r), load_shared(row_means + kTile + r));
                    }
                    T* to = static_cast<T*>(const_cast<void*>(p.d_token.data)) +
                            rows.image * p.d_token.batch + token * p.d_token.row + i;
                    store(to, from_float<T>(static_cast<Accumulate<T>>(slope)));
                }
            }
        }
        sum_tile(slopes, tile, static_cast<const A*>(nullptr), c, h, sums);
        sync_threads();
    }
    for (int64_t at = thread_idx().x; at < h * c; at += kThreads) {
        store(part<A>(p.partial, (rows.image * p.splits + rows.split) * h * c + at),
              load_shared(sums + at));
    }
}

PVF_HOST_DEVICE int64_t backward_shared(int64_t channels, int64_t heads) {
    return (kTile + 3 * heads) * channels + heads * (2 * kTile + 3) + 2 * kTile;
}

// --- The splits of an image -------------------------------------------------------------------

template <typename A>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kThreads, 2)
    cross_attention_combine_kernel(const __grid_constant__ CrossAttentionParams p) {
    const int64_t b = block_idx().x;
    const int64_t c = p.channels;
    for (int64_t at = thread_idx().x; at < p.heads * c; at += kThreads) {
        const int64_t j = at / c;
        const int64_t i = at % c;
        const auto entry = [&](int64_t split) { return (b * p.splits + split) * p.heads + j; };
        A peak = load(part<A>(p.partial_peak, entry(0)));
        for (int64_t s = 1; s < p.splits; ++s) {
            peak = Max{}(peak, load(part<A>(p.partial_peak, entry(s))));
        }
        A sum = A(0);
        A total = A(0);
        for (int64_t s = 0; s < p.splits; ++s) {
            const A factor = exponential(load(part<A>(p.partial_peak, entry(s))) - peak);
            sum = fma(factor, load(part<A>(p.partial, entry(s) * c + i)), sum);
            total = fma(factor, load(part<A>(p.partial_total, entry(s))), total);
        }
        const A hat = sum / total;
        store(part<A>(p.context_hat, b * p.heads * c + at), hat);
        if (p.norm) {
            store(part<A>(p.context, b * p.heads * c + at),
                  hat * load_or<A>(p.gamma, i, A(1)) + load_or<A>(p.beta, i, A(0)));
        }
        if (i == 0) {
            store(part<A>(p.peak, b * p.heads + j), peak);
            store(part<A>(p.total, b * p.heads + j), total);
        }
    }
}

template <typename A>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kThreads, 2)
    cross_attention_combine_backward_kernel(const __grid_constant__ CrossAttentionParams p) {
    const int64_t b = block_idx().x;
    const int64_t c = p.channels;
    for (int64_t i = thread_idx().x; i < c; i += kThreads) {
        const A gamma = load_or<A>(p.gamma, i, A(1));
        const A beta = load_or<A>(p.beta, i, A(0));
        A d_gamma = A(0);
        A d_beta = A(0);
        for (int64_t j = 0; j < p.heads; ++j) {
            const int64_t at = (b * p.heads + j) * c + i;
            A slope = A(0);
            for (int64_t s = 0; s < p.splits; ++s) {
                slope += load(part<A>(p.partial, ((b * p.splits + s) * p.heads + j) * c + i));
            }
            store(part<A>(p.d_u, at), p.norm ? slope * gamma : slope);
            if (p.norm) {
                const A hat = load(part<A>(p.context_hat, at));
                const A d_context = load(part<A>(p.d_context, at));
                d_gamma += d_context * hat + load(part<A>(p.u, at)) * slope;
                d_beta += d_context;
                store(part<A>(p.context, at), hat * gamma + beta);
            }
        }
        if (p.norm) {
            store(part<A>(p.d_gamma_rows, b * c + i), d_gamma);
            store(part<A>(p.d_beta_rows, b * c + i), d_beta);
            store(part<A>(p.query_norm, b * c + i),
                  load(part<A>(p.query_hat, b * c + i)) * gamma + beta);
        }
    }
}

constexpr const char* kTooWide =
    "channels * (16 + 3 * num_heads) must not exceed 40,000, which fill an SM's shared memory; "
    "pass "
    "narrower tokens";

// With this many bytes of dynamic shared memory, one block a multiprocessor and more.
template <typename Kernel>
LaunchStatus launch_shared(Kernel kernel, int64_t blocks, int64_t bytes,
                           const CrossAttentionParams& params, void* stream) {
    if (bytes > 48 * 1024) {
        const LaunchStatus status = allow_dynamic_shared(kernel, static_cast<std::size_t>(bytes));
        if (status != kLaunchOk) {
            return status;
        }
    }
    return launch(kernel, Dim3{static_cast<unsigned>(blocks), 1, 1}, Dim3{kThreads, 1, 1},
                  static_cast<std::size_t>(bytes), as_stream(stream), params);
}

template <typename Kernel>
const char* launch_images(Kernel kernel, const CrossAttentionParams& params, void* stream) {
    return launch_result(launch_shared(kernel, params.batch, 0, params, stream));
}

LaunchStatus launch_attend(const CrossAttentionParams& p, bool wide, void* stream) {
    const int64_t blocks = p.batch * p.splits;
    const int64_t values = cross_attention_shared(p.channels, p.heads);
    if (wide) {
        return launch_shared(cross_attention_attend_kernel<double, double>, blocks, 8 * values, p,
                             stream);
    }
    const MmaLayout layout = mma_layout(p.channels, p.heads);
    const bool units = p.channels % 16 == 0 && layout.bytes <= kCrossAttentionMostShared;
    switch (p.token.type) {
        case FloatType::kBFloat16:
            return units ? launch_shared(cross_attention_attend_mma_kernel<BFloat16>, blocks,
                                         layout.bytes, p, stream)
                         : launch_shared(cross_attention_attend_kernel<float, BFloat16>, blocks,
                                         4 * values, p, stream);
        case FloatType::kFloat16:
            return units ? launch_shared(cross_attention_attend_mma_kernel<Half>, blocks,
                                         layout.bytes, p, stream)
                         : launch_shared(cross_attention_attend_kernel<float, Half>, blocks,
                                         4 * values, p, stream);
        default:
            return launch_shared(cross_attention_attend_kernel<float, float>, blocks, 4 * values, p,
                                 stream);
    }
}

LaunchStatus launch_attend_backward(const CrossAttentionParams& p, bool wide, void* stream) {
    const int64_t blocks = p.batch * p.splits;
    const int64_t values = backward_shared(p.channels, p.heads);
    if (wide) {
        return launch_shared(cross_attention_attend_backward_kernel<double, double>, blocks,
                             8 * values, p, stream);
    }
    switch (p.token.type) {
        case FloatType::kBFloat16:
            return launch_shared(cross_attention_attend_backward_kernel<float, BFloat16>, blocks,
                                 4 * values, p, stream);
        case FloatType::kFloat16:
            return launch_shared(cross_attention_attend_backward_kernel<float, Half>, blocks,
                                 4 * values, p, stream);
        default:
            return launch_shared(cross_attention_attend_backward_kernel<float, float>, blocks,
                                 4 * values, p, stream);
    }
}

}  // namespace

const char* cross_attention_products_cuda(const ProductTable& table, bool wide, void* stream) {
    const Dim3 grid{static_cast<unsigned>(table.tiles), 1, 1};
    const Dim3 block{kThreads, 1, 1};
    return launch_result(wide ? launch(cross_attention_products_kernel<double>, grid, block, 0,
                                       as_stream(stream), table)
                              : launch(cross_attention_products_kernel<float>, grid, block, 0,
                                       as_stream(stream), table));
}

const char* cross_attention_normalize_query_cuda(const CrossAttentionParams& params, bool wide,
                                                 void* stream) {
    return wide ? launch_images(cross_attention_normalize_query_kernel<double>, params, stream)
                : launch_images(cross_attention_normalize_query_kernel<float>, params, stream);
}

const char* cross_attention_attend_cuda(const CrossAttentionParams& params, bool wide,
                                        void* stream) {
    if (!cross_attention_fits(params.channels, params.heads, wide)) {
        return kTooWide;
    }
    const char* problem = launch_result(launch_attend(params, wide, stream));
    if (problem != nullptr || params.splits == 1) {
        return problem;
    }
    return wide ? launch_images(cross_attention_combine_kernel<double>, params, stream)
                : launch_images(cross_attention_combine_kernel<float>, params, stream);
}

const char* cross_attention_attend_backward_cuda(const CrossAttentionParams& params, bool wide,
                                                 void* stream) {
    if (!cross_attention_fits(params.channels, params.heads, wide)) {
        return kTooWide;
    }
    const char* problem = launch_result(launch_attend_backward(params, wide, stream));
    if (problem != nullptr) {
        return problem;
    }
    return wide ? launch_images(cross_attention_combine_backward_kernel<double>, params, stream)
                : launch_images(cross_attention_combine_backward_kernel<float>, params, stream);
}

const char* cross_attention_finish_query_cuda(const CrossAttentionParams& params, bool wide,
                                              void* stream) {
    return wide ? launch_images(cross_attention_finish_query_kernel<double>, params, stream)
                : launch_images(cross_attention_finish_query_kernel<float>, params, stream);
}

}  // namespace pyvitfast
