#pragma once

// Attention of a few queries on the CPU. Scores are kept keys by queries: the queries of a head,
// transposed once, are the vectors of the product with the keys, whose channels are single values
// wherever they lie. So keys are never transposed, the softmax runs down columns without sums over
// lanes, and the columns are in turn the single values of the product with the rows of V.

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention.h"
#include "cpu_matmul.h"
#include "cpu_rows.h"

namespace pyvitfast::PVF_CPU_CAPABILITY {

constexpr int kMostQueries = 64;  // of a tile
constexpr int kMostTileKeys = 128;

// out = left [m, k] @ right [k, n], or added to it; n is a multiple of kWide. Tiles are as large as
// the registers allow for the vectors at hand: each column of the result is gone through once.
template <typename A>
static void product(Scalars<A> left, const A* right, int64_t right_stride, int64_t m, int64_t n,
                    int64_t k, A* out, int64_t out_stride, bool add) {
    Stream nothing;
    int64_t column = 0;
    const auto columns = [&]<int kVectors, int kRows>(std::integer_sequence<int, kVectors, kRows>) {
        outer_column<A, kVectors, kRows>(left, right + column, right_stride, m, k, out + column,
                                         out_stride, add, nothing);
        column += kVectors * kWide<A>;
    };
    while (column < n) {
        const int64_t vectors = (n - column) / kWide<A>;
        if constexpr (kVectorsPerTile == 4) {
            if (vectors == 4 || vectors > 5) {
                columns(std::integer_sequence<int, 4, 6>{});
                continue;
            }
            if (vectors == 3 || vectors == 5) {
                columns(std::integer_sequence<int, 3, 8>{});
                continue;
            }
        }
        if (vectors >= 2) {
            columns(std::integer_sequence<int, 2, kVectorsPerTile == 4 ? 12 : 6>{});
        } else {
            columns(std::integer_sequence<int, 1, 12>{});
        }
    }
}

template <typename A>
PVF_INLINE int64_t whole_vectors(int64_t count) {
    return (count + kWide<A> - 1) / kWide<A> * kWide<A>;
}

// Neighbouring keys of a group, in a line of the grid or before it.
template <typename A>
struct KeyRun {
    const A* k;
    const A* v;
    int64_t k_stride;
    int64_t v_stride;
    int64_t first;  // of the tile's keys
    int64_t count;
};

// Some keys of a group: runs where they lie, or one run of widened copies.
template <typename A>
struct KeyTile {
    KeyRun<A> runs[kMostTileKeys];
    int64_t run_count = 0;
    int64_t keys = 0;
    int64_t first = 0;  // of the group's keys
};

// Collects keys into tiles. T is the dtype of the rows.
template <typename A, typename T>
class KeyReader {
   public:
    __attribute__((always_inline)) KeyReader(const AttentionParams& p, Scratch<A>& memory)
        : p_(p), padded_(whole_vectors<A>(p.width)) {
        direct_ = std::is_same_v<A, T> && padded_ == p.width;
        copy_ = direct_ ? nullptr : memory.reserve(2 * kMostTileKeys * padded_);
    }

    __attribute__((always_inline)) void clear(KeyTile<A>& tile, int64_t first) const {
        tile.run_count = 0;
        tile.keys = 0;
        tile.first = first;
    }

    // `count` keys more, kMostTileKeys in all at most.
    __attribute__((always_inline)) void add(KeyTile<A>& tile, const void* k, const void* v,
                                            int64_t k_stride, int64_t v_stride,
                                            int64_t count) const {
        const T* keys = static_cast<const T*>(k);
        const T* values = static_cast<const T*>(v);
        if constexpr (std::is_same_v<A, T>) {
            if (direct_) {
                tile.runs[tile.run_count++] = {keys, values, k_stride, v_stride, tile.keys, count};
                tile.keys += count;
                return;
            }
        }
        A* const value_copy = copy_ + kMostTileKeys * padded_;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t at = (tile.keys + i) * padded_;
            widen_row(keys + i * k_stride, p_.width, copy_ + at);
            widen_row(values + i * v_stride, p_.width, value_copy + at);
            for (int64_t c = p_.width; c < padded_; ++c) {
                copy_[at + c] = value_copy[at + c] = A(0);
            }
        }
        tile.keys += count;
        tile.run_count = 1;
        tile.runs[0] = {copy_, value_copy, padded_, padded_, 0, tile.keys};
    }

    // Keys [begin, end) of a group in tiles: f(tile).
    template <typename F>
    __attribute__((always_inline)) void tiles(const AttentionGroup& g, int64_t begin, int64_t end,
                                              KeyTile<A>& tile, const F& f) const {
        const Span lines = keys_of_window(p_, 0, g.down);
        const Span columns = keys_of_window(p_, 1, g.across);
        end = std::min(end, p_.before + lines.count * columns.count);
        clear(tile, begin);
        int64_t at = begin;
        while (at < end) {
            int64_t count = 0;
            int64_t line = 0;
            int64_t column = 0;
            if (at < p_.before) {
                count = std::min(end, p_.before) - at;
            } else {
                line = (at - p_.before) / columns.count;
                column = (at - p_.before) % columns.count;
                count = std::min(end - at, columns.count - column);
            }
            // A run is cut only where it alone fills a tile.
            if (tile.keys > 0 && tile.keys + count > kMostTileKeys) {
                f(tile);
                clear(tile, at);
            }
            count = std::min<int64_t>(count, kMostTileKeys);
            if (at < p_.before) {
                add(tile, entry_of<T>(p_.k_before.data, row_offset(p_.k_before, g, at)),
                    entry_of<T>(p_.v_before.data, row_offset(p_.v_before, g, at)), p_.k_before.row,
                    p_.v_before.row, count);
            } else {
                add_line(tile, g.entry, g.head, lines.first + line, columns.first + column, count);
            }
            at += count;
        }
        if (tile.keys > 0) {
            f(tile);
        }
    }

    __attribute__((always_inline)) void add_line(KeyTile<A>& tile, int64_t entry, int64_t head,
                                                 int64_t line, int64_t column,
                                                 int64_t count) const {
        add(tile, entry_of<T>(p_.k.data, key_offset(p_.k, entry, head, line, column)),
            entry_of<T>(p_.v.data, key_offset(p_.v, entry, head, line, column)), p_.k.column,
            p_.v.column, count);
    }

   private:
    const AttentionParams& p_;
    int64_t padded_;
    bool direct_;
    A* copy_;
};

struct QueryTile {
    int64_t first;
    int64_t count;
    int64_t padded;
};

template <typename A>
PVF_INLINE QueryTile query_tile(const AttentionParams& p, int64_t first) {
    const int64_t count = std::min<int64_t>(kMostQueries, p.queries - first);
    return {first, count, whole_vectors<A>(count)};
}

// Rows of a query tile times `factor`, [count, width padded], and transposed, [width, padded].
template <typename A, typename T>
PVF_INLINE void read_rows(const AttentionParams& p, const AttentionRows& from,
                          const AttentionGroup& g, const QueryTile& tile, A factor, A* rows,
                          A* transposed) {
    const int64_t padded_width = whole_vectors<A>(p.width);
    for (int64_t m = 0; m < tile.count; ++m) {
        A* row = rows + m * padded_width;
        widen_row(entry_of<T>(from.data, row_offset(from, g, tile.first + m)), p.width, row);
        for (int64_t c = 0; c < p.width; ++c) {
            row[c] *= factor;
            transposed[c * tile.padded + m] = row[c];
        }
        for (int64_t c = p.width; c < padded_width; ++c) {
            row[c] = A(0);
        }
    }
    for (int64_t m = tile.count; m < tile.padded; ++m) {
        for (int64_t c = 0; c < p.width; ++c) {
            transposed[c * tile.padded + m] = A(0);
        }
    }
}

// Rows lie far apart in a fused projection, where the hardware does not look ahead.
template <typename A>
PVF_INLINE void prefetch_rows(const A* rows, int64_t stride, int64_t width, int64_t begin,
                              int64_t end) {
    constexpr int64_t kLine = 64 / sizeof(A);
    for (int64_t n = begin; n < end; ++n) {
        for (int64_t c = 0; c < width; c += kLine) {
            __builtin_prefetch(rows + n * stride + c, 0, 3);
        }
    }
}

// scores [keys, padded] of a tile: products with the transposed queries, and the bias.
template <typename A>
PVF_INLINE void score(const AttentionParams& p, const AttentionGroup& g, const QueryTile& queries,
                      const KeyTile<A>& tile, const A* transposed, A* scores) {
    constexpr int64_t kAhead = 24;  // keys; whole tiles of rows of any height
    for (int64_t r = 0; r < tile.run_count; ++r) {
        const KeyRun<A>& run = tile.runs[r];
        for (int64_t n = 0; n < run.count; n += kAhead) {
            const int64_t count = std::min(kAhead, run.count - n);
            // The values are needed when the scores are there, the next keys right after these.
            prefetch_rows(run.v, run.v_stride, p.width, n, n + count);
            prefetch_rows(run.k, run.k_stride, p.width, n + kAhead,
                          std::min(n + 2 * kAhead, run.count));
            product(Scalars<A>{run.k + n * run.k_stride, run.k_stride, 1}, transposed,
                    queries.padded, count, queries.padded, p.width,
                    scores + (run.first + n) * queries.padded, queries.padded, false);
        }
    }
    if (p.bias.data == nullptr) {
        return;
    }
    with_float_summed_in<A>(p.bias.type, [&]<typename T>(Type<T>) {
        for (int64_t m = 0; m < queries.count; ++m) {
            const T* bias =
                entry_of<T>(p.bias.data, bias_offset(p.bias, g, queries.first + m, tile.first));
            for (int64_t n = 0; n < tile.keys; ++n) {
                scores[n * queries.padded + m] += static_cast<A>(to_float(bias[n * p.bias.key]));
            }
        }
    });
}

// What exponents are taken relative to: zero where no key may be attended.
template <typename A>
PVF_INLINE Wide<A> finite_peak(Wide<A> peak) {
    return peak == -std::numeric_limits<A>::infinity() ? Wide<A>{} : peak;
}

// Scores become exp(score - peak), with a new peak; factor is what earlier sums shrink by.
template <typename A>
PVF_INLINE void exponentials(A* scores, int64_t keys, int64_t padded, A* peak, A* total,
                             A* factor) {
    for (int64_t m = 0; m < padded; m += kWide<A>) {
        const Wide<A> old = load_wide(peak + m);
        Wide<A> greatest = old;
        for (int64_t n = 0; n < keys; ++n) {
            const Wide<A> s = load_wide(scores + n * padded + m);
            greatest = (s > greatest) | (s != s) ? s : greatest;  // NaN wins, and stays
        }
        const Wide<A> from = finite_peak<A>(greatest);
        const Wide<A> shrink = exp_of(old - from);
        Wide<A> sums = load_wide(total + m) * shrink;
        for (int64_t n = 0; n < keys; ++n) {
            A* at = scores + n * padded + m;
            const Wide<A> e = exp_of(load_wide(at) - from);
            sums += e;
            store_unaligned(at, e);
        }
        store_unaligned(peak + m, greatest);
        store_unaligned(total + m, sums);
        store_unaligned(factor + m, shrink);
    }
}

template <typename A>
PVF_INLINE void scale_row(A* row, int64_t padded_width, A factor) {
    for (int64_t c = 0; c < padded_width; c += kWide<A>) {
        store_unaligned(row + c, load_wide(row + c) * factor);
    }
}

// One output row and its lse from the sum of weighted values.
template <typename A, typename T>
PVF_INLINE void finish_row(const AttentionParams& p, const AttentionGroup& g, int64_t query, A* sum,
                           A peak, A total) {
    // Nothing to attend to: a sum of nothing, and the logarithm of nothing.
    scale_row(sum, whole_vectors<A>(p.width), total == A(0) ? A(0) : A(1) / total);
    const A infinity = std::numeric_limits<A>::infinity();
    *entry_of<A>(p.lse, g.index * p.queries + query) = total == A(0)      ? -infinity
                                                       : peak == infinity ? infinity
                                                                          : peak + std::log(total);
    narrow_row(sum, p.width, entry_of<T>(p.o.data, row_offset(p.o, g, query)));
}

template <typename A, typename T>
static void attention_forward_of(const AttentionParams& p, int64_t begin, int64_t end) {
    const int64_t padded_width = whole_vectors<A>(p.width);
    Scratch<A> widened;
    const KeyReader<A, T> reader(p, widened);
    const int64_t row_values = kMostQueries * padded_width;
    const Scratch<A> scratch(3 * row_values + (kMostTileKeys + 3) * kMostQueries);
    A* const rows = scratch.data();
    A* const transposed = rows + row_values;
    A* const sums = transposed + row_values;
    A* const scores = sums + row_values;
    A* const peak = scores + kMostTileKeys * kMostQueries;
    A* const total = peak + kMostQueries;
    A* const factor = total + kMostQueries;
    KeyTile<A> tile;
    for (int64_t task = begin; task < end; ++task) {
        const AttentionGroup g = attention_group(p, task / p.splits);
        const int64_t first_key = task % p.splits * p.keys_per_split;
        for (int64_t first = 0; first < p.queries; first += kMostQueries) {
            const QueryTile queries = query_tile<A>(p, first);
            read_rows<A, T>(p, p.q, g, queries, static_cast<A>(p.scale), rows, transposed);
            std::fill_n(peak, queries.padded, -std::numeric_limits<A>::infinity());
            std::fill_n(total, queries.padded, A(0));
            bool begun = false;
            reader.tiles(g, first_key, first_key + p.keys_per_split, tile, [&](KeyTile<A>& keys) {
                score(p, g, queries, keys, transposed, scores);
                exponentials(scores, keys.keys, queries.padded, peak, total, factor);
                for (int64_t m = 0; begun && m < queries.count; ++m) {
                    if (factor[m] != A(1)) {
                        scale_row(sums + m * padded_width, padded_width, factor[m]);
                    }
                }
                for (int64_t r = 0; r < keys.run_count; ++r) {
                    const KeyRun<A>& run = keys.runs[r];
                    product(Scalars<A>{scores + run.first * queries.padded, 1, queries.padded},
                            run.v, run.v_stride, queries.count, padded_width, run.count, sums,
                            padded_width, begun);
                    begun = true;
                }
            });
            if (!begun) {
                std::fill_n(sums, queries.count * padded_width, A(0));
            }
            for (int64_t m = 0; m < queries.count; ++m) {
                A* sum = sums + m * padded_width;
                if (p.splits == 1) {
                    finish_row<A, T>(p, g, first + m, sum, peak[m], total[m]);
                    continue;
                }
                const int64_t at = task * p.queries + first + m;
                std::copy_n(sum, p.width, entry_of<A>(p.partial, at * p.width));
                *entry_of<A>(p.partial_peak, at) = peak[m];
                *entry_of<A>(p.partial_total, at) = total[m];
            }
        }
    }
}

template <typename A, typename T>
static void attention_combine_of(const AttentionParams& p, int64_t begin, int64_t end) {
    const int64_t padded_width = whole_vectors<A>(p.width);
    const Scratch<A> scratch(padded_width);
    A* const sum = scratch.data();
    for (int64_t group = begin; group < end; ++group) {
        const AttentionGroup g = attention_group(p, group);
        for (int64_t m = 0; m < p.queries; ++m) {
            const auto at = [&](int64_t split) {
                return (group * p.splits + split) * p.queries + m;
            };
            A peak = -std::numeric_limits<A>::infinity();
            for (int64_t s = 0; s < p.splits; ++s) {
                const A own = *entry_of<A>(p.partial_peak, at(s));
                peak = own > peak || own != own ? own : peak;
            }
            const A from = std::isinf(peak) && peak < A(0) ? A(0) : peak;
            A total = 0;
            std::fill_n(sum, padded_width, A(0));
            for (int64_t s = 0; s < p.splits; ++s) {
                const A* part = entry_of<A>(p.partial, at(s) * p.width);
                const A factor = std::exp(*entry_of<A>(p.partial_peak, at(s)) - from);
                total += factor * *entry_of<A>(p.partial_total, at(s));
                for (int64_t c = 0; c < p.width; ++c) {
                    sum[c] += factor * part[c];
                }
            }
            finish_row<A, T>(p, g, m, sum, peak, total);
        }
    }
}

template <typename A, typename T>
static void attention_prepare_of(const AttentionParams& p, int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
        const AttentionGroup g = attention_group(p, group);
        for (int64_t m = 0; m < p.queries; ++m) {
            const T* slope = entry_of<T>(p.d_o.data, row_offset(p.d_o, g, m));
            const T* out = entry_of<T>(p.o.data, row_offset(p.o, g, m));
            A sum = 0;
            for (int64_t c = 0; c < p.width; ++c) {
                sum += static_cast<A>(to_float(slope[c])) * static_cast<A>(to_float(out[c]));
            }
            const int64_t at = group * p.queries + m;
            *entry_of<A>(p.delta, at) = p.d_lse == nullptr ? sum : sum - *entry_of<A>(p.d_lse, at);
        }
    }
}

// The queries of a tile as the backward needs them, and what it makes of a tile of keys.
template <typename A>
class Slopes {
   public:
    explicit Slopes(const AttentionParams& p)
        : p_(p),
          padded_width_(whole_vectors<A>(p.width)),
          memory_(4 * kMostQueries * padded_width_ + 2 * (kMostTileKeys + 1) * kMostQueries) {
        const int64_t row_values = kMostQueries * padded_width_;
        rows = memory_.data();
        slope_rows = rows + row_values;
        transposed_ = slope_rows + row_values;
        slope_transposed_ = transposed_ + row_values;
        weights = slope_transposed_ + row_values;
        slopes = weights + kMostTileKeys * kMostQueries;
        lse_ = slopes + kMostTileKeys * kMostQueries;
        delta_ = lse_ + kMostQueries;
    }

    A* rows;        // [queries, width padded], scaled
    A* slope_rows;  // [queries, width padded] of o
    A* weights;     // [keys, queries padded]
    A* slopes;      // [keys, queries padded] of the scores

    template <typename T>
    __attribute__((always_inline)) void begin(const AttentionGroup& g, const QueryTile& queries) {
        read_rows<A, T>(p_, p_.q, g, queries, static_cast<A>(p_.scale), rows, transposed_);
        read_rows<A, T>(p_, p_.d_o, g, queries, A(1), slope_rows, slope_transposed_);
        const A infinity = std::numeric_limits<A>::infinity();
        for (int64_t m = 0; m < queries.padded; ++m) {
            const int64_t at = g.index * p_.queries + queries.first + m;
            const bool present = m < queries.count;
            const A lse = present ? *entry_of<A>(p_.lse, at) : infinity;
            lse_[m] = lse == -infinity ? A(0) : lse;
            delta_[m] = present ? *entry_of<A>(p_.delta, at) : A(0);
        }
    }

    // weights and slopes of a tile of keys, and d_bias.
    __attribute__((always_inline)) void of_tile(const AttentionGroup& g, const QueryTile& queries,
                                                const KeyTile<A>& tile) {
        score(p_, g, queries, tile, transposed_, weights);
        for (int64_t r = 0; r < tile.run_count; ++r) {
            const KeyRun<A>& run = tile.runs[r];
            product(Scalars<A>{run.v, run.v_stride, 1}, slope_transposed_, queries.padded,
                    run.count, queries.padded, p_.width, slopes + run.first * queries.padded,
                    queries.padded, false);
        }
        for (int64_t m = 0; m < queries.padded; m += kWide<A>) {
            const Wide<A> lse = load_wide(lse_ + m);
            const Wide<A> delta = load_wide(delta_ + m);
            for (int64_t n = 0; n < tile.keys; ++n) {
                const int64_t at = n * queries.padded + m;
                const Wide<A> weight = exp_of(load_wide(weights + at) - lse);
                store_unaligned(weights + at, weight);
                store_unaligned(slopes + at, weight * (load_wide(slopes + at) - delta));
            }
        }
        if (p_.d_bias == nullptr) {
            return;
        }
        const int64_t keys = p_.before + p_.grid[1];
        with_float_summed_in<A>(p_.bias.type, [&]<typename T>(Type<T>) {
            for (int64_t m = 0; m < queries.count; ++m) {
                T* to = entry_of<T>(p_.d_bias,
                                    (g.index * p_.queries + queries.first + m) * keys + tile.first);
                for (int64_t n = 0; n < tile.keys; ++n) {
                    to[n] =
                        from_float<T>(static_cast<Accumulate<T>>(slopes[n * queries.padded + m]));
                }
            }
        });
    }

    // d_k or d_v of a tile of keys, from the slopes or the weights; `add`: on top of what is there.
    __attribute__((always_inline)) void of_keys(const QueryTile& queries, const KeyTile<A>& tile,
                                                const A* factors, const A* of, A* to,
                                                int64_t stride, bool add) const {
        product(Scalars<A>{factors, queries.padded, 1}, of, padded_width_, tile.keys, padded_width_,
                queries.count, to, stride, add);
    }

    // Adds to d_q, still without the scale.
    __attribute__((always_inline)) void add_to_queries(const QueryTile& queries,
                                                       const KeyTile<A>& tile, A* d_q,
                                                       int64_t d_q_stride) const {
        for (int64_t r = 0; r < tile.run_count; ++r) {
            const KeyRun<A>& run = tile.runs[r];
            product(Scalars<A>{slopes + run.first * queries.padded, 1, queries.padded}, run.k,
                    run.k_stride, queries.count, padded_width_, run.count, d_q, d_q_stride, true);
        }
    }

   private:
    const AttentionParams& p_;
    int64_t padded_width_;
    Scratch<A> memory_;
    A* transposed_;
    A* slope_transposed_;
    A* lse_;
    A* delta_;
};

// Gradients of a tile's keys or values: where they belong, or in memory of their own until `write`.
template <typename A, typename T>
class KeySlopes {
   public:
    KeySlopes(const AttentionParams& p, A* memory)
        : width_(p.width), padded_width_(whole_vectors<A>(p.width)), memory_(memory) {}

    // `count` rows that start at `offset`, `stride` apart, in place if each is written as a whole.
    __attribute__((always_inline)) void begin(const AttentionRows& rows, int64_t offset,
                                              int64_t stride, int64_t count, bool whole) {
        if constexpr (std::is_same_v<A, T>) {
            direct_ = whole && padded_width_ == width_;
        }
        if (direct_) {
            to_ = entry_of<A>(rows.data, offset);
            stride_ = stride;
            return;
        }
        to_ = memory_;
        stride_ = padded_width_;
        if (!whole) {
            std::fill_n(to_, count * padded_width_, A(0));
        }
    }
    A* row(int64_t at) const { return to_ + at * stride_; }
    int64_t stride() const { return stride_; }

    // Row `at` to its place.
    __attribute__((always_inline)) void write(const AttentionRows& rows, int64_t offset,
                                              int64_t at) const {
        if (!direct_) {
            narrow_row(row(at), width_, entry_of<T>(rows.data, offset));
        }
    }

   private:
    int64_t width_;
    int64_t padded_width_;
    A* memory_;
    A* to_ = nullptr;
    int64_t stride_ = 0;
    bool direct_ = false;
};

// `kParts`: d_q goes to a part of each tile of keys, [groups, tiles of a group, queries, width].
template <typename A, typename T, bool kParts>
static void attention_key_slopes_of(const AttentionParams& p, int64_t begin, int64_t end) {
    const int64_t padded_width = whole_vectors<A>(p.width);
    const int64_t lines_down = tiles_along(p.grid[0], p.tile_lines);
    const int64_t columns_across = tiles_along(p.grid[1], p.tile_columns);
    const int64_t grid_tiles = attention_grid_tiles(p);
    const int64_t most = std::max(p.tile_lines * p.tile_columns, p.before) * padded_width;
    const Scratch<A> scratch(2 * most + kMostQueries * padded_width);
    KeySlopes<A, T> d_k(p, scratch.data());
    KeySlopes<A, T> d_v(p, scratch.data() + most);
    A* const d_q = scratch.data() + 2 * most;
    Scratch<A> widened;
    const KeyReader<A, T> reader(p, widened);
    Slopes<A> slopes(p);
    KeyTile<A> tile;
    // With one window the first queries reach each key, and what they give needs nothing under it.
    const bool whole = kParts && p.queries > 0;

    const auto begin_queries = [&](const AttentionGroup& g, const QueryTile& queries) {
        slopes.template begin<T>(g, queries);
        if constexpr (kParts) {
            std::fill_n(d_q, queries.count * padded_width, A(0));
        }
    };
    const auto take = [&](const AttentionGroup& g, const QueryTile& queries, int64_t at, bool add) {
        slopes.of_tile(g, queries, tile);
        slopes.of_keys(queries, tile, slopes.weights, slopes.slope_rows, d_v.row(at), d_v.stride(),
                       add);
        slopes.of_keys(queries, tile, slopes.slopes, slopes.rows, d_k.row(at), d_k.stride(), add);
        if constexpr (kParts) {
            slopes.add_to_queries(queries, tile, d_q, padded_width);
        }
    };
    const auto end_queries = [&](const AttentionGroup& g, const QueryTile& queries, int64_t part) {
        if constexpr (kParts) {
            for (int64_t m = 0; m < queries.count; ++m) {
                const int64_t at = (g.index * p.splits + part) * p.queries + queries.first + m;
                std::copy_n(d_q + m * padded_width, p.width, entry_of<A>(p.partial, at * p.width));
            }
        }
    };

    for (int64_t task = begin; task < end; ++task) {
        if (task >= grid_tiles) {
            const AttentionGroup g = attention_group(p, task - grid_tiles);
            const bool all = p.queries > 0;
            d_k.begin(p.d_k_before, row_offset(p.d_k_before, g, 0), p.d_k_before.row, p.before,
                      all);
            d_v.begin(p.d_v_before, row_offset(p.d_v_before, g, 0), p.d_v_before.row, p.before,
                      all);
            for (int64_t first = 0; first < p.queries; first += kMostQueries) {
                const QueryTile queries = query_tile<A>(p, first);
                begin_queries(g, queries);
                reader.tiles(g, 0, p.before, tile,
                             [&](KeyTile<A>& keys) { take(g, queries, keys.first, first > 0); });
                end_queries(g, queries, p.splits - 1);
            }
            for (int64_t n = 0; n < p.before; ++n) {
                d_k.write(p.d_k_before, row_offset(p.d_k_before, g, n), n);
                d_v.write(p.d_v_before, row_offset(p.d_v_before, g, n), n);
            }
            continue;
        }
        const int64_t part = task % columns_across;
        const int64_t entry = task / columns_across / lines_down / p.heads;
        const int64_t head = task / columns_across / lines_down % p.heads;
        const int64_t line0 = task / columns_across % lines_down * p.tile_lines;
        const int64_t column0 = part * p.tile_columns;
        const int64_t lines = std::min(p.tile_lines, p.grid[0] - line0);
        const int64_t columns = std::min(p.tile_columns, p.grid[1] - column0);
        const auto place = [&](const AttentionRows& rows, int64_t line, int64_t column) {
            return key_offset(rows, entry, head, line0 + line, column0 + column);
        };
        d_k.begin(p.d_k, place(p.d_k, 0, 0), p.d_k.column, lines * columns, whole);
        d_v.begin(p.d_v, place(p.d_v, 0, 0), p.d_v.column, lines * columns, whole);
        const Span down = windows_of_keys(p, 0, line0, lines);
        const Span across = windows_of_keys(p, 1, column0, columns);
        for (int64_t window = 0; window < down.count * across.count; ++window) {
            const int64_t y = down.first + window / across.count;
            const int64_t x = across.first + window % across.count;
            const AttentionGroup g{((entry * p.windows[0] + y) * p.windows[1] + x) * p.heads + head,
                                   entry, y, x, head};
            const Span read_lines = keys_of_window(p, 0, y);
            const Span read_columns = keys_of_window(p, 1, x);
            const Span within_lines = span_within(
                read_lines.first, read_lines.first + read_lines.count, line0, line0 + lines);
            const Span within =
                span_within(read_columns.first, read_columns.first + read_columns.count, column0,
                            column0 + columns);
            for (int64_t first = 0; first < p.queries; first += kMostQueries) {
                const QueryTile queries = query_tile<A>(p, first);
                begin_queries(g, queries);
                for (int64_t l = 0; l < within_lines.count; ++l) {
                    const int64_t line = within_lines.first + l;
                    for (int64_t n = 0; n < within.count; n += kMostTileKeys) {
                        const int64_t column = within.first + n;
                        reader.clear(tile, p.before +
                                               (line - read_lines.first) * read_columns.count +
                                               column - read_columns.first);
                        reader.add_line(tile, entry, head, line, column,
                                        std::min<int64_t>(kMostTileKeys, within.count - n));
                        take(g, queries, (line - line0) * columns + column - column0,
                             !whole || first > 0);
                    }
                }
                end_queries(g, queries, part);
            }
        }
        for (int64_t n = 0; n < lines * columns; ++n) {
            d_k.write(p.d_k, place(p.d_k, n / columns, n % columns), n);
            d_v.write(p.d_v, place(p.d_v, n / columns, n % columns), n);
        }
    }
}

template <typename A, typename T, bool kParts>
static void attention_query_slopes_of(const AttentionParams& p, int64_t begin, int64_t end) {
    const int64_t padded_width = whole_vectors<A>(p.width);
    const Scratch<A> scratch(kMostQueries * padded_width);
    A* const d_q = scratch.data();
    const auto write = [&](const AttentionGroup& g, int64_t query, A* row) {
        scale_row(row, padded_width, static_cast<A>(p.scale));
        narrow_row(row, p.width, entry_of<T>(p.d_q.data, row_offset(p.d_q, g, query)));
    };
    if constexpr (kParts) {
        for (int64_t group = begin; group < end; ++group) {
            const AttentionGroup g = attention_group(p, group);
            for (int64_t m = 0; m < p.queries; ++m) {
                std::fill_n(d_q, padded_width, A(0));
                for (int64_t s = 0; s < p.splits; ++s) {
                    const A* part =
                        entry_of<A>(p.partial, ((group * p.splits + s) * p.queries + m) * p.width);
                    for (int64_t c = 0; c < p.width; ++c) {
                        d_q[c] += part[c];
                    }
                }
                write(g, m, d_q);
            }
        }
        return;
    }
    Scratch<A> widened;
    const KeyReader<A, T> reader(p, widened);
    Slopes<A> slopes(p);
    KeyTile<A> tile;
    for (int64_t group = begin; group < end; ++group) {
        const AttentionGroup g = attention_group(p, group);
        for (int64_t first = 0; first < p.queries; first += kMostQueries) {
            const QueryTile queries = query_tile<A>(p, first);
            slopes.template begin<T>(g, queries);
            std::fill_n(d_q, queries.count * padded_width, A(0));
            reader.tiles(g, 0, most_keys(p), tile, [&](KeyTile<A>& keys) {
                slopes.of_tile(g, queries, keys);
                slopes.add_to_queries(queries, keys, d_q, padded_width);
            });
            for (int64_t m = 0; m < queries.count; ++m) {
                write(g, first + m, d_q + m * padded_width);
            }
        }
    }
}

// Calls f<A, T>() for the rows' dtype T and the type A of its sums.
template <typename F>
static void with_attention_types(const AttentionParams& p, const F& f) {
    with_float(p.type, [&]<typename T>(Type<T>) { f.template operator()<Accumulate<T>, T>(); });
}

#define PVF_ATTENTION_CPU(name, ...)                                               \
    static void name(const AttentionParams& p, int64_t begin, int64_t end) {       \
        with_attention_types(p, [&]<typename A, typename T>() {                    \
            attention_##name##_of<A, T __VA_OPT__(, ) __VA_ARGS__>(p, begin, end); \
        });                                                                        \
    }

}  // namespace pyvitfast::PVF_CPU_CAPABILITY
