#include <algorithm>

#include "cpu_matmul.h"
#include "cpu_rows.h"
#include "cpu_strided_product.h"
#include "ops/semantic_pool_attention/semantic_pool_attention.h"
#include "ops/semantic_pool_attention/semantic_pool_attention_math.h"

namespace pyvitfast::PVF_CPU_CAPABILITY {

// Rows of hats that are worked on at a time, with all queries.
constexpr int64_t kTileRows = 64;

template <typename A>
static void fold_of(const SemanticPoolParams& p, int64_t begin, int64_t end) {
    const int64_t c = p.channels;
    const A* gamma = part<A>(p.gamma, 0);
    const A* beta = part<A>(p.beta, 0);
    const A* bias = part<A>(p.v_bias, 0);
    for (int64_t row = begin; row < end; ++row) {
        const A* k = part<A>(p.k_weight, row * c);
        const A* v = part<A>(p.v_weight, row * c);
        A* k_folded = part<A>(p.k_folded, row * c);
        for (int64_t i = 0; i < c; ++i) {
            const A scaled = k[i] * static_cast<A>(p.scale);
            k_folded[i] = gamma == nullptr ? scaled : scaled * gamma[i];
        }
        if (gamma != nullptr) {
            A* v_folded = part<A>(p.v_folded, row * c);
            for (int64_t i = 0; i < c; ++i) {
                v_folded[i] = v[i] * gamma[i];
            }
        }
        *part<A>(p.v_bias_folded, row) =
            (bias == nullptr ? A(0) : bias[row]) + (beta == nullptr ? A(0) : dot_of(v, beta, c));
    }
}

// The hat of a query, in `to`; where there is LayerNorm its inverse deviation is returned.
template <typename A>
PVF_INLINE A query_hat(const SemanticPoolParams& p, int64_t row, A* to) {
    const A* from = part<A>(p.query, row * p.channels);
    if (!p.norm) {
        std::copy(from, from + p.channels, to);
        return A(1);
    }
    const Moments<A> moments = moments_of(from, p.channels, p.eps);
    normalize_row(from, p.channels, moments, to);
    return moments.rstd;
}

template <typename A>
static void prepare_of(const SemanticPoolParams& p, int64_t begin, int64_t end) {
    const int64_t c = p.channels;
    const A* gamma = part<A>(p.gamma, 0);
    const A* beta = part<A>(p.beta, 0);
    const auto start = [&](void* rows, int64_t row, const void* bias) {
        A* to = part<A>(rows, row * c);
        const A* from = part<A>(bias, 0);
        for (int64_t i = 0; to != nullptr && i < c; ++i) {
            to[i] = from == nullptr ? A(0) : from[i];
        }
    };
    for (int64_t row = begin; row < end; ++row) {
        A* normal = part<A>(p.query_norm, row * c);
        query_hat(p, row, normal);
        for (int64_t i = 0; gamma != nullptr && i < c; ++i) {
            normal[i] = normal[i] * gamma[i] + (beta == nullptr ? A(0) : beta[i]);
        }
        start(p.q, row, p.q_bias);
        start(p.mixed, row, p.v_bias_folded);
        start(p.out, row, p.proj_bias);
    }
}

struct PoolSplit {
    int64_t image;
    int64_t first;
    int64_t last;  // past the last row
};

PVF_INLINE PoolSplit split_of(const SemanticPoolParams& p, int64_t task) {
    const int64_t first = task % p.splits * p.rows_per_split;
    return {task / p.splits, first, std::min(first + p.rows_per_split, rows_of_image(p))};
}

// Rows of a split that are taken at a time: nearly equal parts.
PVF_INLINE int64_t tile_rows(const SemanticPoolParams& p) {
    const int64_t tiles = (p.rows_per_split + kTileRows - 1) / kTileRows;
    return (p.rows_per_split + tiles - 1) / tiles;
}

// Asks for rows [first, first + count) of an image while something else is computed. Rows on both
// sides of a border between `before` and `tokens` are not worth it.
PVF_INLINE void cover_rows(const SemanticPoolParams& p, int64_t image, int64_t first, int64_t count,
                           Stream& stream) {
    const TokenPlace place = place_in(p.before, p.tokens, first);
    with_float(place.rows->type, [&]<typename T>(Type<T>) {
        const T* from = static_cast<const T*>(place.rows->data) + image * place.rows->batch +
                        place.at * place.rows->row;
        const int64_t present = std::min(count, place.rows->count - place.at);
        stream.cover(from, from + (present - 1) * place.rows->row + p.channels);
    });
}

// The rows that the task takes up after tile [first, first + count): those of its next tile or of
// the next split.
PVF_INLINE void cover_next(const SemanticPoolParams& p, const PoolSplit& split, int64_t first,
                           int64_t count, Stream& stream) {
    const int64_t next = first + count;
    if (next < rows_of_image(p)) {
        cover_rows(p, split.image, next, std::min(count, rows_of_image(p) - next), stream);
    } else if (split.image + 1 < p.batch) {
        cover_rows(p, split.image + 1, 0, std::min(count, rows_of_image(p)), stream);
    } else {
        cover_rows(p, split.image, first, 1, stream);
    }
}

// Hats of rows [first, first + count) of an image. kKnown: their moments are read, else written.
template <typename A, bool kKnown>
PVF_INLINE void load_hats(const SemanticPoolParams& p, int64_t image, int64_t first, int64_t count,
                          A* hats) {
    const int64_t c = p.channels;
    for (int64_t n = 0; n < count; ++n) {
        const TokenPlace place = place_in(p.before, p.tokens, first + n);
        A* to = hats + n * c;
        const A* row = to;
        with_float_summed_in<A>(place.rows->type, [&]<typename T>(Type<T>) {
            const T* from = static_cast<const T*>(place.rows->data) + image * place.rows->batch +
                            place.at * place.rows->row;
            if constexpr (std::is_same_v<T, A>) {
                row = from;
            } else {
                widen_row(from, c, to);
            }
        });
        if (!p.norm) {
            if (row != to) {
                std::copy(row, row + c, to);
            }
            continue;
        }
        const int64_t at = image * rows_of_image(p) + first + n;
        hat_of<kKnown>(row, c, p.eps, part<A>(p.mean, at), part<A>(p.rstd, at), to);
    }
}

template <typename A>
PVF_INLINE int64_t padded_queries(const SemanticPoolParams& p) {
    const int64_t rows = p.heads * p.queries;
    return (rows + kPanelCols<A> - 1) / kPanelCols<A> * kPanelCols<A>;
}

// Rows [R, C] side by side in panels of kPanelCols, each [C, kPanelCols].
template <typename A>
PVF_INLINE void pack_queries(const SemanticPoolParams& p, const A* from, const int64_t* depths,
                             A* to) {
    const int64_t rows = p.heads * p.queries;
    for (int64_t row = 0; row < rows; row += kPanelCols<A>) {
        int64_t at[kPanelCols<A>];
        const int count = static_cast<int>(std::min<int64_t>(kPanelCols<A>, rows - row));
        for (int r = 0; r < count; ++r) {
            at[r] = (row + r) * p.channels;
        }
        pack<kPanelCols<A>>(from, at, count, depths, p.channels, to + row * p.channels);
    }
}

// out[n][r] = hat n . query r for packed queries.
template <typename A>
PVF_INLINE void dot_hats(const SemanticPoolParams& p, const A* hats, int64_t count, const A* packed,
                         A* out, int64_t out_stride, Stream& stream) {
    const Scalars<A> left{hats, p.channels, 1};
    for (int64_t row = 0; row < padded_queries<A>(p); row += kPanelCols<A>) {
        outer_column<A, kTallVectors, kTallRows>(left, packed + row * p.channels, kPanelCols<A>,
                                                 count, p.channels, out + row, out_stride, false,
                                                 stream);
    }
}

// Peaks and sums of each query so far, and by what its sums so far shrink.
template <typename A>
struct Running {
    A* peak;
    A* total;
    A* factor;
};

// scores[n][r] become exp(score - peak) for the peak so far.
template <typename A>
PVF_INLINE void exponentials(A* scores, int64_t count, int64_t columns, bool first,
                             const Running<A>& running) {
    for (int64_t r = 0; r < columns; r += kWide<A>) {
        const Wide<A> before = first ? load_wide(scores + r) : load_wide(running.peak + r);
        Wide<A> peak = before;
        for (int64_t n = 0; n < count; ++n) {
            const Wide<A> values = load_wide(scores + n * columns + r);
            peak = values > peak ? values : peak;
        }
        const Wide<A> factor = first ? Wide<A>{} : exp_of(before - peak);
        Wide<A> total = first ? Wide<A>{} : load_wide(running.total + r) * factor;
        for (int64_t n = 0; n < count; ++n) {
            const Wide<A> values = exp_of(load_wide(scores + n * columns + r) - peak);
            store_unaligned(scores + n * columns + r, values);
            total += values;
        }
        store_unaligned(running.peak + r, peak);
        store_unaligned(running.total + r, total);
        store_unaligned(running.factor + r, factor);
    }
}

template <typename A>
PVF_INLINE void scale_values(A* values, int64_t count, A factor) {
    for (int64_t i = 0; i < count; ++i) {
        values[i] *= factor;
    }
}

PVF_INLINE void count_up(int64_t* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        to[i] = i;
    }
}

template <typename A>
static void attend_of(const SemanticPoolParams& p, int64_t begin, int64_t end) {
    const int64_t c = p.channels;
    const int64_t rows = p.heads * p.queries;
    const int64_t wide = padded_queries<A>(p);
    const int64_t tile = tile_rows(p);
    const Scratch<A> scratch(wide * c + tile * wide + 3 * wide + tile * c);
    const Scratch<int64_t> places(c);
    count_up(places.data(), c);
    A* const packed = scratch.data();
    A* const scores = packed + wide * c;
    const Running<A> running{scores + tile * wide, scores + (tile + 1) * wide,
                             scores + (tile + 2) * wide};
    A* const hats = running.factor + wide;
    const bool alone = p.splits == 1;
    Stream stream;
    for (int64_t task = begin; task < end; ++task) {
        const PoolSplit split = split_of(p, task);
        pack_queries(p, part<A>(p.u, split.image * rows * c), places.data(), packed);
        A* const sums = part<A>(alone ? p.context : p.partial, task * rows * c);
        for (int64_t first = split.first; first < split.last; first += tile) {
            const int64_t count = std::min(tile, split.last - first);
            load_hats<A, false>(p, split.image, first, count, hats);
            cover_next(p, split, first, count, stream);
            dot_hats(p, hats, count, packed, scores, wide, stream);
            const bool fresh = first == split.first;
            exponentials(scores, count, wide, fresh, running);
            for (int64_t r = 0; !fresh && r < rows; ++r) {
                if (running.factor[r] != A(1)) {
                    scale_values(sums + r * c, c, running.factor[r]);
                }
            }
            outer(Scalars<A>{scores, 1, wide}, hats, c, rows, c, count, sums, c, !fresh, stream);
        }
        for (int64_t r = 0; alone && r < rows; ++r) {
            scale_values(sums + r * c, c, A(1) / running.total[r]);
        }
        std::copy(running.peak, running.peak + rows,
                  part<A>(alone ? p.peak : p.partial_peak, task * rows));
        std::copy(running.total, running.total + rows,
                  part<A>(alone ? p.total : p.partial_total, task * rows));
    }
}

template <typename A>
static void combine_of(const SemanticPoolParams& p, int64_t begin, int64_t end) {
    const int64_t c = p.channels;
    const int64_t rows = p.heads * p.queries;
    for (int64_t row = begin; row < end; ++row) {
        const auto at = [&](int64_t split) {
            return (row / rows * p.splits + split) * rows + row % rows;
        };
        A peak = *part<A>(p.partial_peak, at(0));
        for (int64_t s = 1; s < p.splits; ++s) {
            peak = std::max(peak, *part<A>(p.partial_peak, at(s)));
        }
        A total = 0;
        A* to = part<A>(p.context, row * c);
        for (int64_t s = 0; s < p.splits; ++s) {
            const A* from = part<A>(p.partial, at(s) * c);
            const A factor = std::exp(*part<A>(p.partial_peak, at(s)) - peak);
            total += factor * *part<A>(p.partial_total, at(s));
            for (int64_t i = 0; i < c; ++i) {
                to[i] = s == 0 ? factor * from[i] : to[i] + factor * from[i];
            }
        }
        scale_values(to, c, A(1) / total);
        *part<A>(p.peak, row) = peak;
        *part<A>(p.total, row) = total;
    }
}

template <typename A>
static void attend_backward_of(const SemanticPoolParams& p, int64_t begin, int64_t end) {
    const int64_t c = p.channels;
    const int64_t rows = p.heads * p.queries;
    const int64_t wide = padded_queries<A>(p);
    const int64_t tile = tile_rows(p);
    const Scratch<A> scratch(2 * wide * c + 2 * tile * wide + 3 * wide + 2 * tile * c);
    const Scratch<int64_t> places(c);
    count_up(places.data(), c);
    A* const packed_u = scratch.data();
    A* const packed_slopes = packed_u + wide * c;
    A* const probabilities = packed_slopes + wide * c;
    A* const slopes = probabilities + tile * wide;
    A* const peak = slopes + tile * wide;
    A* const share = peak + wide;
    A* const delta = share + wide;
    A* const hats = delta + wide;
    A* const d_hats = hats + tile * c;
    Stream stream;
    for (int64_t task = begin; task < end; ++task) {
        const PoolSplit split = split_of(p, task);
        const int64_t base = split.image * rows;
        const A* u = part<A>(p.u, base * c);
        const A* d_context = part<A>(p.d_context, base * c);
        pack_queries(p, u, places.data(), packed_u);
        pack_queries(p, d_context, places.data(), packed_slopes);
        std::fill(peak, peak + 3 * wide, A(0));
        for (int64_t r = 0; r < rows; ++r) {
            peak[r] = *part<A>(p.peak, base + r);
            share[r] = A(1) / *part<A>(p.total, base + r);
            delta[r] = dot_of(d_context + r * c, part<A>(p.context, (base + r) * c), c);
        }
        A* const d_u = part<A>(p.splits == 1 ? p.d_u : p.partial, task * rows * c);
        for (int64_t first = split.first; first < split.last; first += tile) {
            const int64_t count = std::min(tile, split.last - first);
            load_hats<A, true>(p, split.image, first, count, hats);
            cover_next(p, split, first, count, stream);
            dot_hats(p, hats, count, packed_u, probabilities, wide, stream);
            dot_hats(p, hats, count, packed_slopes, slopes, wide, stream);
            for (int64_t n = 0; n < count; ++n) {
                A* own = probabilities + n * wide;
                A* slope = slopes + n * wide;
                for (int64_t r = 0; r < wide; r += kWide<A>) {
                    const Wide<A> a =
                        exp_of(load_wide(own + r) - load_wide(peak + r)) * load_wide(share + r);
                    store_unaligned(own + r, a);
                    store_unaligned(slope + r, a * (load_wide(slope + r) - load_wide(delta + r)));
                }
            }
            outer(Scalars<A>{slopes, 1, wide}, hats, c, rows, c, count, d_u, c,
                  first != split.first, stream);
            outer(Scalars<A>{probabilities, wide, 1}, d_context, c, count, c, rows, d_hats, c,
                  false, stream);
            outer(Scalars<A>{slopes, wide, 1}, u, c, count, c, rows, d_hats, c, true, stream);
            for (int64_t n = 0; n < count; ++n) {
                A* slope = d_hats + n * c;
                if (p.norm) {
                    const A rstd = *part<A>(p.rstd, split.image * rows_of_image(p) + first + n);
                    norm_backward(slope, hats + n * c, rstd, c);
                }
                const TokenPlace place = place_in(p.d_before, p.d_tokens, first + n);
                with_float_summed_in<A>(place.rows->type, [&]<typename T>(Type<T>) {
                    narrow_row(slope, c,
                               static_cast<T*>(place.rows->data) + split.image * place.rows->batch +
                                   place.at * place.rows->row);
                });
            }
        }
    }
}

template <typename A>
static void combine_backward_of(const SemanticPoolParams& p, int64_t begin, int64_t end) {
    const int64_t c = p.channels;
    const int64_t rows = p.heads * p.queries;
    for (int64_t row = begin; row < end; ++row) {
        A* to = part<A>(p.d_u, row * c);
        for (int64_t s = 0; s < p.splits; ++s) {
            const A* from =
                part<A>(p.partial, ((row / rows * p.splits + s) * rows + row % rows) * c);
            for (int64_t i = 0; i < c; ++i) {
                to[i] = s == 0 ? from[i] : to[i] + from[i];
            }
        }
    }
}

template <typename A>
static void finish_of(const SemanticPoolParams& p, int64_t begin, int64_t end) {
    const int64_t c = p.channels;
    const A* gamma = part<A>(p.gamma, 0);
    for (int64_t row = begin; row < end; ++row) {
        const A* upstream = part<A>(p.d_query_norm, row * c);
        A* slope = part<A>(p.d_query, row * c);
        if (!p.norm) {
            std::copy(upstream, upstream + c, slope);
            continue;
        }
        A* hat = part<A>(p.query_norm, row * c);
        const A rstd = query_hat(p, row, hat);
        for (int64_t i = 0; i < c; ++i) {
            slope[i] = gamma == nullptr ? upstream[i] : upstream[i] * gamma[i];
        }
        norm_backward(slope, hat, rstd, c);
        for (int64_t i = 0; i < c; ++i) {
            hat[i] *= upstream[i];
        }
    }
}

template <typename A>
static void unfold_of(const SemanticPoolParams& p, int64_t begin, int64_t end) {
    const int64_t c = p.channels;
    const A scale = static_cast<A>(p.scale);
    const A* gamma = part<A>(p.gamma, 0);
    const A* beta = part<A>(p.beta, 0);
    A* d_gamma = part<A>(p.d_gamma, 0);
    A* d_beta = part<A>(p.d_beta, 0);
    if (d_gamma != nullptr) {
        std::fill(d_gamma + begin, d_gamma + end, A(0));
        std::fill(d_beta + begin, d_beta + end, A(0));
        for (int64_t row = 0; row < p.batch * p.queries; ++row) {
            const A* product = part<A>(p.query_norm, row * c);
            const A* slope = part<A>(p.d_query_norm, row * c);
            for (int64_t i = begin; i < end; ++i) {
                d_gamma[i] += product[i];
                d_beta[i] += slope[i];
            }
        }
    }
    for (int64_t row = 0; row < c; ++row) {
        A* d_k = part<A>(p.d_k_weight, row * c);
        for (int64_t i = begin; i < end; ++i) {
            d_k[i] *= scale;
        }
        if (d_gamma == nullptr) {
            continue;
        }
        const A* k = part<A>(p.k_weight, row * c);
        const A* v = part<A>(p.v_weight, row * c);
        A* d_v = part<A>(p.d_v_weight, row * c);
        const A d_bias = *part<A>(p.d_v_bias, row);
        for (int64_t i = begin; i < end; ++i) {
            d_gamma[i] += k[i] * d_k[i] + v[i] * d_v[i];
            d_beta[i] += d_bias * v[i];
            d_k[i] *= gamma[i];
            d_v[i] = d_v[i] * gamma[i] + (beta == nullptr ? A(0) : d_bias * beta[i]);
        }
    }
}

#define PVF_FLOAT_OR_DOUBLE(name)                                                          \
    static void name(const SemanticPoolParams& p, bool wide, int64_t begin, int64_t end) { \
        wide ? name##_of<double>(p, begin, end) : name##_of<float>(p, begin, end);         \
    }
PVF_FLOAT_OR_DOUBLE(fold)
PVF_FLOAT_OR_DOUBLE(prepare)
PVF_FLOAT_OR_DOUBLE(attend)
PVF_FLOAT_OR_DOUBLE(combine)
PVF_FLOAT_OR_DOUBLE(attend_backward)
PVF_FLOAT_OR_DOUBLE(combine_backward)
PVF_FLOAT_OR_DOUBLE(finish)
PVF_FLOAT_OR_DOUBLE(unfold)

extern const SemanticPoolCpu semantic_pool_attention_cpu;
const SemanticPoolCpu semantic_pool_attention_cpu{
    {strided_product_part}, fold,   prepare, attend, combine, attend_backward,
    combine_backward,       finish, unfold};

}  // namespace pyvitfast::PVF_CPU_CAPABILITY
