#include <algorithm>

#include "cpu_matmul.h"
#include "cpu_rows.h"
#include "ops/linear_cross_attention/linear_cross_attention.h"
#include "ops/linear_cross_attention/linear_cross_attention_math.h"

namespace pyvitfast::PVF_CPU_CAPABILITY {

template <typename T>
PVF_INLINE const T* address(const MatrixView& view, int64_t batch, int64_t row, int64_t col) {
    return static_cast<const T*>(view.data) + batch * view.batch + row * view.row + col * view.col;
}

template <typename T>
PVF_INLINE T* target(const MatrixView& view, int64_t batch, int64_t row, int64_t col) {
    return const_cast<T*>(address<T>(view, batch, row, col));
}

// `count` values of a row as A: where they are, or in `buffer`.
template <typename A>
PVF_INLINE const A* row_of(const MatrixView& view, int64_t batch, int64_t row, int64_t col,
                           int64_t count, A* buffer) {
    const A* found = buffer;
    with_float_summed_in<A>(view.type, [&]<typename T>(Type<T>) {
        const T* from = address<T>(view, batch, row, col);
        if constexpr (std::is_same_v<T, A>) {
            found = from;
        } else {
            widen_row(from, count, buffer);
        }
    });
    return found;
}

template <typename A>
PVF_INLINE bool holds(const MatrixView& view) {
    return view.type == (sizeof(A) == 8 ? FloatType::kFloat64 : FloatType::kFloat32);
}

// One tile of a product into `tile`.
template <typename A>
static void multiply_tile(const Product& p, int64_t entry, int64_t row0, int64_t rows, int64_t col0,
                          int64_t cols, A* tile, int64_t tile_stride, Scratch<A>& memory,
                          Stream& stream) {
    static constexpr A kOne = 1;
    const Scalars<A> left = p.left.data == nullptr ? Scalars<A>{&kOne, 0, 0}
                                                   : Scalars<A>{address<A>(p.left, entry, row0, 0),
                                                                p.left.row, p.left.col};
    if (p.right.col == 1) {
        const A* right = nullptr;
        int64_t stride = tile_stride;
        if (holds<A>(p.right) && cols % kWide<A> == 0) {
            right = address<A>(p.right, entry, 0, col0);
            stride = p.right.row;
            stream.cover(address<A>(p.right, entry, 0, 0),
                         address<A>(p.right, p.batch - 1, p.k, 0));
        } else {
            A* const widened = memory.reserve(p.k * tile_stride);
            right = widened;
            for (int64_t k = 0; k < p.k; ++k) {
                A* to = widened + k * tile_stride;
                const A* from = row_of<A>(p.right, entry, k, col0, cols, to);
                for (int64_t i = 0; from != to && i < cols; ++i) {
                    to[i] = from[i];
                }
                for (int64_t i = cols; i < tile_stride; ++i) {
                    to[i] = A(0);
                }
            }
            cols = (cols + kWide<A> - 1) / kWide<A> * kWide<A>;
        }
        outer(left, right, stride, rows, cols, p.k, tile, tile_stride, false, stream);
        return;
    }
    for (int64_t col = 0; col < cols; col += kWide<A>) {
        const int64_t count = std::min<int64_t>(kWide<A>, cols - col);
        const A* weights = nullptr;
        int64_t stride = p.k;
        if (holds<A>(p.right)) {
            weights = address<A>(p.right, entry, 0, col0 + col);
            stride = p.right.col;
            stream.cover(weights, address<A>(p.right, p.batch - 1, 0, p.n));
        } else {
            A* const widened = memory.reserve(kWide<A> * p.k);
            weights = widened;
            for (int64_t i = 0; i < count; ++i) {
                row_of<A>(p.right, entry, 0, col0 + col + i, p.k, widened + i * p.k);
            }
        }
        dot(weights, stride, count, left.data, left.row, rows, p.k, tile + col, tile_stride,
            stream);
    }
}

template <typename A>
static void products_of(const ProductTable& table, int64_t begin, int64_t end) {
    constexpr int64_t kMostCols = kCpuProductTileSize / 4;
    Scratch<A> memory;
    alignas(64) A tile[kCpuProductTileSize];
    A bias_buffer[kMostCols];
    Stream stream;
    for (int64_t task = begin; task < end; ++task) {
        int which = table.count - 1;
        while (table.products[which].tile_begin > task) {
            --which;
        }
        const Product& p = table.products[which];
        const CpuProductTile size = cpu_product_tile(p);
        const int64_t local = task - p.tile_begin;
        const int64_t col_tiles = (p.n + size.cols - 1) / size.cols;
        const int64_t row_tiles = (p.m + size.rows - 1) / size.rows;
        const int64_t col0 = local % col_tiles * size.cols;
        const int64_t row0 = local / col_tiles % row_tiles * size.rows;
        const int64_t entry = local / col_tiles / row_tiles;
        const int64_t rows = std::min(size.rows, p.m - row0);
        const int64_t cols = std::min(size.cols, p.n - col0);
        multiply_tile<A>(p, entry, row0, rows, col0, cols, tile, size.cols, memory, stream);
        const A alpha = static_cast<A>(p.alpha);
        const A* bias =
            p.bias.data == nullptr ? nullptr : row_of<A>(p.bias, entry, 0, col0, cols, bias_buffer);
        for (int64_t row = 0; row < rows; ++row) {
            A* values = tile + row * size.cols;
            for (int64_t col = 0; col < cols; ++col) {
                values[col] = values[col] * alpha + (bias == nullptr ? A(0) : bias[col]);
            }
            with_float_summed_in<A>(p.out.type, [&]<typename T>(Type<T>) {
                narrow_row(values, cols, target<T>(p.out, entry, row0 + row, col0));
            });
        }
    }
}

// to = gamma * from, or gamma * from + beta; null views count as ones and zeros.
template <typename A>
PVF_INLINE void scale_row(const A* from, const A* gamma, const A* beta, int64_t count, A* to) {
    for (int64_t i = 0; i < count; ++i) {
        const A scaled = gamma == nullptr ? from[i] : from[i] * gamma[i];
        to[i] = beta == nullptr ? scaled : scaled + beta[i];
    }
}

// gamma and beta as A, in a buffer of two rows where they are of another type.
template <typename A>
struct Affine {
    const A* gamma = nullptr;
    const A* beta = nullptr;

    __attribute__((always_inline)) Affine(const CrossAttentionParams& p, A* buffer) {
        if (p.gamma.data != nullptr) {
            gamma = row_of<A>(p.gamma, 0, 0, 0, p.channels, buffer);
        }
        if (p.beta.data != nullptr) {
            beta = row_of<A>(p.beta, 0, 0, 0, p.channels, buffer + p.channels);
        }
    }
};

template <typename A>
static void normalize_query_of(const CrossAttentionParams& p, int64_t begin, int64_t end) {
    const int64_t c = p.channels;
    const Scratch<A> scratch(3 * c);
    const Affine<A> affine(p, scratch.data());
    for (int64_t b = begin; b < end; ++b) {
        A* hat = part<A>(p.query_hat, b * c);
        const A* row = row_of<A>(p.query, 0, b, 0, c, scratch.data() + 2 * c);
        if (!p.norm) {
            std::copy(row, row + c, hat);
            continue;
        }
        const Moments<A> moments = moments_of(row, c, p.eps);
        normalize_row(row, c, moments, hat);
        scale_row(hat, affine.gamma, affine.beta, c, part<A>(p.query_norm, b * c));
        if (p.rstd != nullptr) {
            *part<A>(p.rstd, b * (1 + p.tokens)) = moments.rstd;
        }
    }
}

struct Split {
    int64_t image;
    int64_t first;    // token
    int64_t count;    // of tokens
    int64_t queries;  // rows before the tokens: 1 in an image's first split, else 0
};

PVF_INLINE Split split_of(const CrossAttentionParams& p, int64_t task) {
    const int64_t image = task / p.splits;
    const int64_t first = task % p.splits * p.tokens_per_split;
    return {image, first, std::min(p.tokens_per_split, p.tokens - first),
            task % p.splits == 0 ? 1 : 0};
}

// The tokens of a split as rows of A: where they are, or normalised and widened in memory of their
// own, which `fill` does for a few of them when they are needed.
template <typename A, bool kKnownMoments>
class Rows {
   public:
    __attribute__((always_inline)) Rows(const CrossAttentionParams& p, const Split& split,
                                        Scratch<A>& memory)
        : p_(p), split_(split), direct_(!p.norm && holds<A>(p.token)) {
        copy_ = direct_ ? nullptr : memory.reserve(p.tokens_per_split * p.channels);
    }
    const A* row(int64_t n) const {
        return direct_ ? address<A>(p_.token, split_.image, split_.first + n, 0)
                       : copy_ + n * p_.channels;
    }
    int64_t stride() const { return direct_ ? p_.token.row : p_.channels; }

    __attribute__((always_inline)) void fill(int64_t begin, int64_t end) const {
        if (direct_) {
            return;
        }
        const int64_t c = p_.channels;
        const int64_t b = split_.image;
        for (int64_t n = begin; n < end; ++n) {
            A* to = copy_ + n * c;
            const int64_t token = split_.first + n;
            const A* row = row_of<A>(p_.token, b, token, 0, c, to);
            if (!p_.norm) {
                continue;
            }
            hat_of<kKnownMoments>(row, c, p_.eps, part<A>(p_.mean, b * p_.tokens + token),
                                  part<A>(p_.rstd, b * (1 + p_.tokens) + 1 + token), to);
        }
    }
    // What lies ahead: all of the split and the next one, next in memory too or else little is
    // lost. Copied rows are gone through once, so then the next split only.
    __attribute__((always_inline)) void cover(const Split& last, Stream& stream) const {
        with_float(p_.token.type, [&]<typename T>(Type<T>) {
            const int64_t first = split_.first + (direct_ ? 0 : split_.count);
            stream.cover(address<T>(p_.token, split_.image, first, 0),
                         address<T>(p_.token, last.image, last.first + last.count, 0));
        });
    }

   private:
    const CrossAttentionParams& p_;
    const Split& split_;
    bool direct_;
    A* copy_;
};

// out[j][n] = left row j . row n of the split, the query's row first.
template <typename A, bool kKnownMoments>
PVF_INLINE void dot_split(const CrossAttentionParams& p, const Split& split, const A* query,
                          const Rows<A, kKnownMoments>& rows, const A* left, A* out,
                          int64_t out_stride, Stream& stream) {
    if (split.queries > 0) {
        dot(query, int64_t{0}, int64_t{1}, left, p.channels, p.heads, p.channels, out, out_stride,
            stream);
    }
    for (int64_t n = 0; n < split.count; n += kWide<A>) {
        const int64_t count = std::min<int64_t>(kWide<A>, split.count - n);
        rows.fill(n, n + count);
        dot(rows.row(n), rows.stride(), count, left, p.channels, p.heads, p.channels,
            out + split.queries + n, out_stride, stream);
    }
}

// out[j] = sum over the split's rows of weight[j][n] * row n.
template <typename A, bool kKnownMoments>
PVF_INLINE void sum_split(const CrossAttentionParams& p, const Split& split, const A* query,
                          const Rows<A, kKnownMoments>& rows, const A* weights,
                          int64_t weights_stride, A* out, int64_t out_stride, Stream& stream) {
    const Scalars<A> left{weights, weights_stride, 1};
    if (split.queries > 0) {
        outer(left, query, int64_t{0}, p.heads, p.channels, int64_t{1}, out, out_stride, false,
              stream);
    }
    const Scalars<A> others{weights + split.queries, weights_stride, 1};
    outer(others, rows.row(0), rows.stride(), p.heads, p.channels, split.count, out, out_stride,
          split.queries > 0, stream);
}

PVF_INLINE int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }

// Scores become exp(score - peak); returns peak and sum.
template <typename A>
PVF_INLINE void exponentials(A* scores, int64_t count, A* peak, A* total) {
    std::fill(scores + count, scores + padded(count), scores[0]);
    Wide<A> peaks = load_wide(scores);
    for (int64_t n = kWide<A>; n < padded(count); n += kWide<A>) {
        const Wide<A> values = load_wide(scores + n);
        peaks = values > peaks ? values : peaks;
    }
    A greatest = peaks[0];
    for (int lane = 1; lane < kWide<A>; ++lane) {
        greatest = peaks[lane] > greatest ? peaks[lane] : greatest;
    }
    Wide<A> sums = {};
    for (int64_t n = 0; n < padded(count); n += kWide<A>) {
        Wide<A> values = load_wide(scores + n);
        values = exp_of(values - greatest);
        for (int64_t lane = std::max<int64_t>(0, count - n); lane < kWide<A>; ++lane) {
            values[lane] = A(0);
        }
        sums += values;
        store_unaligned(scores + n, values);
    }
    *peak = greatest;
    *total = sum_of<A>(sums);
}

template <typename A>
static void attend_of(const CrossAttentionParams& p, int64_t begin, int64_t end) {
    const int64_t c = p.channels;
    const int64_t h = p.heads;
    const int64_t pad = padded(1 + p.tokens_per_split);
    const Scratch<A> scratch(2 * c + h * c + h * pad);
    Scratch<A> normalized;
    A* const gamma_u = scratch.data() + 2 * c;
    A* const scores = gamma_u + h * c;
    const Affine<A> affine(p, scratch.data());
    Stream stream;
    for (int64_t task = begin; task < end; ++task) {
        const Split split = split_of(p, task);
        const int64_t b = split.image;
        const A* query = part<A>(p.query_hat, b * c);
        const A* u = part<A>(p.u, b * h * c);
        if (affine.gamma != nullptr) {
            for (int64_t j = 0; j < h; ++j) {
                scale_row<A>(u + j * c, affine.gamma, nullptr, c, gamma_u + j * c);
            }
            u = gamma_u;
        }
        const Rows<A, false> rows(p, split, normalized);
        rows.cover(split_of(p, std::min(task + 1, end - 1)), stream);
        dot_split(p, split, query, rows, u, scores, pad, stream);
        const int64_t count = split.queries + split.count;
        A* sums = part<A>(p.partial, task * h * c);
        for (int64_t j = 0; j < h; ++j) {
            A* row = scores + j * pad;
            if (p.scores != nullptr) {
                const int64_t at = (b * h + j) * (1 + p.tokens) + 1 - split.queries + split.first;
                std::copy(row, row + count, part<A>(p.scores, at));
            }
            exponentials(row, count, part<A>(p.partial_peak, task * h + j),
                         part<A>(p.partial_total, task * h + j));
        }
        sum_split(p, split, query, rows, scores, pad, sums, c, stream);
    }
}

template <typename A>
static void combine_of(const CrossAttentionParams& p, int64_t begin, int64_t end) {
    const int64_t c = p.channels;
    const Scratch<A> scratch(2 * c);
    const Affine<A> affine(p, scratch.data());
    for (int64_t b = begin; b < end; ++b) {
        for (int64_t j = 0; j < p.heads; ++j) {
            const auto at = [&](int64_t split) { return (b * p.splits + split) * p.heads + j; };
            A peak = *part<A>(p.partial_peak, at(0));
            for (int64_t s = 1; s < p.splits; ++s) {
                peak = std::max(peak, *part<A>(p.partial_peak, at(s)));
            }
            A* hat = part<A>(p.context_hat, (b * p.heads + j) * c);
            A total = 0;
            for (int64_t s = 0; s < p.splits; ++s) {
                const A* from = part<A>(p.partial, at(s) * c);
                const A factor =
                    p.splits == 1 ? A(1) : std::exp(*part<A>(p.partial_peak, at(s)) - peak);
                total += factor * *part<A>(p.partial_total, at(s));
                for (int64_t i = 0; i < c; ++i) {
                    hat[i] = s == 0 ? factor * from[i] : hat[i] + factor * from[i];
                }
            }
            *part<A>(p.peak, b * p.heads + j) = peak;
            *part<A>(p.total, b * p.heads + j) = total;
            const A share = A(1) / total;
            for (int64_t i = 0; i < c; ++i) {
                hat[i] *= share;
            }
            if (p.norm) {
                scale_row(hat, affine.gamma, affine.beta, c,
                          part<A>(p.context, (b * p.heads + j) * c));
            }
        }
    }
}

template <typename A>
static void attend_backward_of(const CrossAttentionParams& p, int64_t begin, int64_t end) {
    const int64_t c = p.channels;
    const int64_t h = p.heads;
    const int64_t pad = padded(1 + p.tokens_per_split);
    const Scratch<A> scratch(2 * c + 2 * h * c + 2 * h * pad);
    Scratch<A> normalized;
    Scratch<A> indirect;
    // Slopes of the contexts and u, one below the other, and their weights likewise: the slope of a
    // row is a sum over 2 H of them.
    A* const vectors = scratch.data() + 2 * c;
    A* const weights = vectors + 2 * h * c;
    const Affine<A> affine(p, scratch.data());
    const bool direct = !p.norm && holds<A>(p.d_token);
    Stream stream;
    for (int64_t task = begin; task < end; ++task) {
        const Split split = split_of(p, task);
        const int64_t b = split.image;
        const int64_t count = split.queries + split.count;
        const A* query = part<A>(p.query_hat, b * c);
        for (int64_t j = 0; j < h; ++j) {
            scale_row<A>(part<A>(p.d_context, (b * h + j) * c), affine.gamma, nullptr, c,
                         vectors + j * c);
            scale_row<A>(part<A>(p.u, (b * h + j) * c), affine.gamma, nullptr, c,
                         vectors + (h + j) * c);
        }
        const Rows<A, true> rows(p, split, normalized);
        A* const slope_scores = weights + h * pad;
        rows.cover(split_of(p, std::min(task + 1, end - 1)), stream);
        dot_split(p, split, query, rows, vectors, slope_scores, pad, stream);
        for (int64_t j = 0; j < h; ++j) {
            const A delta = dot_of(vectors + j * c, part<A>(p.context_hat, (b * h + j) * c), c);
            const A peak = *part<A>(p.peak, b * h + j);
            const A share = A(1) / *part<A>(p.total, b * h + j);
            const int64_t at = (b * h + j) * (1 + p.tokens) + 1 - split.queries + split.first;
            const A* from = part<A>(p.scores, at);
            A* attention = weights + j * pad;
            A* slope = slope_scores + j * pad;
            std::copy(from, from + count, attention);
            std::fill(attention + count, attention + pad, peak);
            for (int64_t n = 0; n < padded(count); n += kWide<A>) {
                const Wide<A> a = exp_of(load_wide(attention + n) - peak) * share;
                store_unaligned(attention + n, a);
            }
            for (int64_t n = 0; n < count; ++n) {
                slope[n] = attention[n] * (slope[n] - delta);
            }
        }
        if (split.queries > 0) {
            outer(Scalars<A>{weights, 1, pad}, vectors, c, int64_t{1}, c, 2 * h,
                  part<A>(p.d_query_hat, b * c), c, false, stream);
        }
        A* const slopes = direct ? nullptr : indirect.reserve(p.tokens_per_split * c);
        A* const out = direct ? target<A>(p.d_token, b, split.first, 0) : slopes;
        const int64_t out_stride = direct ? p.d_token.row : c;
        outer(Scalars<A>{weights + split.queries, 1, pad}, vectors, c, split.count, c, 2 * h, out,
              out_stride, false, stream);
        for (int64_t n = 0; n < split.count && !direct; ++n) {
            A* slope = slopes + n * c;
            if (p.norm) {
                const A rstd = *part<A>(p.rstd, b * (1 + p.tokens) + 1 + split.first + n);
                norm_backward(slope, rows.row(n), rstd, c);
            }
            with_float_summed_in<A>(p.d_token.type, [&]<typename T>(Type<T>) {
                narrow_row(slope, c, target<T>(p.d_token, b, split.first + n, 0));
            });
        }
        sum_split(p, split, query, rows, slope_scores, pad, part<A>(p.partial, task * h * c), c,
                  stream);
    }
}

template <typename A>
static void combine_backward_of(const CrossAttentionParams& p, int64_t begin, int64_t end) {
    const int64_t c = p.channels;
    const int64_t h = p.heads;
    const Scratch<A> scratch(2 * c);
    const Affine<A> affine(p, scratch.data());
    for (int64_t b = begin; b < end; ++b) {
        if (p.norm) {
            std::fill_n(part<A>(p.d_gamma_rows, b * c), c, A(0));
            std::fill_n(part<A>(p.d_beta_rows, b * c), c, A(0));
            scale_row<A>(part<A>(p.query_hat, b * c), affine.gamma, affine.beta, c,
                         part<A>(p.query_norm, b * c));
        }
        for (int64_t j = 0; j < h; ++j) {
            const int64_t at = (b * h + j) * c;
            A* d_u = part<A>(p.d_u, at);
            for (int64_t s = 0; s < p.splits; ++s) {
                const A* from = part<A>(p.partial, ((b * p.splits + s) * h + j) * c);
                for (int64_t i = 0; i < c; ++i) {
                    d_u[i] = s == 0 ? from[i] : d_u[i] + from[i];
                }
            }
            if (!p.norm) {
                continue;
            }
            const A* hat = part<A>(p.context_hat, at);
            const A* d_context = part<A>(p.d_context, at);
            const A* u = part<A>(p.u, at);
            A* d_gamma = part<A>(p.d_gamma_rows, b * c);
            A* d_beta = part<A>(p.d_beta_rows, b * c);
            for (int64_t i = 0; i < c; ++i) {
                d_gamma[i] += d_context[i] * hat[i] + u[i] * d_u[i];
                d_beta[i] += d_context[i];
            }
            scale_row<A>(hat, affine.gamma, affine.beta, c, part<A>(p.context, at));
            scale_row<A>(d_u, affine.gamma, nullptr, c, d_u);
        }
    }
}

template <typename A>
static void finish_query_of(const CrossAttentionParams& p, int64_t begin, int64_t end) {
    const int64_t c = p.channels;
    const Scratch<A> scratch(3 * c);
    const Affine<A> affine(p, scratch.data());
    A* const slope = scratch.data() + 2 * c;
    for (int64_t b = begin; b < end; ++b) {
        const A* hat = part<A>(p.query_hat, b * c);
        const A* as_query = part<A>(p.d_query_norm, b * c);
        const A* as_row = part<A>(p.d_query_hat, b * c);
        scale_row<A>(as_query, affine.gamma, as_row, c, slope);
        if (p.norm) {
            norm_backward(slope, hat, *part<A>(p.rstd, b * (1 + p.tokens)), c);
            A* d_gamma = part<A>(p.d_gamma_rows, b * c);
            A* d_beta = part<A>(p.d_beta_rows, b * c);
            for (int64_t i = 0; i < c; ++i) {
                d_gamma[i] += as_query[i] * hat[i];
                d_beta[i] += as_query[i];
            }
        }
        with_float_summed_in<A>(p.d_query.type, [&]<typename T>(Type<T>) {
            narrow_row(slope, c, target<T>(p.d_query, 0, b, 0));
        });
    }
}

#define PVF_FLOAT_OR_DOUBLE(name, Argument)                                                      \
    static void name(const Argument& argument, bool wide, int64_t begin, int64_t end) {          \
        wide ? name##_of<double>(argument, begin, end) : name##_of<float>(argument, begin, end); \
    }
PVF_FLOAT_OR_DOUBLE(products, ProductTable)
PVF_FLOAT_OR_DOUBLE(normalize_query, CrossAttentionParams)
PVF_FLOAT_OR_DOUBLE(attend, CrossAttentionParams)
PVF_FLOAT_OR_DOUBLE(combine, CrossAttentionParams)
PVF_FLOAT_OR_DOUBLE(attend_backward, CrossAttentionParams)
PVF_FLOAT_OR_DOUBLE(combine_backward, CrossAttentionParams)
PVF_FLOAT_OR_DOUBLE(finish_query, CrossAttentionParams)

extern const LinearCrossAttentionCpu linear_cross_attention_cpu;
const LinearCrossAttentionCpu linear_cross_attention_cpu{
    products, normalize_query, attend, combine, attend_backward, combine_backward, finish_query};

}  // namespace pyvitfast::PVF_CPU_CAPABILITY
