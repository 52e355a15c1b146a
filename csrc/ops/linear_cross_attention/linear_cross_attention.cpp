#include "ops/linear_cross_attention/linear_cross_attention.h"

#include <algorithm>

#include "adaptor.h"

namespace pyvitfast {

#if PVF_CPU_KERNELS
PVF_DECLARE_CPU_KERNELS(LinearCrossAttentionCpu, linear_cross_attention_cpu)
#else
const char* cross_attention_products_cuda(const ProductTable& table, bool wide, void* stream);
const char* cross_attention_normalize_query_cuda(const CrossAttentionParams& params, bool wide,
                                                 void* stream);
const char* cross_attention_attend_cuda(const CrossAttentionParams& params, bool wide,
                                        void* stream);
const char* cross_attention_attend_backward_cuda(const CrossAttentionParams& params, bool wide,
                                                 void* stream);
const char* cross_attention_finish_query_cuda(const CrossAttentionParams& params, bool wide,
                                              void* stream);
#endif

namespace {

constexpr const char* kName = "linear_cross_attention";

MatrixView view_of(const Tensor& tensor, int64_t batch, int64_t row, int64_t col) {
    return {tensor.data_ptr(), batch, row, col, float_type(kName, tensor)};
}

// What every call has: the arguments made fit for the kernels, their sizes and views.
struct Arguments {
    Tensor query;
    Tensor tokens;
    Tensor weights[4];  // q, k, v, proj
    std::optional<Tensor> biases[4];
    std::optional<Tensor> gamma;
    std::optional<Tensor> beta;
    int64_t batch = 0;
    int64_t channels = 0;
    int64_t heads = 0;
    int64_t width = 0;
    double scale = 1.0;
    bool wide = false;
    CrossAttentionParams params{};

    DType sum_type() const { return wide ? DType::Double : DType::Float; }
    FloatType sum_float() const { return wide ? FloatType::kFloat64 : FloatType::kFloat32; }

    MatrixView sums(void* data, int64_t batch_stride, int64_t row, int64_t col) const {
        return {data, batch_stride, row, col, sum_float()};
    }
    // [B, C] as it is, or as [heads, B, C / heads].
    MatrixView rows(void* data) const { return sums(data, 0, channels, 1); }
    MatrixView head_rows(void* data) const { return sums(data, width, channels, 1); }
    // [B, H, C] as [heads, B, C].
    MatrixView head_context(void* data) const { return sums(data, channels, heads * channels, 1); }
    // Weight [out, in] as it is, or by head of the out dimension.
    MatrixView weight(int which) const {
        const Tensor& w = weights[which];
        return view_of(w, width * w.stride(0), w.stride(0), 1);
    }
    MatrixView bias(int which) const {
        return biases[which] ? view_of(*biases[which], width, 0, 1) : MatrixView{};
    }
};

MatrixView transposed(MatrixView view) {
    std::swap(view.row, view.col);
    return view;
}

std::optional<Tensor> dense_vector(const std::optional<Tensor>& vector, int64_t channels,
                                   const char* name) {
    if (!vector) {
        return {};
    }
    STD_TORCH_CHECK(vector->dim() == 1 && vector->size(0) == channels, kName, ": `", name,
                    "` must have shape [", channels, "]");
    return torch::stable::contiguous(*vector);
}

int64_t rounded_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// How many tokens a task takes: by the shapes alone, so that the bits do not depend on threads.
void split_tokens(CrossAttentionParams& p) {
#if PVF_CPU_KERNELS
    // A split of float rows stays in a second-level cache; few images need splits to share out.
    constexpr int64_t kCachedValues = 96 * 1024;
    const int64_t most = std::clamp<int64_t>(kCachedValues / p.channels, 16, 256);
    const int64_t wanted = p.batch < 8 ? std::min<int64_t>(most, 64) : most;
#else
    const int64_t wanted = cross_attention_cuda_split(p.batch, p.tokens);
#endif
    p.splits = std::max<int64_t>(1, (p.tokens + wanted - 1) / wanted);
    p.tokens_per_split = (p.tokens + p.splits - 1) / p.splits;
    p.splits = p.tokens == 0 ? 1 : (p.tokens + p.tokens_per_split - 1) / p.tokens_per_split;
}

Arguments describe(const Tensor& query, const Tensor& tokens, const TensorList& weights,
                   const std::vector<std::optional<Tensor>>& biases,
                   const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
                   int64_t num_heads, double eps, double scale) {
    Arguments in;
    const auto check = [&](const Tensor& tensor) {
        STD_TORCH_CHECK(tensor.is_cpu() == tokens.is_cpu() &&
                            tensor.get_device_index() == tokens.get_device_index(),
                        kName, ": all tensors must be on one device");
        STD_TORCH_CHECK((float_type(kName, tensor) == FloatType::kFloat64) ==
                            (tokens.scalar_type() == DType::Double),
                        kName, ": float64 cannot be mixed with other dtypes in one call");
    };
    check(query);
    for (const Tensor& weight : weights) {
        check(weight);
    }
    for (const auto& vector :
         {biases[0], biases[1], biases[2], biases[3], norm_weight, norm_bias}) {
        if (vector) {
            check(*vector);
        }
    }
    STD_TORCH_CHECK(query.dim() == 2 && tokens.dim() == 3, kName,
                    ": `query` must have rank 2 and `tokens` rank 3");
    in.batch = query.size(0);
    in.channels = query.size(1);
    in.heads = num_heads;
    STD_TORCH_CHECK(tokens.size(0) == in.batch && tokens.size(2) == in.channels, kName,
                    ": `tokens` must have shape [", in.batch, ", N, ", in.channels, "]");
    STD_TORCH_CHECK(in.channels > 0 && num_heads > 0 && in.channels % num_heads == 0, kName,
                    ": `num_heads` must divide ", in.channels, ", got ", num_heads);
    in.width = in.channels / num_heads;
    in.scale = scale;
    in.query = query.stride(1) == 1 || in.channels == 1 ? query : torch::stable::contiguous(query);
    in.tokens =
        tokens.stride(2) == 1 || in.channels == 1 ? tokens : torch::stable::contiguous(tokens);
    in.wide = tokens.scalar_type() == DType::Double;
    for (int i = 0; i < 4; ++i) {
        STD_TORCH_CHECK(weights[i].dim() == 2 && weights[i].size(0) == in.channels &&
                            weights[i].size(1) == in.channels,
                        kName, ": weights must have shape [", in.channels, ", ", in.channels, "]");
        in.weights[i] = with_dense_rows(weights[i]);
        in.biases[i] = dense_vector(biases[i], in.channels, "bias");
    }
    in.gamma = dense_vector(norm_weight, in.channels, "norm_weight");
    in.beta = dense_vector(norm_bias, in.channels, "norm_bias");
    auto& p = in.params;
    p.batch = in.batch;
    p.tokens = tokens.size(1);
    p.channels = in.channels;
    p.heads = num_heads;
    p.eps = eps;
    p.norm = in.gamma.has_value();
    p.query = view_of(in.query, 0, in.query.stride(0), 1);
    p.token = view_of(in.tokens, in.tokens.stride(0), in.tokens.stride(1), 1);
    p.gamma = in.gamma ? view_of(*in.gamma, 0, 0, 1) : MatrixView{};
    p.beta = in.beta ? view_of(*in.beta, 0, 0, 1) : MatrixView{};
    split_tokens(p);
    return in;
}

// Hands out parts of one buffer; with no buffer it only counts.
class Carver {
   public:
    Carver(void* data, bool wide) : data_(static_cast<char*>(data)), size_(wide ? 8 : 4) {}

    void* take(int64_t count) {
        void* part = data_ == nullptr ? nullptr : data_ + used_ * size_;
        used_ += rounded_up(count, 16);  // each part may be read by whole vectors
        return part;
    }
    int64_t used() const { return used_; }

   private:
    char* data_;
    int64_t size_;
    int64_t used_ = 0;
};

struct Kept {
    void* q;
    void* heads;  // [B, C] attended values of all heads
};

// What the backward needs, besides the inputs.
Kept carve_kept(Carver& carver, CrossAttentionParams& p, bool keep) {
    const int64_t rows = p.batch * p.channels;
    const int64_t wide_rows = rows * p.heads;
    Kept kept{};
    p.query_hat = carver.take(rows);
    kept.q = carver.take(rows);
    kept.heads = carver.take(rows);
    p.u = carver.take(wide_rows);
    p.context_hat = carver.take(wide_rows);
    p.peak = carver.take(p.batch * p.heads);
    p.total = carver.take(p.batch * p.heads);
    if (keep) {
        p.scores = carver.take(p.batch * p.heads * (1 + p.tokens));
        if (p.norm) {
            p.mean = carver.take(p.batch * p.tokens);
            p.rstd = carver.take(p.batch * (1 + p.tokens));
        }
    }
    return kept;
}

Tensor buffer(const Arguments& in, int64_t size) { return empty(in.tokens, {size}, in.sum_type()); }

// The two buffers of a call carved up: what is kept, and what is not.
template <typename F>
Tensor carved(const Arguments& in, const F& carve) {
    Carver counter(nullptr, in.wide);
    carve(counter);
    Tensor memory = buffer(in, counter.used());
    Carver carver(memory.data_ptr(), in.wide);
    carve(carver);
    return memory;
}

ProductTable table_of(const std::vector<Product>& products) {
    ProductTable table{};
    for (const auto& product : products) {
        table.products[table.count] = product;
        table.products[table.count++].tile_begin = table.tiles;
        table.tiles += PVF_CPU_KERNELS ? cpu_product_tiles(product) : product_tiles(product);
    }
    return table;
}

#if PVF_CPU_KERNELS

class Runner {
   public:
    explicit Runner(const Arguments& in)
        : wide_(in.wide), kernels_(PVF_CPU_KERNELS_OF(linear_cross_attention_cpu)) {}

    void products(const std::vector<Product>& products) const {
        const ProductTable table = table_of(products);
        int64_t work = 0;
        for (const auto& product : products) {
            work += product.batch * product.m * product.n * product.k;
        }
        each(table.tiles, work,
             [&](int64_t begin, int64_t end) { kernels_.products(table, wide_, begin, end); });
    }
    void normalize_query(const CrossAttentionParams& p) const {
        each(p.batch, 8 * p.batch * p.channels,
             [&](int64_t begin, int64_t end) { kernels_.normalize_query(p, wide_, begin, end); });
    }
    void attend(const CrossAttentionParams& p) const {
        each(p.batch * p.splits, work(p),
             [&](int64_t begin, int64_t end) { kernels_.attend(p, wide_, begin, end); });
        each(p.batch, p.batch * p.heads * p.channels,
             [&](int64_t begin, int64_t end) { kernels_.combine(p, wide_, begin, end); });
    }
    void attend_backward(const CrossAttentionParams& p) const {
        each(p.batch * p.splits, 3 * work(p),
             [&](int64_t begin, int64_t end) { kernels_.attend_backward(p, wide_, begin, end); });
        each(p.batch, 4 * p.batch * p.heads * p.channels,
             [&](int64_t begin, int64_t end) { kernels_.combine_backward(p, wide_, begin, end); });
    }
    void finish_query(const CrossAttentionParams& p) const {
        each(p.batch, 8 * p.batch * p.channels,
             [&](int64_t begin, int64_t end) { kernels_.finish_query(p, wide_, begin, end); });
    }

   private:
    static int64_t work(const CrossAttentionParams& p) {
        return 2 * p.batch * (1 + p.tokens) * p.channels * (p.heads + 1);
    }

    // Shares out the tasks, unless all of them together take less time than waking a thread.
    template <typename F>
    static void each(int64_t tasks, int64_t work, const F& f) {
        constexpr int64_t kWorth = 1 << 18;
        const int64_t grain = std::max<int64_t>(1, tasks * kWorth / std::max<int64_t>(work, 1) / 2);
        if (tasks > 0) {
            torch::stable::parallel_for(0, tasks, grain, f);
        }
    }

    bool wide_;
    const LinearCrossAttentionCpu& kernels_;
};

#else

class Runner {
   public:
    explicit Runner(const Arguments& in) : wide_(in.wide), scope_(in.tokens) {}

    void products(const std::vector<Product>& products) const {
        const ProductTable table = table_of(products);
        if (table.tiles > 0) {
            check_grid(kName, table.tiles);
            check_launch(kName, cross_attention_products_cuda(table, wide_, scope_.stream()));
        }
    }
    void normalize_query(const CrossAttentionParams& p) const {
        launch(p, cross_attention_normalize_query_cuda);
    }
    void attend(const CrossAttentionParams& p) const { launch(p, cross_attention_attend_cuda); }
    void attend_backward(const CrossAttentionParams& p) const {
        launch(p, cross_attention_attend_backward_cuda);
    }
    void finish_query(const CrossAttentionParams& p) const {
        launch(p, cross_attention_finish_query_cuda);
    }

   private:
    template <typename F>
    void launch(const CrossAttentionParams& p, const F& f) const {
        if (p.batch > 0) {
            check_grid(kName, p.batch * p.splits);
            check_launch(kName, f(p, wide_, scope_.stream()));
        }
    }

    bool wide_;
    LaunchScope scope_;
};

#endif

// Left is [m, k], right [k, n]; the sizes of the batch entries are given, views know the rest.
Product product(MatrixView left, MatrixView right, MatrixView out, int64_t batch, int64_t m,
                int64_t n, int64_t k, MatrixView bias = {}, double alpha = 1.0) {
    return {left, right, bias, out, batch, m, n, k, alpha, 0};
}

std::tuple<Tensor, Tensor> linear_cross_attention(
    Tensor query, Tensor tokens, Tensor q_weight, Tensor k_weight, Tensor v_weight,
    Tensor proj_weight, std::optional<Tensor> q_bias, std::optional<Tensor> k_bias,
    std::optional<Tensor> v_bias, std::optional<Tensor> proj_bias,
    std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, int64_t num_heads,
    double eps, double scale, bool keep) {
    Arguments in = describe(query, tokens, {q_weight, k_weight, v_weight, proj_weight},
                            {q_bias, k_bias, v_bias, proj_bias}, norm_weight, norm_bias, num_heads,
                            eps, scale);
    auto& p = in.params;
    const int64_t b = in.batch, c = in.channels, h = in.heads, d = in.width;
    Kept kept{};
    const auto carve_temporary = [&](Carver& carver) {
        p.partial = carver.take(b * p.splits * h * c);
        p.partial_peak = carver.take(b * p.splits * h);
        p.partial_total = carver.take(b * p.splits * h);
        if (p.norm) {
            p.query_norm = carver.take(b * c);
            p.context = carver.take(b * h * c);
        }
    };
    const auto carve_all = [&](Carver& carver) {
        kept = carve_kept(carver, p, keep);
        if (!keep) {
            carve_temporary(carver);
        }
    };
    const Tensor memory = carved(in, carve_all);
    const Tensor temporary = keep ? carved(in, carve_temporary) : memory;
    if (!p.norm) {
        p.query_norm = p.query_hat;
        p.context = p.context_hat;
    }
    Tensor out = empty_quickly(in.query, {b, c}, in.query.scalar_type());
    const Runner runner(in);
    runner.normalize_query(p);
    runner.products({product(in.rows(p.query_norm), transposed(in.weight(0)), in.rows(kept.q), 1, b,
                             c, c, in.bias(0))});
    runner.products({product(in.head_rows(kept.q), in.weight(1), in.head_context(p.u), h, b, c, d,
                             {}, in.scale)});
    runner.attend(p);
    runner.products({product(in.head_context(p.context), transposed(in.weight(2)),
                             in.head_rows(kept.heads), h, b, d, c, in.bias(2))});
    runner.products({product(in.rows(kept.heads), transposed(in.weight(3)), view_of(out, 0, c, 1),
                             1, b, c, c, in.bias(3))});
    return {out, keep ? memory : empty_quickly(in.tokens, {0}, in.sum_type())};
}

TensorList linear_cross_attention_backward(
    Tensor grad, Tensor kept_values, Tensor query, Tensor tokens, Tensor q_weight, Tensor k_weight,
    Tensor v_weight, Tensor proj_weight, std::optional<Tensor> q_bias, std::optional<Tensor> k_bias,
    std::optional<Tensor> v_bias, std::optional<Tensor> proj_bias,
    std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, int64_t num_heads,
    double eps, double scale) {
    Arguments in = describe(query, tokens, {q_weight, k_weight, v_weight, proj_weight},
                            {q_bias, k_bias, v_bias, proj_bias}, norm_weight, norm_bias, num_heads,
                            eps, scale);
    auto& p = in.params;
    const int64_t b = in.batch, c = in.channels, h = in.heads, d = in.width;
    Carver kept_carver(kept_values.data_ptr(), in.wide);
    const Kept kept = carve_kept(kept_carver, p, true);
    STD_TORCH_CHECK(
        kept_values.numel() == kept_carver.used() && kept_values.scalar_type() == in.sum_type(),
        "linear_cross_attention_backward: `kept` must come from the forward of the same "
        "arguments");
    STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == b && grad.size(1) == c,
                    "linear_cross_attention_backward: `grad` must have shape [", b, ", ", c, "]");
    const Tensor upstream = torch::stable::contiguous(
        grad.scalar_type() == in.sum_type() ? grad : torch::stable::to(grad, in.sum_type()));
    void* d_heads = nullptr;
    void* d_q = nullptr;
    const auto carve_temporary = [&](Carver& carver) {
        d_heads = carver.take(b * c);
        d_q = carver.take(b * c);
        p.d_query_hat = carver.take(b * c);
        p.d_query_norm = carver.take(b * c);
        p.d_context = carver.take(b * h * c);
        p.d_u = carver.take(b * h * c);
        p.partial = carver.take(b * p.splits * h * c);
        if (p.norm) {
            p.query_norm = carver.take(b * c);
            p.context = carver.take(b * h * c);
            p.d_gamma_rows = carver.take(b * c);
            p.d_beta_rows = carver.take(b * c);
        }
    };
    const Tensor temporary = carved(in, carve_temporary);
    if (!p.norm) {
        p.query_norm = p.query_hat;
        p.context = p.context_hat;
    }
    Tensor d_query = empty(in.query, {b, c});
    Tensor d_tokens = empty(in.tokens, {b, p.tokens, c});
    p.d_query = view_of(d_query, 0, c, 1);
    p.d_token = view_of(d_tokens, p.tokens * c, c, 1);
    TensorList d_weights;
    TensorList d_biases;
    for (int i = 0; i < 4; ++i) {
        d_weights.push_back(empty(in.weights[i], {c, c}));
        const Tensor& like = in.biases[i] ? *in.biases[i] : in.weights[i];
        // A key bias shifts all scores of a head alike: its gradient is zero.
        d_biases.push_back(i == 1 ? zeros(like, {c}) : empty(like, {c}));
    }
    const MatrixView ones{};
    const auto bias_slope = [&](int which, MatrixView slopes) {
        return product(ones, slopes, view_of(d_biases[which], 0, c, 1), 1, 1, c, b);
    };
    const auto weight_slope = [&](int which) { return view_of(d_weights[which], d * c, c, 1); };
    const MatrixView g = in.rows(upstream.data_ptr());

    const Runner runner(in);
    runner.products({product(g, in.weight(3), in.rows(d_heads), 1, b, c, c),
                     product(transposed(g), in.rows(kept.heads), weight_slope(3), 1, c, c, b),
                     bias_slope(3, g)});
    runner.products(
        {product(in.head_rows(d_heads), in.weight(2), in.head_context(p.d_context), h, b, c, d),
         bias_slope(2, in.rows(d_heads))});
    runner.attend_backward(p);
    runner.products({product(in.head_context(p.d_u), transposed(in.weight(1)), in.head_rows(d_q), h,
                             b, d, c, {}, in.scale),
                     product(transposed(in.head_rows(kept.q)), in.head_context(p.d_u),
                             weight_slope(1), h, d, c, b, {}, in.scale),
                     product(transposed(in.head_rows(d_heads)), in.head_context(p.context),
                             weight_slope(2), h, d, c, b)});
    // Needs query_norm, which attend_backward restores.
    runner.products(
        {product(in.rows(d_q), in.weight(0), in.rows(p.d_query_norm), 1, b, c, c),
         product(transposed(in.rows(d_q)), in.rows(p.query_norm), weight_slope(0), 1, c, c, b),
         bias_slope(0, in.rows(d_q))});
    runner.finish_query(p);
    TensorList out{d_query, d_tokens};
    out.insert(out.end(), d_weights.begin(), d_weights.end());
    out.insert(out.end(), d_biases.begin(), d_biases.end());
    for (const auto& vector : {in.gamma, in.beta}) {
        out.push_back(empty(vector ? *vector : in.weights[0], {p.norm ? c : 0}));
    }
    if (p.norm) {
        runner.products(
            {product(ones, in.rows(p.d_gamma_rows), view_of(out[10], 0, c, 1), 1, 1, c, b),
             product(ones, in.rows(p.d_beta_rows), view_of(out[11], 0, c, 1), 1, 1, c, b)});
    }
    return out;
}

}  // namespace
}  // namespace pyvitfast

#if PVF_DEFINES_SCHEMAS
#define PVF_ATTENTION_ARGUMENTS                                                               \
    "Tensor query, Tensor tokens, Tensor q_weight, Tensor k_weight, Tensor v_weight, "        \
    "Tensor proj_weight, Tensor? q_bias, Tensor? k_bias, Tensor? v_bias, Tensor? proj_bias, " \
    "Tensor? norm_weight, Tensor? norm_bias, int num_heads, float eps, float scale"

STABLE_TORCH_LIBRARY_FRAGMENT(pyvitfast, m) {
    m.def("linear_cross_attention(" PVF_ATTENTION_ARGUMENTS ", bool keep) -> (Tensor, Tensor)");
    m.def("linear_cross_attention_backward(Tensor grad, Tensor kept, " PVF_ATTENTION_ARGUMENTS
          ") -> Tensor[]");
}
#endif

PVF_IMPL(m) {
    m.impl("linear_cross_attention", TORCH_BOX(&pyvitfast::linear_cross_attention));
    m.impl("linear_cross_attention_backward",
           TORCH_BOX(&pyvitfast::linear_cross_attention_backward));
}
