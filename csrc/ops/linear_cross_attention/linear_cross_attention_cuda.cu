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

template <typename A>
PVF_DEVICE A load_element(const MatrixView& view, int64_t at) {
    A value = A(0);
    with_float_summed_in<A>(view.type, [&]<typename T>(Type<T>) {
        value = static_cast<A>(to_float(load(static_cast<const T*>(view.data) + at)));
    });
    return value;
}

template <typename A>
PVF_DEVICE void store_element(const MatrixView& view, int64_t at, A value) {
    with_float_summed_in<A>(view.type, [&]<typename T>(Type<T>) {
        T* to = static_cast<T*>(const_cast<void*>(view.data)) + at;
        store(to, from_float<T>(static_cast<Accumulate<T>>(value)));
    });
}

template <typename A>
PVF_DEVICE A load_or(const MatrixView& view, int64_t at, A otherwise) {
    return view.data == nullptr ? otherwise : load_element<A>(view, at);
}

constexpr int kProductDepth = 64;  // of the chunks that go through shared memory
constexpr int kThreadTile = 4;     // rows and columns of a thread
constexpr int kLanesAcross = kProductTileCols / kThreadTile;
constexpr int kProductSize = kProductTileRows * kProductTileCols;
static_assert(kProductTileRows / kThreadTile * kLanesAcross == 32);

// A chunk of a factor, kSpan long in the direction that is not summed; [depth][span] in shared
// memory, padded so that either direction of copying meets each bank once.
template <int kSpan>
struct Chunk {
    static constexpr int kStride = kSpan + 4;
    static constexpr int kPerThread = kSpan * kProductDepth / kThreads;

    // Neighbouring threads take what are neighbours in memory, whichever direction that is.
    PVF_DEVICE static int span(bool along_span, int n) {
        const int thread = static_cast<int>(thread_idx().x);
        return along_span ? thread % kSpan : thread % 32 / 8 + 4 * n;
    }
    PVF_DEVICE static int depth(bool along_span, int n) {
        const int thread = static_cast<int>(thread_idx().x);
        return along_span ? thread / kSpan + kThreads / kSpan * n : thread % 8 + thread / 32 * 8;
    }

    template <typename A>
    PVF_DEVICE static void fetch(const MatrixView& view, int64_t entry, int64_t span_stride,
                                 int64_t depth_stride, int64_t span0, int64_t spans, int64_t depth0,
                                 int64_t depths, A (&held)[kPerThread]) {
        const bool along_span = span_stride == 1;
        with_float_summed_in<A>(view.type, [&]<typename T>(Type<T>) {
            const T* data = static_cast<const T*>(view.data) + entry * view.batch;
            PVF_UNROLL
            for (int n = 0; n < kPerThread; ++n) {
                const int64_t s = span0 + span(along_span, n);
                const int64_t d = depth0 + depth(along_span, n);
                held[n] = A(0);
                if (s < spans && d < depths) {
                    held[n] = view.data == nullptr
                                  ? A(1)
                                  : static_cast<A>(
                                        to_float(load(data + s * span_stride + d * depth_stride)));
                }
            }
        });
    }

    template <typename A>
    PVF_DEVICE static void put(bool along_span, int depths, const A (&held)[kPerThread],
                               A* shared) {
        PVF_UNROLL
        for (int n = 0; n < kPerThread; ++n) {
            const int d = depth(along_span, n);
            if (d < depths) {
                store_shared(shared + d * kStride + span(along_span, n), held[n]);
            }
        }
    }
};

// Small tiles, and the depth shared out over the warps: the products are small and many blocks
// hide more latency than large tiles save bytes. The next chunk is under way during the sums.
template <typename A>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kThreads, 2)
    cross_attention_products_kernel(const __grid_constant__ ProductTable table) {
    using Left = Chunk<kProductTileRows>;
    using Right = Chunk<kProductTileCols>;
    constexpr int kStaged = kProductDepth * (Left::kStride + Right::kStride);
    constexpr int kPartial = kWarps * kProductSize;
    PVF_SHARED(A, shared, kStaged > kPartial ? kStaged : kPartial);
    A* const left = &shared[0];
    A* const right = left + kProductDepth * Left::kStride;
    const int64_t block = block_idx().x;
    const Product& p = entry_of_tile(table.products, table.count, block);
    const int64_t local = block - p.tile_begin;
    const int64_t col_tiles = product_col_tiles(p);
    const int64_t row_tiles = product_row_tiles(p);
    const int64_t col0 = local % col_tiles * kProductTileCols;
    const int64_t row0 = local / col_tiles % row_tiles * kProductTileRows;
    const int64_t entry = local / col_tiles / row_tiles;
    const int row = static_cast<int>(lane_id()) / kLanesAcross * kThreadTile;
    const int col = static_cast<int>(lane_id()) % kLanesAcross * kThreadTile;
    A held_left[Left::kPerThread];
    A held_right[Right::kPerThread];
    const auto fetch = [&](int64_t k) {
        Left::fetch(p.left, entry, p.left.row, p.left.col, row0, p.m, k, p.k, held_left);
        Right::fetch(p.right, entry, p.right.col, p.right.row, col0, p.n, k, p.k, held_right);
    };
    A sums[kThreadTile][kThreadTile] = {};
    fetch(0);
    for (int64_t k = 0; k < p.k; k += kProductDepth) {
        const int depths = static_cast<int>(p.k - k < kProductDepth ? p.k - k : kProductDepth);
        sync_threads();
        Left::put(p.left.row == 1, depths, held_left, left);
        Right::put(p.right.col == 1, depths, held_right, right);
        sync_threads();
        if (k + kProductDepth < p.k) {
            fetch(k + kProductDepth);
        }
        for (int depth = static_cast<int>(warp_id()); depth < depths; depth += kWarps) {
            const auto a = load_shared_vec<kThreadTile>(left + depth * Left::kStride + row);
            const auto b = load_shared_vec<kThreadTile>(right + depth * Right::kStride + col);
            PVF_UNROLL
            for (int i = 0; i < kThreadTile; ++i) {
                PVF_UNROLL
                for (int j = 0; j < kThreadTile; ++j) {
                    sums[i][j] = fma(a[i], b[j], sums[i][j]);
                }
            }
        }
    }
    sync_threads();
    PVF_UNROLL
    for (int i = 0; i < kThreadTile; ++i) {
        Vec<A, kThreadTile> own;
        PVF_UNROLL
        for (int j = 0; j < kThreadTile; ++j) {
            own[j] = sums[i][j];
        }
        store_shared_vec(
            &shared[0] + (warp_id() * kProductTileRows + row + i) * kProductTileCols + col, own);
    }
    sync_threads();
    for (int at = static_cast<int>(thread_idx().x); at < kProductSize; at += kThreads) {
        const int64_t m = row0 + at / kProductTileCols;
        const int64_t n = col0 + at % kProductTileCols;
        if (m < p.m && n < p.n) {
            A sum = A(0);
            PVF_UNROLL
            for (int warp = 0; warp < kWarps; ++warp) {
                sum += load_shared(&shared[0] + warp * kProductSize + at);
            }
            const A bias = load_or<A>(p.bias, entry * p.bias.batch + n * p.bias.col, A(0));
            store_element<A>(p.out, entry * p.out.batch + m * p.out.row + n * p.out.col,
                             sum * static_cast<A>(p.alpha) + bias);
        }
    }
}

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

// Vectors that a lane holds of a row of up to 768 channels. Doubles only have to be right.
template <typename T>
constexpr int kHeldVectors = sizeof(T) == 8 ? 1 : 24 / kVector<T>;

// A row in the registers of a warp, so that it is read once and goes to shared memory once.
template <typename T>
struct HeldRow {
    Vec<T, kVector<T>> part[kHeldVectors<T>];

    PVF_DEVICE static bool holds(const T* row, int64_t count) {
        return sizeof(T) < 8 && count % kVector<T> == 0 &&
               count <= 32 * kVector<T> * kHeldVectors<T> &&
               reinterpret_cast<uintptr_t>(row) % 16 == 0;
    }

    // f(v, i) for each of the lane's vectors: part[v] has the values i, i + 1, ..
    template <typename F>
    PVF_DEVICE static void each(int64_t count, const F& f) {
        PVF_UNROLL
        for (int v = 0; v < kHeldVectors<T>; ++v) {
            const int i = (v * 32 + static_cast<int>(lane_id())) * kVector<T>;
            if (i < count) {
                f(v, i);
            }
        }
    }

    PVF_DEVICE void read(const T* row, int64_t count) {
        each(count, [&](int v, int i) { part[v] = load_vec_streaming<kVector<T>>(row + i); });
    }

    // All values to f(value).
    template <typename F>
    PVF_DEVICE void values(int64_t count, const F& f) const {
        each(count, [&](int v, int) {
            PVF_UNROLL
            for (int k = 0; k < kVector<T>; ++k) {
                f(to_float(part[v][k]));
            }
        });
    }

    // f(value) of all values to shared memory as S.
    template <typename S, typename F>
    PVF_DEVICE void write(S* to, int64_t count, const F& f) const {
        each(count, [&](int v, int i) {
            Vec<S, kVector<T>> out;
            PVF_UNROLL
            for (int k = 0; k < kVector<T>; ++k) {
                out[k] = from_float<S>(f(to_float(part[v][k])));
            }
            store_shared_vec(to + i, out);
        });
    }
};

// A tile of rows into shared memory as hats of type S; a warp takes whole rows, so no thread waits
// for another warp. Rows that do not exist become zeros. `deviations`: inverse ones of the tokens.
// kAhead: a row is on its way while the one before is worked on, for twice the registers.
template <typename A, typename T, bool kAhead = true, typename S>
PVF_DEVICE void load_rows(const CrossAttentionParams& p, const SplitRows& rows, int64_t first,
                          int tile_rows, S* tile, int64_t stride, A* deviations) {
    const int64_t c = p.channels;
    const auto address = [&](int local) -> const T* {
        const int64_t row = first + local;
        if (local >= tile_rows || row < rows.queries || row >= rows.count) {
            return nullptr;
        }
        return static_cast<const T*>(p.token.data) + rows.image * p.token.batch +
               (rows.first_token + row - rows.queries) * p.token.row;
    };
    const auto read = [&](HeldRow<T>& held, const T* from) {
        if (from != nullptr && HeldRow<T>::holds(from, c)) {
            held.read(from, c);
        }
    };
    HeldRow<T> held;
    if constexpr (kAhead) {
        read(held, address(static_cast<int>(warp_id())));
    }
    for (int local = static_cast<int>(warp_id()); local < tile_rows; local += kWarps) {
        HeldRow<T> next;
        if constexpr (kAhead) {
            read(next, address(local + kWarps));
        } else {
            read(held, address(local));
        }
        S* to = tile + local * stride;
        const T* from = address(local);
        const auto put = [&](int64_t i, A value) {
            store_shared(to + i, from_float<S>(static_cast<Accumulate<S>>(value)));
        };
        if (from == nullptr) {
            const bool query = first + local < rows.queries;
            for (int64_t i = lane_id(); i < c; i += 32) {
                put(i, query ? load(part<A>(p.query_hat, rows.image * c + i)) : A(0));
            }
        } else {
            const bool holds = HeldRow<T>::holds(from, c);
            // What no vectors hold waits in shared memory; a lane meets its own values only.
            const auto own = [&](int64_t i) {
                return static_cast<A>(to_float(load_shared(to + i)));
            };
            if (!holds) {
                for (int64_t i = lane_id(); i < c; i += 32) {
                    put(i, static_cast<A>(to_float(load(from + i))));
                }
            }
            A mean = A(0);
            A rstd = A(1);
            if (p.norm) {
                A total = A(0);
                A squares = A(0);
                const auto add = [&](A value) { total += value; };
                const auto add_square = [&](A value) {
                    const A off = value - mean;
                    squares = fma(off, off, squares);
                };
                if (holds) {
                    held.values(c, add);
                } else {
                    for (int64_t i = lane_id(); i < c; i += 32) {
                        add(own(i));
                    }
                }
                mean = warp_sum(total) / static_cast<A>(c);
                if (holds) {
                    held.values(c, add_square);
                } else {
                    for (int64_t i = lane_id(); i < c; i += 32) {
                        add_square(own(i));
                    }
                }
                rstd = rsqrt(warp_sum(squares) / static_cast<A>(c) + static_cast<A>(p.eps));
                if (lane_id() == 0) {
                    store_shared(deviations + local, rstd);
                }
            }
            const auto hat = [&](A value) {
                return static_cast<Accumulate<S>>(p.norm ? (value - mean) * rstd : value);
            };
            if (holds) {
                held.template write<S>(to, c, hat);
            } else if (p.norm) {
                for (int64_t i = lane_id(); i < c; i += 32) {
                    put(i, hat(own(i)));
                }
            }
        }
        if constexpr (kAhead) {
            held = next;
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

// One warp a head, one lane a row of at most 32: score(row) of the tile's rows that exist becomes
// exp(score - peak), handed to put(head, row, value) for every row of the tile.
template <typename A, typename Score, typename Put>
PVF_DEVICE void softmax_tile(const CrossAttentionParams& p, const SplitRows& rows, int64_t first,
                             int tile_rows, int heads, const Running<A>& running,
                             const Score& score, const Put& put) {
    for (int j = static_cast<int>(warp_id()); j < heads; j += kWarps) {
        const int row = static_cast<int>(lane_id());
        const bool there = row < tile_rows && first + row < rows.count && j < p.heads;
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
        if (row < tile_rows) {
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

constexpr int kTile = kCrossAttentionTile;

// Half of the values stay with half of the lanes, and again, until each lane has one.
template <int kHalf, typename A>
PVF_DEVICE void exchange_halves(A (&values)[16]) {
    const bool upper = (lane_id() & 2 * kHalf) != 0;
    PVF_UNROLL
    for (int i = 0; i < kHalf; ++i) {
        const A first = values[i];
        const A second = values[i + kHalf];
        values[i] = (upper ? second : first) + shuffle_xor(upper ? first : second, 2 * kHalf);
    }
    if constexpr (kHalf > 1) {
        exchange_halves<kHalf / 2>(values);
    }
}

// Sums each of 16 values over the warp: lane l gets the sum of value l / 2, in 16 exchanges.
template <typename A>
PVF_DEVICE A warp_sum_16(A (&values)[16]) {
    exchange_halves<8>(values);
    return values[0] + shuffle_xor(values[0], 1);
}

// out[j * kTile + row] = vectors[j] . tile[row] for all heads; a warp takes two rows.
template <typename A>
PVF_DEVICE void dot_tile(const A* vectors, const A* tile, int channels, int heads, A* out) {
    constexpr int kRows = kTile / kWarps;
    const int row0 = static_cast<int>(warp_id()) * kRows;
    for (int group = 0; group < heads; group += kHeadGroup) {
        A sums[kRows * kHeadGroup] = {};
        for (int i = static_cast<int>(lane_id()); i < channels; i += 32) {
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
                        sums[r * kHeadGroup + j] = fma(values[r], other, sums[r * kHeadGroup + j]);
                    }
                }
            }
        }
        const A total = warp_sum_16(sums);
        const int which = static_cast<int>(lane_id()) / 2;
        const int head = group + which % kHeadGroup;
        if (lane_id() % 2 == 0 && head < heads) {
            store_shared(out + head * kTile + row0 + which / kHeadGroup, total);
        }
    }
}

// sums[j] = factor[j] * sums[j] + sum over rows of weights[j * kTile + row] * tile[row].
template <typename A>
PVF_DEVICE void sum_tile(const A* weights, const A* tile, const A* factor, int channels, int heads,
                         A* sums) {
    constexpr int kRows = 4;  // weights of a vector load, which all threads share
    for (int i = static_cast<int>(thread_idx().x); i < channels; i += kThreads) {
        for (int group = 0; group < heads; group += kHeadGroup) {
            A own[kHeadGroup];
            PVF_UNROLL
            for (int j = 0; j < kHeadGroup; ++j) {
                const bool there = group + j < heads;
                const A shrink =
                    there && factor != nullptr ? load_shared(factor + group + j) : A(1);
                own[j] = there ? load_shared(sums + (group + j) * channels + i) * shrink : A(0);
            }
            PVF_NO_UNROLL  // registers
                for (int row = 0; row < kTile; row += kRows) {
                A values[kRows];
                PVF_UNROLL
                for (int r = 0; r < kRows; ++r) {
                    values[r] = load_shared(tile + (row + r) * channels + i);
                }
                PVF_UNROLL
                for (int j = 0; j < kHeadGroup; ++j) {
                    if (group + j < heads) {
                        const auto weight =
                            load_shared_vec<kRows>(weights + (group + j) * kTile + row);
                        PVF_UNROLL
                        for (int r = 0; r < kRows; ++r) {
                            own[j] = fma(weight[r], values[r], own[j]);
                        }
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
PVF_KERNEL PVF_LAUNCH_BOUNDS(kThreads, 2)
    cross_attention_attend_kernel(const __grid_constant__ CrossAttentionParams p) {
    PVF_DYNAMIC_SHARED(A, shared);
    const int c = static_cast<int>(p.channels);
    const int h = static_cast<int>(p.heads);
    const SplitRows rows = rows_of_block(p);
    A* const weights = shared;  // first, so that both can be met by vectors
    A* const tile = weights + h * kTile;
    A* const gamma_u = tile + kTile * c;
    A* const sums = gamma_u + h * c;
    A* const deviations = sums + h * c;
    A* const states = deviations + kTile;
    const Running<A> running{states, states + h, states + 2 * h};
    stage_vectors(p, part<A>(p.u, rows.image * h * c), h, gamma_u);
    for (int at = static_cast<int>(thread_idx().x); at < h * c; at += kThreads) {
        store_shared(sums + at, A(0));
    }
    start_running(running, h);
    for (int64_t first = 0; first < rows.count; first += kTile) {
        load_rows<A, T>(p, rows, first, kTile, tile, c, deviations);
        sync_threads();
        dot_tile(gamma_u, tile, c, h, weights);
        sync_threads();
        softmax_tile<A>(
            p, rows, first, kTile, h, running,
            [&](int row, int j) { return load_shared(weights + j * kTile + row); },
            [&](int j, int row, A value) { store_shared(weights + j * kTile + row, value); });
        sync_threads();
        sum_tile(weights, tile, running.factor, c, h, sums);
        sync_threads();
    }
    for (int at = static_cast<int>(thread_idx().x); at < h * c; at += kThreads) {
        store_context(p, rows, at / c, at % c, load_shared(sums + at),
                      load_shared(running.total + at / c));
    }
    store_running(p, rows, running);
}

constexpr int kMmaTile = 32;    // rows
constexpr int kMmaPad = 8;      // elements, so that eight rows lie in different banks
constexpr int kPartialPad = 4;  // floats, so that four pairs of heads do

// A value as the sum of two 16-bit ones: together they hold twice the bits.
template <typename T>
PVF_DEVICE void store_halves(T* high, T* low, float value) {
    const T upper = from_float<T>(value);
    store_shared(high, upper);
    store_shared(low, from_float<T>(value - to_float(upper)));
}

PVF_DEVICE float magnitude(float x) { return x < 0.0f ? -x : x; }

// The greatest power of two not above the greatest magnitude, inverted: float16 has few small
// numbers, so values are brought near one before they are split.
PVF_DEVICE float inverse_scale(float greatest) {
    const bool usable = greatest > 1e-30f && greatest < 1e30f;
    return usable ? bits_float((254u << 23) - (float_bits(greatest) & 0x7f800000u)) : 1.0f;
}

// Vectors of C channels as high and low halves, `stride` apart, and zeros after them that stand in
// for heads that only pad.
template <typename T>
struct SplitVectors {
    T* high;
    T* low;
    int count;
    int stride;

    static constexpr int kZeros = 80;  // 16, and room to begin at any bank

    PVF_HOST_DEVICE static int64_t half(int64_t count, int64_t stride) {
        return count * stride + kZeros;
    }
    PVF_HOST_DEVICE static int64_t bytes(int64_t count, int64_t stride) {
        return 2 * half(count, stride) * static_cast<int64_t>(sizeof(T));
    }
    PVF_DEVICE static SplitVectors at(unsigned char* shared, int count, int stride) {
        T* const high = reinterpret_cast<T*>(shared);
        return {high, high + half(count, stride), count, stride};
    }

    // Where 16 channels of a vector lie, or zeros in the banks that they would have.
    PVF_DEVICE int offset(int which, bool exists, int channel) const {
        return exists ? which * stride + channel
                      : count * stride + (((which - count) * 8 + channel) & 63);
    }

    PVF_DEVICE void put_zeros() const {
        const int i = static_cast<int>(thread_idx().x);
        if (i < kZeros) {
            store_shared(high + count * stride + i, from_float<T>(0.0f));
            store_shared(low + count * stride + i, from_float<T>(0.0f));
        }
    }

    // Called by a warp. Returns the power of two that brings the stored values back.
    template <typename F>
    PVF_DEVICE float put(int which, int channels, const F& value) const {
        float greatest = 0.0f;
        for (int i = static_cast<int>(lane_id()); i < channels; i += 32) {
            greatest = Max{}(greatest, magnitude(value(i)));
        }
        const float scale = inverse_scale(warp_max(greatest));
        for (int i = static_cast<int>(lane_id()); i < channels; i += 32) {
            store_halves(high + which * stride + i, low + which * stride + i, value(i) * scale);
        }
        return 1.0f / scale;
    }
};

// Dot products of rows and the first `heads` vectors: rows on the 16 side, vectors on the 8 side,
// channels shared out over the warps of a row tile. The parts lie in [parts][padded heads][rows +
// kPartialPad]; the return value says how many there are.
template <typename T>
PVF_DEVICE int dot_tile_mma(const SplitVectors<T>& vectors, const T* tile, int tile_rows,
                            int channels, int heads, float* partial) {
    const int lane = static_cast<int>(lane_id());
    const int row_tiles = tile_rows / 16;
    const int parts = kWarps / row_tiles;
    const int row0 = static_cast<int>(warp_id()) % row_tiles * 16;
    const int share = static_cast<int>(warp_id()) / row_tiles;
    const int stride = vectors.stride;
    const T* rows = tile + (row0 + lane % 16) * stride + lane / 16 * 8;
    for (int group = 0; group < heads; group += kHeadGroup) {
        const int head = group + lane % 8;
        const T* half = (lane < 16 ? vectors.high : vectors.low) + lane / 8 % 2 * 8;
        float d[4] = {};
        for (int k = share * 16; k < channels; k += parts * 16) {
            std::uint32_t a[4];
            std::uint32_t b[4];
            ldmatrix_x4(a, rows + k);
            ldmatrix_x4(b, half + vectors.offset(head, head < heads, k));
            const std::uint32_t high[2] = {b[0], b[1]};
            const std::uint32_t low[2] = {b[2], b[3]};
            mma_m16n8k16<T>(d, a, high);
            mma_m16n8k16<T>(d, a, low);
        }
        PVF_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int row = row0 + lane / 4 + i / 2 * 8;
            const int column = share * padded_heads(heads) + group + lane % 4 * 2 + i % 2;
            store_shared(partial + column * (tile_rows + kPartialPad) + row, d[i]);
        }
    }
    return parts;
}

// The sum of what dot_tile_mma left of one row and vector.
PVF_DEVICE float sum_of_parts(const float* partial, int parts, int tile_rows, int padded, int j,
                              int row) {
    float total = 0.0f;
    for (int share = 0; share < parts; ++share) {
        total += load_shared(partial + (share * padded + j) * (tile_rows + kPartialPad) + row);
    }
    return total;
}

PVF_HOST_DEVICE int64_t partial_floats(int64_t padded, int64_t tile_rows) {
    return kWarps * 16 / tile_rows * padded * (tile_rows + kPartialPad);
}

// Four sums a lane for each 16 channels and 8 heads, which stay with one warp.
PVF_DEVICE float* own_sums(float* sums, int block, int group, int padded) {
    return sums + ((block * (padded / kHeadGroup) + group / kHeadGroup) * 32 +
                   static_cast<int>(lane_id())) *
                      4;
}

// sums = before * sums + after * (weights of the rows times the rows), by head: channels on the 16
// side, heads on the 8 side. Null is one. Weights lie in [padded heads][rows + kMmaPad], halves
// after one another.
template <typename T>
PVF_DEVICE void sum_tile_mma(const T* weights, const T* tile, int tile_rows, int stride,
                             int channels, int padded, const float* before, const float* after,
                             float* sums) {
    const int lane = static_cast<int>(lane_id());
    const int weights_stride = tile_rows + kMmaPad;
    const T* half = weights + (lane < 16 ? 0 : padded * weights_stride) +
                    lane % 8 * weights_stride + lane / 8 % 2 * 8;
    const T* rows = tile + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8;
    for (int block = static_cast<int>(warp_id()); block < channels / 16; block += kWarps) {
        for (int group = 0; group < padded; group += kHeadGroup) {
            float d[4] = {};
            for (int k = 0; k < tile_rows; k += 16) {
                std::uint32_t a[4];
                std::uint32_t b[4];
                ldmatrix_x4_trans(a, rows + k * stride + block * 16);
                ldmatrix_x4(b, half + group * weights_stride + k);
                const std::uint32_t high[2] = {b[0], b[1]};
                const std::uint32_t low[2] = {b[2], b[3]};
                mma_m16n8k16<T>(d, a, high);
                mma_m16n8k16<T>(d, a, low);
            }
            float* const own = own_sums(sums, block, group, padded);
            auto kept = load_shared_vec<4>(own);
            PVF_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int head = group + lane % 4 * 2 + i % 2;
                kept[i] *= before == nullptr ? 1.0f : load_shared(before + head);
                kept[i] += d[i] * (after == nullptr ? 1.0f : load_shared(after + head));
            }
            store_shared_vec(own, kept);
        }
    }
}

// f(head, channel, sum) for all sums of heads that exist.
template <typename F>
PVF_DEVICE void each_sum_mma(float* sums, int channels, int heads, const F& f) {
    const int lane = static_cast<int>(lane_id());
    for (int block = static_cast<int>(warp_id()); block < channels / 16; block += kWarps) {
        for (int group = 0; group < heads; group += kHeadGroup) {
            const auto kept = load_shared_vec<4>(own_sums(sums, block, group, padded_heads(heads)));
            PVF_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int head = group + lane % 4 * 2 + i % 2;
                if (head < heads) {
                    f(head, block * 16 + lane / 4 + i / 2 * 8, kept[i]);
                }
            }
        }
    }
}

// Offsets in bytes.
struct MmaLayout {
    int stride;  // of rows and vectors, in elements
    int padded;  // heads
    int64_t partial;
    int64_t tile;
    int64_t vectors;
    int64_t weights;
    int64_t small;  // floats
    int64_t bytes;
};

PVF_HOST_DEVICE MmaLayout mma_layout(int64_t channels, int64_t heads) {
    MmaLayout layout;
    layout.stride = static_cast<int>(channels + kMmaPad);
    layout.padded = padded_heads(heads);
    layout.partial = channels * layout.padded * 4;
    layout.tile = layout.partial + partial_floats(layout.padded, kMmaTile) * 4;
    layout.vectors = layout.tile + kMmaTile * layout.stride * 2;
    layout.weights = layout.vectors + SplitVectors<Half>::bytes(heads, layout.stride);
    layout.small = layout.weights + 2 * layout.padded * (kMmaTile + kMmaPad) * 2;
    layout.bytes = layout.small + (4 * layout.padded + kMmaTile) * 4;
    return layout;
}

template <typename T>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kThreads, 2)
    cross_attention_attend_mma_kernel(const __grid_constant__ CrossAttentionParams p) {
    PVF_DYNAMIC_SHARED(unsigned char, shared);
    const int c = static_cast<int>(p.channels);
    const int h = static_cast<int>(p.heads);
    const MmaLayout layout = mma_layout(c, h);
    const int padded = layout.padded;
    const SplitRows rows = rows_of_block(p);
    float* const sums = reinterpret_cast<float*>(shared);
    float* const partial = reinterpret_cast<float*>(shared + layout.partial);
    T* const tile = reinterpret_cast<T*>(shared + layout.tile);
    const auto u = SplitVectors<T>::at(shared + layout.vectors, h, layout.stride);
    T* const weights = reinterpret_cast<T*>(shared + layout.weights);
    constexpr int kWeightsStride = kMmaTile + kMmaPad;
    float* const scales = reinterpret_cast<float*>(shared + layout.small);
    const Running<float> running{scales + padded, scales + 2 * padded, scales + 3 * padded};
    float* const deviations = scales + 4 * padded;

    // u passes through the room of the sums, which are not needed yet.
    stage_vectors(p, part<float>(p.u, rows.image * h * c), h, sums);
    sync_threads();
    for (int j = static_cast<int>(warp_id()); j < h; j += kWarps) {
        const float scale = u.put(j, c, [&](int i) { return load_shared(sums + j * c + i); });
        if (lane_id() == 0) {
            store_shared(scales + j, scale);
        }
    }
    u.put_zeros();
    sync_threads();
    for (int at = static_cast<int>(thread_idx().x); at < c * padded; at += kThreads) {
        store_shared(sums + at, 0.0f);
    }
    start_running(running, padded);

    for (int64_t first = 0; first < rows.count; first += kMmaTile) {
        load_rows<float, T>(p, rows, first, kMmaTile, tile, layout.stride, deviations);
        sync_threads();
        const int parts = dot_tile_mma(u, tile, kMmaTile, c, h, partial);
        sync_threads();
        softmax_tile<float>(
            p, rows, first, kMmaTile, padded, running,
            [&](int row, int j) {
                return sum_of_parts(partial, parts, kMmaTile, padded, j, row) *
                       load_shared(scales + j);
            },
            [&](int j, int row, float value) {
                T* const at = weights + j * kWeightsStride + row;
                store_halves(at, at + padded * kWeightsStride, value);
            });
        sync_threads();
        sum_tile_mma(weights, tile, kMmaTile, layout.stride, c, padded, running.factor,
                     static_cast<const float*>(nullptr), sums);
        sync_threads();
    }
    each_sum_mma(sums, c, h, [&](int head, int channel, float sum) {
        store_context(p, rows, head, channel, sum, load_shared(running.total + head));
    });
    store_running(p, rows, running);
}

template <typename T>
PVF_DEVICE T* slope_of_token(const CrossAttentionParams& p, const SplitRows& rows, int64_t row) {
    return static_cast<T*>(const_cast<void*>(p.d_token.data)) + rows.image * p.d_token.batch +
           (rows.first_token + row - rows.queries) * p.d_token.row;
}

template <typename A, typename T>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kThreads, sizeof(A) == 8 ? 1 : 2)
    cross_attention_attend_backward_kernel(const __grid_constant__ CrossAttentionParams p) {
    PVF_DYNAMIC_SHARED(A, shared);
    const int c = static_cast<int>(p.channels);
    const int h = static_cast<int>(p.heads);
    const SplitRows rows = rows_of_block(p);
    A* const weights = shared;  // attention, then slopes of the scores, [2 H, rows]
    A* const tile = weights + 2 * h * kTile;
    A* const vectors = tile + kTile * c;  // slopes of the contexts, then u; both times gamma
    A* const sums = vectors + 2 * h * c;
    A* const row_means = sums + h * c;  // of each row's slope, then of slope * hat
    A* const deviations = row_means + 2 * kTile;
    A* const means = deviations + kTile;  // of the vectors
    A* const deltas = means + 2 * h;
    stage_vectors(p, part<A>(p.d_context, rows.image * h * c), h, vectors);
    stage_vectors(p, part<A>(p.u, rows.image * h * c), h, vectors + h * c);
    for (int at = static_cast<int>(thread_idx().x); at < h * c; at += kThreads) {
        store_shared(sums + at, A(0));
    }
    sync_threads();
    for (int j = static_cast<int>(warp_id()); j < 2 * h; j += kWarps) {
        A total = A(0);
        A product = A(0);
        for (int i = static_cast<int>(lane_id()); i < c; i += 32) {
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
        load_rows<A, T, false>(p, rows, first, kTile, tile, c, deviations);
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
        for (int i = static_cast<int>(thread_idx().x); i < c; i += kThreads) {
            constexpr int kRows = 8;  // at a time, for the sake of registers
            PVF_NO_UNROLL
            for (int row0 = 0; row0 < kTile; row0 += kRows) {
                A own[kRows] = {};
                PVF_NO_UNROLL
                for (int j = 0; j < 2 * h; ++j) {
                    const A value = load_shared(vectors + j * c + i);
                    const auto weight = load_shared_vec<kRows>(weights + j * kTile + row0);
                    PVF_UNROLL
                    for (int r = 0; r < kRows; ++r) {
                        own[r] = fma(weight[r], value, own[r]);
                    }
                }
                PVF_UNROLL
                for (int r = 0; r < kRows; ++r) {
                    const int64_t at = first + row0 + r;
                    if (at < rows.queries) {
                        store(part<A>(p.d_query_hat, rows.image * c + i), own[r]);
                    } else if (at < rows.count) {
                        A slope = own[r];
                        if (p.norm) {
                            const A* mean = row_means + row0 + r;
                            slope = cross_attention::norm_slope(
                                slope, load_shared(tile + (row0 + r) * c + i),
                                load_shared(deviations + row0 + r), load_shared(mean),
                                load_shared(mean + kTile));
                        }
                        store(slope_of_token<T>(p, rows, at) + i,
                              from_float<T>(static_cast<Accumulate<T>>(slope)));
                    }
                }
            }
        }
        sum_tile(slopes, tile, static_cast<const A*>(nullptr), c, h, sums);
        sync_threads();
    }
    for (int at = static_cast<int>(thread_idx().x); at < h * c; at += kThreads) {
        store(part<A>(p.partial, (rows.image * p.splits + rows.split) * h * c + at),
              load_shared(sums + at));
    }
}

PVF_HOST_DEVICE int64_t backward_shared(int64_t channels, int64_t heads) {
    return (kTile + 3 * heads) * channels + heads * (2 * kTile + 3) + 3 * kTile;
}

// Offsets in bytes.
struct MmaBackwardLayout {
    int tile_rows;
    int stride;          // of rows and vectors, in elements
    int padded;          // heads
    int weights_stride;  // of rows of weights, in elements
    int64_t partial;     // then weights by row: attention, slopes of the scores
    int64_t tile;
    int64_t vectors;
    int64_t slopes;  // of the scores, by head
    int64_t states;  // floats by head and row
    int64_t small;   // floats
    int64_t bytes;
};

PVF_HOST_DEVICE MmaBackwardLayout mma_backward_layout(int64_t channels, int64_t heads,
                                                      int tile_rows) {
    MmaBackwardLayout layout;
    layout.tile_rows = tile_rows;
    layout.stride = static_cast<int>(channels + kMmaPad);
    layout.padded = padded_heads(heads);
    layout.weights_stride = 2 * layout.padded + kMmaPad;
    layout.partial = channels * layout.padded * 4;
    const int64_t partial = partial_floats(layout.padded, tile_rows) * 4;
    const int64_t weights = 2 * tile_rows * layout.weights_stride * 2;
    layout.tile = layout.partial + (partial > weights ? partial : weights);
    layout.vectors = layout.tile + tile_rows * layout.stride * 2;
    layout.slopes = layout.vectors + SplitVectors<Half>::bytes(2 * heads, layout.stride);
    layout.states = layout.slopes + 2 * layout.padded * (tile_rows + kMmaPad) * 2;
    layout.small = layout.states + 3 * layout.padded * (tile_rows + kPartialPad) * 4;
    layout.bytes = layout.small + (6 * layout.padded + 4 * tile_rows) * 4;
    return layout;
}

// The larger tile that leaves room for two blocks a multiprocessor, or fits at all.
PVF_HOST_DEVICE MmaBackwardLayout mma_backward_layout(int64_t channels, int64_t heads) {
    const MmaBackwardLayout large = mma_backward_layout(channels, heads, 32);
    return large.bytes <= kCrossAttentionMostShared / 2 ? large
                                                        : mma_backward_layout(channels, heads, 16);
}

template <typename T>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kThreads, 2)
    cross_attention_attend_backward_mma_kernel(const __grid_constant__ CrossAttentionParams p) {
    PVF_DYNAMIC_SHARED(unsigned char, shared);
    const int c = static_cast<int>(p.channels);
    const int h = static_cast<int>(p.heads);
    const int lane = static_cast<int>(lane_id());
    const int warp = static_cast<int>(warp_id());
    const MmaBackwardLayout layout = mma_backward_layout(c, h);
    const int tile_rows = layout.tile_rows;
    const int stride = layout.stride;
    const int padded = layout.padded;
    const int slopes_stride = tile_rows + kMmaPad;
    const int weights_stride = layout.weights_stride;
    const int states_stride = tile_rows + kPartialPad;
    const SplitRows rows = rows_of_block(p);
    float* const sums = reinterpret_cast<float*>(shared);
    float* const partial = reinterpret_cast<float*>(shared + layout.partial);
    T* const tile = reinterpret_cast<T*>(shared + layout.tile);
    // Slopes of the contexts, then u; both times gamma.
    const auto vectors = SplitVectors<T>::at(shared + layout.vectors, 2 * h, stride);
    T* const slopes = reinterpret_cast<T*>(shared + layout.slopes);
    T* const weights = reinterpret_cast<T*>(shared + layout.partial);
    T* const weights_low = weights + tile_rows * weights_stride;
    float* const attentions = reinterpret_cast<float*>(shared + layout.states);
    float* const score_slopes = attentions + padded * states_stride;
    float* const products = score_slopes + padded * states_stride;          // parts of slope . hat
    float* const scales = reinterpret_cast<float*>(shared + layout.small);  // of the vectors
    float* const means = scales + 2 * padded;                               // of the vectors
    float* const deltas = means + 2 * padded;
    float* const slope_scales = deltas + padded;
    float* const deviations = slope_scales + padded;
    float* const row_scales = deviations + tile_rows;
    float* const row_means = row_scales + tile_rows;  // of each row's slope, then of slope * hat

    // The vectors pass through the room of the sums, which are not needed yet.
    PVF_NO_UNROLL
    for (int begin = 0; begin < 2 * h; begin += h) {
        const void* source = begin == 0 ? p.d_context : p.u;
        stage_vectors(p, static_cast<const float*>(source) + rows.image * h * c, h, sums);
        sync_threads();
        for (int j = warp; j < h; j += kWarps) {
            const float* const vector = sums + j * c;
            const float scale =
                vectors.put(begin + j, c, [&](int i) { return load_shared(vector + i); });
            float total = 0.0f;
            float delta = 0.0f;
            for (int i = lane; i < c; i += 32) {
                const float value = load_shared(vector + i);
                total += value;
                if (begin == 0) {
                    delta =
                        fma(value, load(part<float>(p.context_hat, (rows.image * h + j) * c + i)),
                            delta);
                }
            }
            total = warp_sum(total);
            delta = warp_sum(delta);
            if (lane == 0) {
                store_shared(scales + begin + j, scale);
                store_shared(means + begin + j, total / static_cast<float>(c));
                if (begin == 0) {
                    store_shared(deltas + j, delta);
                }
            }
        }
        sync_threads();
    }
    vectors.put_zeros();
    for (int at = static_cast<int>(thread_idx().x); at < c * padded; at += kThreads) {
        store_shared(sums + at, 0.0f);
    }

    for (int64_t first = 0; first < rows.count; first += tile_rows) {
        load_rows<float, T>(p, rows, first, tile_rows, tile, stride, deviations);
        sync_threads();
        const int parts = dot_tile_mma(vectors, tile, tile_rows, c, h, partial);
        sync_threads();
        // One warp a head, one lane a row: attention and the slope of the score.
        for (int j = warp; j < padded; j += kWarps) {
            const bool there = lane < tile_rows && first + lane < rows.count && j < h;
            float attention = 0.0f;
            float slope = 0.0f;
            float product = 0.0f;
            if (there) {
                const int64_t head = rows.image * h + j;
                const int64_t token = 1 + rows.first_token + first + lane - rows.queries;
                const float score = load(part<float>(p.scores, head * (1 + p.tokens) + token));
                const float dot = sum_of_parts(partial, parts, tile_rows, padded, j, lane) *
                                  load_shared(scales + j);
                attention = exponential(score - load(part<float>(p.peak, head))) /
                            load(part<float>(p.total, head));
                slope = attention * (dot - load_shared(deltas + j));
                product = attention * dot + slope * score;
            }
            const float scale = inverse_scale(warp_max(magnitude(slope)));
            if (lane < tile_rows) {
                T* const at = slopes + j * slopes_stride + lane;
                store_halves(at, at + padded * slopes_stride, slope * scale);
                store_shared(attentions + j * states_stride + lane, attention);
                store_shared(score_slopes + j * states_stride + lane, slope);
                store_shared(products + j * states_stride + lane, product);
            }
            if (lane == 0) {
                store_shared(slope_scales + j, 1.0f / scale);
            }
        }
        sync_threads();
        // Eight lanes a row: the means that LayerNorm's gradient needs, without another pass over
        // the channels, and the weights of the vectors in this row's slope.
        const int row = static_cast<int>(thread_idx().x) / 8;
        if (row < tile_rows) {
            float mean = 0.0f;
            float product = 0.0f;
            float greatest = 0.0f;
            for (int j = lane % 8; j < h; j += 8) {
                const float attention = load_shared(attentions + j * states_stride + row);
                const float slope = load_shared(score_slopes + j * states_stride + row);
                mean += attention * load_shared(means + j) + slope * load_shared(means + h + j);
                product += load_shared(products + j * states_stride + row);
                greatest = Max{}(greatest, magnitude(attention * load_shared(scales + j)));
                greatest = Max{}(greatest, magnitude(slope * load_shared(scales + h + j)));
            }
            PVF_UNROLL
            for (int step = 4; step > 0; step /= 2) {
                mean += shuffle_xor(mean, step);
                product += shuffle_xor(product, step);
                greatest = Max{}(greatest, shuffle_xor(greatest, step));
            }
            const float scale = inverse_scale(greatest);
            for (int j = lane % 8; j < padded; j += 8) {
                const float attention = j < h ? load_shared(attentions + j * states_stride + row) *
                                                    load_shared(scales + j)
                                              : 0.0f;
                const float slope = j < h ? load_shared(score_slopes + j * states_stride + row) *
                                                load_shared(scales + h + j)
                                          : 0.0f;
                const int at = row * weights_stride + j;
                store_halves(weights + at, weights_low + at, attention * scale);
                store_halves(weights + at + padded, weights_low + at + padded, slope * scale);
            }
            if (lane % 8 == 0) {
                store_shared(row_scales + row, 1.0f / scale);
                store_shared(row_means + row, mean);
                store_shared(row_means + tile_rows + row, product / static_cast<float>(c));
            }
        }
        sum_tile_mma(slopes, tile, tile_rows, stride, c, padded, static_cast<const float*>(nullptr),
                     slope_scales, sums);
        sync_threads();
        // Slopes of the rows, in place of the hats: rows on the 16 side, channels on the 8 side,
        // the vectors summed. The product of both low halves is below the rounding of the rest.
        {
            const int row_tiles = tile_rows / 16;
            const int row0 = warp % row_tiles * 16;
            const T* own_weights = weights + (row0 + lane % 16) * weights_stride + lane / 16 * 8;
            const T* half = lane < 16 ? vectors.high : vectors.low;
            for (int block = warp / row_tiles; block < c / 16; block += kWarps / row_tiles) {
                float d[2][4] = {};
                for (int k = 0; k < 2 * padded; k += 16) {
                    const int which = k + lane % 16;
                    const int j = which < padded ? which : which - padded;
                    const int vector = which < padded ? j : h + j;
                    const T* own_vectors = half + vectors.offset(vector, j < h, block * 16);
                    std::uint32_t a[4];
                    std::uint32_t a_low[4];
                    ldmatrix_x4(a, own_weights + k);
                    ldmatrix_x4(a_low, own_weights + (weights_low - weights) + k);
                    PVF_UNROLL
                    for (int side = 0; side < 2; ++side) {
                        std::uint32_t b[4];
                        ldmatrix_x4_trans(b, own_vectors + side * 8);
                        const std::uint32_t high[2] = {b[0], b[1]};
                        const std::uint32_t low[2] = {b[2], b[3]};
                        mma_m16n8k16<T>(d[side], a, high);
                        mma_m16n8k16<T>(d[side], a, low);
                        mma_m16n8k16<T>(d[side], a_low, high);
                    }
                }
                PVF_UNROLL
                for (int i = 0; i < 4; i += 2) {
                    const int local = row0 + lane / 4 + i / 2 * 8;
                    const bool query = first + local < rows.queries;
                    const bool normal = p.norm && !query && first + local < rows.count;
                    const float scale = load_shared(row_scales + local);
                    const float rstd = normal ? load_shared(deviations + local) : 1.0f;
                    const float mean = normal ? load_shared(row_means + local) : 0.0f;
                    const float product =
                        normal ? load_shared(row_means + tile_rows + local) : 0.0f;
                    PVF_UNROLL
                    for (int side = 0; side < 2; ++side) {
                        const int channel = block * 16 + side * 8 + lane % 4 * 2;
                        T* const at = tile + local * stride + channel;
                        const auto hats = load_shared_vec<2>(at);
                        Vec<T, 2> out;
                        PVF_UNROLL
                        for (int k = 0; k < 2; ++k) {
                            float slope = d[side][i + k] * scale;
                            if (query) {
                                store(part<float>(p.d_query_hat, rows.image * c + channel + k),
                                      slope);
                            }
                            slope = normal ? cross_attention::norm_slope(slope, to_float(hats[k]),
                                                                         rstd, mean, product)
                                           : slope;
                            out[k] = from_float<T>(slope);
                        }
                        store_shared_vec(at, out);
                    }
                }
            }
        }
        sync_threads();
        // Each warp stores the rows that it will load next, so that no barrier is needed between.
        for (int local = warp; local < tile_rows; local += kWarps) {
            if (first + local >= rows.queries && first + local < rows.count) {
                T* const to = slope_of_token<T>(p, rows, first + local);
                for (int i = lane * kVector<T>; i < c; i += 32 * kVector<T>) {
                    store_vec(to + i, load_shared_vec<kVector<T>>(tile + local * stride + i));
                }
            }
        }
        sync_warp();
    }
    each_sum_mma(sums, c, h, [&](int head, int channel, float sum) {
        const int64_t at = (rows.image * p.splits + rows.split) * h + head;
        store(part<float>(p.partial, at * c + channel), sum);
    });
}

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
    "channels * (16 + 3 * num_heads) + 36 * num_heads must not exceed 41,600, or 20,800 in "
    "float64, "
    "which fill an SM's shared memory; pass narrower tokens";

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
    const MmaBackwardLayout layout = mma_backward_layout(p.channels, p.heads);
    const bool units = p.channels % 16 == 0 && layout.bytes <= kCrossAttentionMostShared;
    switch (p.token.type) {
        case FloatType::kBFloat16:
            return units ? launch_shared(cross_attention_attend_backward_mma_kernel<BFloat16>,
                                         blocks, layout.bytes, p, stream)
                         : launch_shared(cross_attention_attend_backward_kernel<float, BFloat16>,
                                         blocks, 4 * values, p, stream);
        case FloatType::kFloat16:
            return units ? launch_shared(cross_attention_attend_backward_mma_kernel<Half>, blocks,
                                         layout.bytes, p, stream)
                         : launch_shared(cross_attention_attend_backward_kernel<float, Half>,
                                         blocks, 4 * values, p, stream);
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
