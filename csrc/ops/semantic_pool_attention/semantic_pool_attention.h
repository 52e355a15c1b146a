#pragma once

#include <cstdint>

#include "float_type.h"
#include "portable/platform.h"
#include "portable/strided_product.h"

namespace pyvitfast {

// Rows [B, n, C] whose channels are neighbours; strides in elements.
struct TokenRows {
    void* data;
    int64_t batch;
    int64_t row;
    int64_t count;  // n
    FloatType type;
};

// M queries an image over the rows [before; tokens], R = M * H of them with their heads: row j M +
// m is query m of head j. "hat" is a row minus its mean times its inverse deviation; without
// LayerNorm it is the row itself. Arrays without a type hold floats, or doubles in a double call,
// densely. Null vectors: zeros, or ones for gamma.
struct SemanticPoolParams {
    int64_t batch;
    int64_t queries;  // M
    int64_t channels;
    int64_t heads;
    int64_t splits;          // partial results an image
    int64_t rows_per_split;  // of [before; tokens]
    double eps;
    double scale;
    bool norm;

    TokenRows before;  // null data: none
    TokenRows tokens;
    const void* query;     // [B, M, C]
    const void* gamma;     // [C]
    const void* beta;      // [C]
    const void* k_weight;  // [C, C]
    const void* v_weight;  // [C, C]
    const void* q_bias;    // [C]
    const void* v_bias;
    const void* proj_bias;

    void* k_folded;       // [C, C] scale * gamma * W_k
    void* v_folded;       // [C, C] gamma * W_v; W_v itself without gamma
    void* v_bias_folded;  // [C] b_v + W_v beta
    void* query_norm;     // [B, M, C] after gamma and beta
    // [B, M, C] each, begun with the bias; null: not needed.
    void* q;
    void* mixed;
    void* out;
    void* u;        // [B, R, C] k_folded^T q by head: scores are u . hat
    void* context;  // [B, R, C] attention-weighted mean of the hats
    void* peak;     // [B, R] greatest score
    void* total;    // [B, R] sum of exp(score - peak)
    void* mean;     // [B, rows]; null: not kept, or no LayerNorm
    void* rstd;     // [B, rows]
    // Of the splits, where there are several: contexts before division, or slopes of u.
    void* partial;        // [B, splits, R, C]
    void* partial_peak;   // [B, splits, R]
    void* partial_total;  // [B, splits, R]

    void* d_context;     // [B, R, C]
    void* d_u;           // [B, R, C]
    void* delta;         // [B, R] d_context . context
    void* d_scores;      // [B, R, rows]; CUDA only
    void* d_query_norm;  // [B, M, C]
    void* d_query;       // [B, M, C]
    TokenRows d_before;
    TokenRows d_tokens;
    void* d_v_bias;    // [C]
    void* d_k_weight;  // [C, C] of k_folded, and then of W_k; likewise of v
    void* d_v_weight;
    void* d_gamma;  // [C]
    void* d_beta;
};

PVF_HOST_DEVICE int64_t rows_of_image(const SemanticPoolParams& p) {
    return p.before.count + p.tokens.count;
}

// Row n of [before; tokens] is row `at` of `rows`.
struct TokenPlace {
    const TokenRows* rows;
    int64_t at;
};
PVF_HOST_DEVICE TokenPlace place_in(const TokenRows& before, const TokenRows& tokens, int64_t n) {
    return n < before.count ? TokenPlace{&before, n} : TokenPlace{&tokens, n - before.count};
}

// Rows of tokens and of queries with heads that a CUDA block takes together, and what it holds.
constexpr int kPoolTile = 16;
constexpr int kPoolThreads = 256;
constexpr int64_t kPoolMostShared = 163 * 1024;

PVF_HOST_DEVICE int64_t pool_row_stride(int64_t channels) { return (channels + 3) / 4 * 4 + 4; }
PVF_HOST_DEVICE int64_t pool_shared_values(int64_t channels) {
    return 3 * kPoolTile * pool_row_stride(channels) +
           (kPoolThreads / 32 + 2) * kPoolTile * kPoolTile + 6 * kPoolTile;
}
PVF_HOST_DEVICE bool pool_fits(int64_t channels, bool wide) {
    return pool_shared_values(channels) * (wide ? 8 : 4) <= kPoolMostShared;
}
// Rows a block takes: two blocks for each multiprocessor of a large GPU, 64 rows at least.
PVF_HOST_DEVICE int64_t pool_cuda_split(int64_t batch, int64_t query_rows, int64_t rows) {
    constexpr int64_t kBlocks = 264;
    const int64_t groups = (query_rows + kPoolTile - 1) / kPoolTile * batch;
    const int64_t wanted = groups > 0 ? (kBlocks + groups - 1) / groups : 1;
    const int64_t even = (rows + wanted - 1) / wanted;
    return even > 64 ? even : 64;
}

struct SemanticPoolCpu {
    StridedProductCpu products;
    // Rows [begin, end) of the folded weights.
    void (*fold)(const SemanticPoolParams&, bool wide, int64_t begin, int64_t end);
    // Queries [begin, end) of all images: query_norm, and the biases below q, mixed and out.
    void (*prepare)(const SemanticPoolParams&, bool wide, int64_t begin, int64_t end);
    // Splits [begin, end) of all images, image by image.
    void (*attend)(const SemanticPoolParams&, bool wide, int64_t begin, int64_t end);
    // Rows [begin, end) of [B, R]: the splits into context, peak and total.
    void (*combine)(const SemanticPoolParams&, bool wide, int64_t begin, int64_t end);
    // Splits [begin, end): d_before and d_tokens, d_u or its partial sums.
    void (*attend_backward)(const SemanticPoolParams&, bool wide, int64_t begin, int64_t end);
    // Rows [begin, end) of [B, R]: d_u from its partial sums.
    void (*combine_backward)(const SemanticPoolParams&, bool wide, int64_t begin, int64_t end);
    // Queries [begin, end): d_query; query_norm becomes hat * d_query_norm.
    void (*finish)(const SemanticPoolParams&, bool wide, int64_t begin, int64_t end);
    // Channels [begin, end): columns of the weights' gradients, d_gamma and d_beta.
    void (*unfold)(const SemanticPoolParams&, bool wide, int64_t begin, int64_t end);
};

}  // namespace pyvitfast
