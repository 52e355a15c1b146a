#pragma once

#include <cstdint>

#include "float_type.h"
#include "portable/platform.h"

namespace pyvitfast {

// Element (r, c) of entry b lies at data + b * batch + r * row + c * col, in elements.
struct MatrixView {
    const void* data;
    int64_t batch;
    int64_t row;
    int64_t col;
    FloatType type;
};

// out[b] = alpha * left[b] @ right[b] + bias[b], for `batch` entries: [m, k] @ [k, n] + [n]. `left`
// and sums are float, or double in a double call; null `left`: all ones, null `bias`: none.
struct Product {
    MatrixView left;
    MatrixView right;
    MatrixView bias;
    MatrixView out;
    int64_t batch;
    int64_t m;
    int64_t n;
    int64_t k;
    double alpha;
    int64_t tile_begin;  // first of this product's tiles in the launch
};

constexpr int kMaxProducts = 8;

struct ProductTable {
    Product products[kMaxProducts];
    int32_t count;
    int64_t tiles;
};

// Rows and columns of the result that one block computes.
constexpr int kProductTileRows = 16;
constexpr int kProductTileCols = 32;

PVF_HOST_DEVICE int64_t product_row_tiles(const Product& product) {
    return (product.m + kProductTileRows - 1) / kProductTileRows;
}

PVF_HOST_DEVICE int64_t product_col_tiles(const Product& product) {
    return (product.n + kProductTileCols - 1) / kProductTileCols;
}

PVF_HOST_DEVICE int64_t product_tiles(const Product& product) {
    return product.batch * product_row_tiles(product) * product_col_tiles(product);
}

// One query an image over itself and N tokens. "hat" is a row minus its mean times its inverse
// deviation, before gamma and beta; without LayerNorm it is the row itself. Arrays without a type
// hold floats, or doubles in a double call, densely.
struct CrossAttentionParams {
    int64_t batch;
    int64_t tokens;  // N, without the query
    int64_t channels;
    int64_t heads;
    int64_t splits;            // partial results an image
    int64_t tokens_per_split;  // the first split has the query on top
    double eps;
    bool norm;

    MatrixView query;  // [B, C]
    MatrixView token;  // [B, N, C]
    MatrixView gamma;  // [C]; null: ones
    MatrixView beta;   // [C]; null: zeros

    void* query_hat;   // [B, C]
    void* query_norm;  // [B, C] after gamma and beta; query_hat without LayerNorm
    void* u;           // [B, H, C] scale * W_k^T q by head
    void* scores;      // [B, H, 1 + N], the query first; null: not kept
    void* peak;        // [B, H] greatest score
    void* total;       // [B, H] sum of exp(score - peak)
    // Null without LayerNorm or when not kept. CUDA computes those of the tokens again instead.
    void* mean;           // [B, N] of the tokens
    void* rstd;           // [B, 1 + N], the query first
    void* partial;        // [B, splits, H, C]: sums of exp * hat; in the backward of slope * hat
    void* partial_peak;   // [B, splits, H]
    void* partial_total;  // [B, splits, H]
    void* context_hat;    // [B, H, C] attention-weighted mean of the hats
    void* context;        // [B, H, C] after gamma and beta; context_hat without LayerNorm

    void* d_context;     // [B, H, C]
    void* d_u;           // [B, H, C]
    MatrixView d_token;  // [B, N, C]
    void* d_query_hat;   // [B, C] of the query as one of the rows
    void* d_query_norm;  // [B, C] of the query as the query
    MatrixView d_query;  // [B, C]
    void* d_gamma_rows;  // [B, C], to be summed over images; null without LayerNorm
    void* d_beta_rows;   // [B, C]; null likewise
};

// What the CUDA kernels hold of an image at once must fit in the shared memory of the smallest
// supported multiprocessor that allows 163 KB a block.
constexpr int64_t kCrossAttentionMostShared = 163 * 1024;

PVF_HOST_DEVICE bool cross_attention_fits(int64_t channels, int64_t heads, bool wide) {
    return channels * (16 + 3 * heads) + 36 * heads <= (wide ? 20'800 : 41'600);
}

// Tokens a block takes: a block for each multiprocessor of a large GPU. More splits cost more than
// they give: each reads u and leaves partial results of the same size.
PVF_HOST_DEVICE int64_t cross_attention_cuda_split(int64_t batch, int64_t tokens) {
    constexpr int64_t kBlocks = 132;
    const int64_t images = batch > 0 ? batch : 1;
    const int64_t per_image = (kBlocks + images - 1) / images;
    const int64_t even = (tokens + per_image - 1) / per_image;
    return even > 64 ? even : 64;
}

// Rows that the kernels without matrix units hold, and how many values of shared memory the forward
// takes with them.
constexpr int kCrossAttentionTile = 16;
constexpr int kCrossAttentionThreads = 256;

PVF_HOST_DEVICE int64_t cross_attention_shared(int64_t channels, int64_t heads) {
    return (kCrossAttentionTile + 2 * heads) * channels + heads * (kCrossAttentionTile + 3) +
           kCrossAttentionTile;
}

// Rows and columns of the result that one CPU task computes: few rows against rows of the right
// factor take these whole, as they lie in memory.
struct CpuProductTile {
    int64_t rows;
    int64_t cols;
};
constexpr int64_t kCpuProductTileSize = 2048;

inline __attribute__((always_inline)) CpuProductTile cpu_product_tile(const Product& product) {
    return product.m <= 4 && product.right.col == 1 ? CpuProductTile{4, 512}
                                                    : CpuProductTile{32, 64};
}

inline __attribute__((always_inline)) int64_t cpu_product_tiles(const Product& product) {
    const CpuProductTile tile = cpu_product_tile(product);
    return product.batch * ((product.m + tile.rows - 1) / tile.rows) *
           ((product.n + tile.cols - 1) / tile.cols);
}

struct LinearCrossAttentionCpu {
    // Tiles [begin, end) of the products of a table.
    void (*products)(const ProductTable&, bool wide, int64_t begin, int64_t end);
    // Images [begin, end).
    void (*normalize_query)(const CrossAttentionParams&, bool wide, int64_t begin, int64_t end);
    // Splits [begin, end) of all images, image by image.
    void (*attend)(const CrossAttentionParams&, bool wide, int64_t begin, int64_t end);
    // Images [begin, end): the splits into context_hat, context, peak and total.
    void (*combine)(const CrossAttentionParams&, bool wide, int64_t begin, int64_t end);
    // Splits [begin, end): d_token, and d_query_hat in the first split; partial sums of d_u.
    void (*attend_backward)(const CrossAttentionParams&, bool wide, int64_t begin, int64_t end);
    // Images [begin, end): d_u from its partial sums, context, d_gamma_rows and d_beta_rows.
    void (*combine_backward)(const CrossAttentionParams&, bool wide, int64_t begin, int64_t end);
    // Images [begin, end): d_query from d_query_hat and d_query_norm; adds to d_gamma_rows,
    // d_beta_rows.
    void (*finish_query)(const CrossAttentionParams&, bool wide, int64_t begin, int64_t end);
};

}  // namespace pyvitfast
