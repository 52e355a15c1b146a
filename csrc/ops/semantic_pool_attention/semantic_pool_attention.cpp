#include "ops/semantic_pool_attention/semantic_pool_attention.h"

#include <algorithm>

#include "products.h"

namespace pyvitfast {

#if PVF_CPU_KERNELS
PVF_DECLARE_CPU_KERNELS(SemanticPoolCpu, semantic_pool_attention_cpu)
#else
const char* semantic_pool_product_cuda(const StridedProduct& product, void* stream);
const char* semantic_pool_fold_cuda(const SemanticPoolParams& p, bool wide, void* stream);
const char* semantic_pool_prepare_cuda(const SemanticPoolParams& p, bool wide, void* stream);
const char* semantic_pool_attend_cuda(const SemanticPoolParams& p, bool wide, void* stream);
const char* semantic_pool_attend_backward_cuda(const SemanticPoolParams& p, bool wide,
                                               void* stream);
const char* semantic_pool_finish_cuda(const SemanticPoolParams& p, bool wide, void* stream);
const char* semantic_pool_unfold_cuda(const SemanticPoolParams& p, bool wide, void* stream);
#endif

namespace {

constexpr const char* kName = "semantic_pool_attention";

TokenRows rows_of_tensor(const Tensor& tensor) {
    return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.size(1),
            float_type(kName, tensor)};
}

void* data_of(const std::optional<Tensor>& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

// What every call has: the arguments made fit for the kernels, and their sizes.
struct Arguments {
    Tensor query;
    std::optional<Tensor> before;
    Tensor tokens;
    Tensor weights[4];  // q, k, v, proj
    std::optional<Tensor> biases[4];
    std::optional<Tensor> gamma;
    std::optional<Tensor> beta;
    bool wide = false;
    SemanticPoolParams p{};

    DType sum_type() const { return wide ? DType::Double : DType::Float; }
    Tensor sums(std::vector<int64_t> shape) const { return empty(query, shape, sum_type()); }
    Tensor as_sums(const Tensor& tensor) const {
        return torch::stable::contiguous(
            tensor.scalar_type() == sum_type() ? tensor : torch::stable::to(tensor, sum_type()));
    }
    int64_t query_rows() const { return p.heads * p.queries; }
    int64_t width() const { return p.channels / p.heads; }

    // [B, M, C], head by head [B, M, width].
    StridedMatrix by_head(const Tensor& rows) const {
        return view_of(rows).matrix({p.channels, p.queries * p.channels}, {1, 0}, {width(), 0});
    }
    // [B, H, M, C], head by head [B, M, C].
    StridedMatrix wide_by_head(const Tensor& rows) const {
        return view_of(rows).matrix({p.channels, query_rows() * p.channels}, {1, 0},
                                    {p.queries * p.channels, 0});
    }
    // [C, C], head by head [width, C].
    StridedMatrix weight_by_head(const Tensor& weight) const {
        return stack_of(view_of(weight), p.channels, width() * p.channels);
    }
    StridedMatrix matrix(const Tensor& tensor) const {
        return stack_of(view_of(tensor), p.channels);
    }
    Extent images() const { return {p.batch * p.queries, p.queries}; }
};

Arguments describe(const Tensor& query, const std::optional<Tensor>& before, const Tensor& tokens,
                   const TensorList& weights, const std::vector<std::optional<Tensor>>& biases,
                   const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
                   int64_t num_heads, double eps, double scale) {
    Arguments in;
    in.wide = tokens.scalar_type() == DType::Double;
    const auto check = [&](const Tensor& tensor) {
        STD_TORCH_CHECK(tensor.is_cpu() == tokens.is_cpu() &&
                            tensor.get_device_index() == tokens.get_device_index(),
                        kName, ": all tensors must be on one device");
        STD_TORCH_CHECK((float_type(kName, tensor) == FloatType::kFloat64) == in.wide, kName,
                        ": float64 cannot be mixed with other dtypes in one call");
    };
    STD_TORCH_CHECK(query.dim() == 3 && tokens.dim() == 3, kName,
                    ": `query` and `tokens` must have rank 3");
    auto& p = in.p;
    p.batch = query.size(0);
    p.queries = query.size(1);
    p.channels = query.size(2);
    p.heads = num_heads;
    STD_TORCH_CHECK(p.channels > 0 && num_heads > 0 && p.channels % num_heads == 0, kName,
                    ": `num_heads` must divide ", p.channels, ", got ", num_heads);
    const auto rows = [&](const Tensor& tensor, const char* name) {
        check(tensor);
        STD_TORCH_CHECK(
            tensor.dim() == 3 && tensor.size(0) == p.batch && tensor.size(2) == p.channels, kName,
            ": `", name, "` must have shape [", p.batch, ", rows, ", p.channels, "]");
        return tensor.stride(2) == 1 || p.channels == 1 ? tensor
                                                        : torch::stable::contiguous(tensor);
    };
    check(query);
    in.query = in.as_sums(query);
    in.tokens = rows(tokens, "tokens");
    p.tokens = rows_of_tensor(in.tokens);
    if (before) {
        in.before = rows(*before, "tokens_before");
        p.before = rows_of_tensor(*in.before);
    }
    STD_TORCH_CHECK(rows_of_image(p) > 0, kName, ": there must be a row to attend to");
    const auto vector = [&](const std::optional<Tensor>& given) -> std::optional<Tensor> {
        if (!given) {
            return {};
        }
        check(*given);
        STD_TORCH_CHECK(given->dim() == 1 && given->size(0) == p.channels, kName,
                        ": vectors must have shape [", p.channels, "]");
        return in.as_sums(*given);
    };
    for (int i = 0; i < 4; ++i) {
        check(weights[i]);
        STD_TORCH_CHECK(weights[i].dim() == 2 && weights[i].size(0) == p.channels &&
                            weights[i].size(1) == p.channels,
                        kName, ": weights must have shape [", p.channels, ", ", p.channels, "]");
        in.weights[i] = in.as_sums(weights[i]);
        in.biases[i] = vector(biases[i]);
    }
    in.gamma = vector(norm_weight);
    in.beta = vector(norm_bias);
    p.eps = eps;
    p.scale = scale;
    p.norm = in.gamma.has_value();
    p.query = in.query.data_ptr();
    p.gamma = data_of(in.gamma);
    p.beta = data_of(in.beta);
    p.k_weight = in.weights[1].data_ptr();
    p.v_weight = in.weights[2].data_ptr();
    p.q_bias = data_of(in.biases[0]);
    p.v_bias = data_of(in.biases[2]);
    p.proj_bias = data_of(in.biases[3]);
#if PVF_CPU_KERNELS
    // A split works on more than one tile, unless a small batch would leave threads idle.
    constexpr int64_t kTasks = 16;
    constexpr int64_t kLeastRows = 48;
    const int64_t wanted = (kTasks + p.batch - 1) / std::max<int64_t>(p.batch, 1);
    const int64_t most = std::max<int64_t>(1, rows_of_image(p) / kLeastRows);
    const int64_t splits = std::clamp<int64_t>(wanted, 1, most);
    p.rows_per_split = (rows_of_image(p) + splits - 1) / splits;
#else
    STD_TORCH_CHECK(pool_fits(p.channels, in.wide), kName, ": the CUDA kernels hold at most ",
                    in.wide ? 352 : 768, " channels, got ", p.channels);
    p.rows_per_split = pool_cuda_split(p.batch, in.query_rows(), rows_of_image(p));
#endif
    p.splits = (rows_of_image(p) + p.rows_per_split - 1) / p.rows_per_split;
    return in;
}

// Runs the kernels one after the other on either backend.
class Runner {
   public:
#if PVF_CPU_KERNELS
    explicit Runner(const Arguments& in)
        : in_(in),
          kernels_(PVF_CPU_KERNELS_OF(semantic_pool_attention_cpu)),
          products_(kName, in.weights[0], kernels_.products) {}

    void fold() const { each(kernels_.fold, in_.p.channels, 16); }
    void prepare() const { each(kernels_.prepare, in_.p.batch * in_.p.queries, 32); }
    void attend() const {
        each(kernels_.attend, in_.p.batch * in_.p.splits, 1);
        if (in_.p.splits > 1) {
            each(kernels_.combine, in_.p.batch * in_.query_rows(), 16);
        }
    }
    void attend_backward() const {
        each(kernels_.attend_backward, in_.p.batch * in_.p.splits, 1);
        if (in_.p.splits > 1) {
            each(kernels_.combine_backward, in_.p.batch * in_.query_rows(), 16);
        }
    }
    void finish() const { each(kernels_.finish, in_.p.batch * in_.p.queries, 32); }
    void unfold() const { each(kernels_.unfold, in_.p.channels, 48); }

   private:
    template <typename F>
    void each(const F& f, int64_t tasks, int64_t grain) const {
        if (tasks > 0) {
            torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
                f(in_.p, in_.wide, begin, end);
            });
        }
    }

    const Arguments& in_;
    const SemanticPoolCpu& kernels_;
    Products products_;
#else
    explicit Runner(const Arguments& in)
        : in_(in), scope_(in.tokens), products_(kName, in.weights[0], semantic_pool_product_cuda) {
        check_grid(kName, in.p.batch * std::max(in.query_rows(), rows_of_image(in.p)));
    }

    void fold() const { launch(semantic_pool_fold_cuda); }
    void prepare() const { launch(semantic_pool_prepare_cuda); }
    void attend() const { launch(semantic_pool_attend_cuda); }
    void attend_backward() const { launch(semantic_pool_attend_backward_cuda); }
    void finish() const { launch(semantic_pool_finish_cuda); }
    void unfold() const { launch(semantic_pool_unfold_cuda); }

   private:
    template <typename F>
    void launch(const F& f) const {
        check_launch(kName, f(in_.p, in_.wide, scope_.stream()));
    }

    const Arguments& in_;
    LaunchScope scope_;
    Products products_;
#endif

   public:
    // out (+)= rows @ weight^T or rows @ weight, for [B, M, C].
    void linear(const Tensor& rows, const Tensor& weight, const Tensor& out, bool transpose,
                bool accumulate) const {
        const StridedMatrix right = in_.matrix(weight);
        products_.run(in_.matrix(rows), transpose ? transposed(right) : right, in_.matrix(out),
                      all_of(in_.p.batch * in_.p.queries), all_of(in_.p.channels),
                      all_of(in_.p.channels), all_of(1), accumulate);
    }
    // slope^T @ rows, the gradient of a weight.
    void weight_slope(const Tensor& slope, const Tensor& rows, const Tensor& out) const {
        products_.run(transposed(in_.matrix(slope)), in_.matrix(rows), in_.matrix(out),
                      all_of(in_.p.channels), all_of(in_.p.batch * in_.p.queries),
                      all_of(in_.p.channels), all_of(1));
    }
    // [B, M, C] to [B, H, M, C]: the columns of a head times its rows of `weight`.
    void widen(const Tensor& rows, const Tensor& weight, const Tensor& out) const {
        products_.run(in_.by_head(rows), in_.weight_by_head(weight), in_.wide_by_head(out),
                      in_.images(), all_of(in_.width()), all_of(in_.p.channels),
                      all_of(in_.p.heads));
    }
    // Back: times the rows transposed.
    void narrow(const Tensor& wide_rows, const Tensor& weight, const Tensor& out,
                bool accumulate) const {
        products_.run(in_.wide_by_head(wide_rows), transposed(in_.weight_by_head(weight)),
                      in_.by_head(out), in_.images(), all_of(in_.p.channels), all_of(in_.width()),
                      all_of(in_.p.heads), accumulate);
    }
    void head_weight_slope(const Tensor& rows, const Tensor& wide_rows, const Tensor& out) const {
        products_.run(transposed(in_.by_head(rows)), in_.wide_by_head(wide_rows),
                      in_.weight_by_head(out), all_of(in_.width()), in_.images(),
                      all_of(in_.p.channels), all_of(in_.p.heads));
    }
    // Sum of the rows of [B, M, C].
    void bias_slope(const Tensor& slope, const Tensor& units, const Tensor& out) const {
        products_.add_up(view_of(slope), in_.p.batch * in_.p.queries, in_.p.channels,
                         view_of(units), in_.matrix(out), false);
    }
};

// Memory of the folded weights, which both directions make.
struct Folded {
    Tensor k;
    Tensor v;
    Tensor bias;

    Folded(Arguments& in, const Runner& runner) {
        auto& p = in.p;
        const int64_t c = p.channels;
        k = in.sums({c, c});
        v = p.norm ? in.sums({c, c}) : in.weights[2];
        bias = in.sums({c});
        p.k_folded = k.data_ptr();
        p.v_folded = v.data_ptr();
        p.v_bias_folded = bias.data_ptr();
        runner.fold();
    }
};

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs semantic_pool_attention(Tensor query, std::optional<Tensor> tokens_before, Tensor tokens,
                                Tensor q_weight, Tensor k_weight, Tensor v_weight,
                                Tensor proj_weight, std::optional<Tensor> q_bias,
                                std::optional<Tensor> k_bias, std::optional<Tensor> v_bias,
                                std::optional<Tensor> proj_bias, std::optional<Tensor> norm_weight,
                                std::optional<Tensor> norm_bias, int64_t num_heads, double eps,
                                double scale, bool keep) {
    Arguments in = describe(
        query, tokens_before, tokens, {q_weight, k_weight, v_weight, proj_weight},
        {q_bias, k_bias, v_bias, proj_bias}, norm_weight, norm_bias, num_heads, eps, scale);
    auto& p = in.p;
    const int64_t b = p.batch, m = p.queries, c = p.channels, r = in.query_rows();
    const Runner runner(in);
    const Folded folded(in, runner);
    const Tensor normal = in.sums({b, m, c});
    const Tensor q = in.sums({b, m, c});
    const Tensor mixed = in.sums({b, m, c});
    const Tensor out = in.sums({b, m, c});
    const Tensor u = in.sums({b, r, c});
    const Tensor context = in.sums({b, r, c});
    const Tensor peaks = in.sums({2, b, r});
    const Tensor moments = in.sums({keep && p.norm ? 2 : 0, b, rows_of_image(p)});
    const bool split = p.splits > 1;
    const Tensor partial = in.sums({split ? b : 0, p.splits, r, c});
    const Tensor partial_peaks = in.sums({split ? 2 : 0, b, p.splits, r});
    const auto half_of = [&](const Tensor& tensor, int64_t half) -> void* {
        const int64_t size = tensor.numel() / 2 * (in.wide ? 8 : 4);
        return tensor.numel() == 0 ? nullptr : static_cast<char*>(tensor.data_ptr()) + half * size;
    };
    p.query_norm = normal.data_ptr();
    p.q = q.data_ptr();
    p.mixed = mixed.data_ptr();
    p.out = out.data_ptr();
    p.u = u.data_ptr();
    p.context = context.data_ptr();
    p.peak = half_of(peaks, 0);
    p.total = half_of(peaks, 1);
    p.mean = half_of(moments, 0);
    p.rstd = half_of(moments, 1);
    p.partial = partial.data_ptr();
    p.partial_peak = half_of(partial_peaks, 0);
    p.partial_total = half_of(partial_peaks, 1);

    runner.prepare();
    runner.linear(normal, in.weights[0], q, true, true);
    runner.widen(q, folded.k, u);
    runner.attend();
    runner.narrow(context, folded.v, mixed, true);
    runner.linear(mixed, in.weights[3], out, true, true);
    const DType type = query.scalar_type();
    const Tensor result = type == in.sum_type() ? out : torch::stable::to(out, type);
    if (!keep) {
        const Tensor none = in.sums({0});
        return {result, none, in.sums({0}), in.sums({0}), in.sums({0}), in.sums({0})};
    }
    return {result, q, mixed, context, peaks, moments};
}

TensorList semantic_pool_attention_backward(
    Tensor grad, Tensor q, Tensor mixed, Tensor context, Tensor peaks, Tensor moments, Tensor query,
    std::optional<Tensor> tokens_before, Tensor tokens, Tensor q_weight, Tensor k_weight,
    Tensor v_weight, Tensor proj_weight, std::optional<Tensor> q_bias, std::optional<Tensor> k_bias,
    std::optional<Tensor> v_bias, std::optional<Tensor> proj_bias,
    std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, int64_t num_heads,
    double eps, double scale) {
    Arguments in = describe(
        query, tokens_before, tokens, {q_weight, k_weight, v_weight, proj_weight},
        {q_bias, k_bias, v_bias, proj_bias}, norm_weight, norm_bias, num_heads, eps, scale);
    auto& p = in.p;
    const int64_t b = p.batch, m = p.queries, c = p.channels, r = in.query_rows();
    const int64_t item = in.wide ? 8 : 4;
    const auto fits = [&](const Tensor& tensor, int64_t count) {
        return tensor.numel() == count && tensor.scalar_type() == in.sum_type() &&
               tensor.is_contiguous();
    };
    STD_TORCH_CHECK(fits(q, b * m * c) && fits(mixed, b * m * c) && fits(context, b * r * c) &&
                        fits(peaks, 2 * b * r) &&
                        fits(moments, p.norm ? 2 * b * rows_of_image(p) : 0),
                    "semantic_pool_attention_backward: what was kept must come from the forward "
                    "of the same arguments");
    STD_TORCH_CHECK(grad.dim() == 3 && grad.numel() == b * m * c,
                    "semantic_pool_attention_backward: `grad` must have shape [", b, ", ", m, ", ",
                    c, "]");
    const Tensor upstream = in.as_sums(grad);
    const Runner runner(in);
    const Folded folded(in, runner);
    const Tensor normal = in.sums({b, m, c});
    const Tensor u = in.sums({b, r, c});
    const Tensor d_mixed = in.sums({b, m, c});
    const Tensor d_context = in.sums({b, r, c});
    const Tensor d_u = in.sums({b, r, c});
    const Tensor d_q = in.sums({b, m, c});
    const Tensor d_normal = in.sums({b, m, c});
    const Tensor d_query = in.sums({b, m, c});
    const Tensor partial = in.sums({p.splits > 1 ? b : 0, p.splits, r, c});
    const Tensor delta = in.sums({PVF_CPU_KERNELS ? 0 : b, r});
    const Tensor d_scores = in.sums({PVF_CPU_KERNELS ? 0 : b, r, rows_of_image(p)});
    const Tensor units = ones(d_mixed, b * m);
    const Tensor d_before =
        empty(tokens_before ? *tokens_before : tokens, {tokens_before ? b : 0, p.before.count, c});
    const Tensor d_tokens = empty(tokens, {b, p.tokens.count, c});
    TensorList d_weights;
    TensorList d_biases;
    for (int i = 0; i < 4; ++i) {
        d_weights.push_back(in.sums({c, c}));
        // A key bias shifts all scores of a query alike: its gradient is zero.
        d_biases.push_back(i == 1 ? zeros(query, {c}, in.sum_type()) : in.sums({c}));
    }
    const Tensor d_gamma = in.sums({p.norm ? c : 0});
    const Tensor d_beta = in.sums({p.norm ? c : 0});
    p.query_norm = normal.data_ptr();
    p.u = u.data_ptr();
    p.context = context.data_ptr();
    p.peak = peaks.data_ptr();
    p.total = static_cast<char*>(peaks.data_ptr()) + b * r * item;
    p.mean = moments.data_ptr();
    p.rstd = static_cast<char*>(moments.data_ptr()) + moments.numel() / 2 * item;
    p.partial = partial.data_ptr();
    p.d_context = d_context.data_ptr();
    p.d_u = d_u.data_ptr();
    p.delta = delta.data_ptr();
    p.d_scores = d_scores.data_ptr();
    p.d_query_norm = d_normal.data_ptr();
    p.d_query = d_query.data_ptr();
    p.d_before = rows_of_tensor(d_before);
    p.d_tokens = rows_of_tensor(d_tokens);
    p.d_v_bias = d_biases[2].data_ptr();
    p.d_k_weight = d_weights[1].data_ptr();
    p.d_v_weight = d_weights[2].data_ptr();
    p.d_gamma = p.norm ? d_gamma.data_ptr() : nullptr;
    p.d_beta = p.norm ? d_beta.data_ptr() : nullptr;

    runner.prepare();
    runner.linear(upstream, in.weights[3], d_mixed, false, false);
    runner.weight_slope(upstream, mixed, d_weights[3]);
    runner.bias_slope(upstream, units, d_biases[3]);
    runner.bias_slope(d_mixed, units, d_biases[2]);
    runner.widen(q, folded.k, u);
    runner.widen(d_mixed, folded.v, d_context);
    runner.head_weight_slope(d_mixed, context, d_weights[2]);
    runner.attend_backward();
    runner.narrow(d_u, folded.k, d_q, false);
    runner.head_weight_slope(q, d_u, d_weights[1]);
    runner.linear(d_q, in.weights[0], d_normal, false, false);
    runner.weight_slope(d_q, normal, d_weights[0]);
    runner.bias_slope(d_q, units, d_biases[0]);
    runner.finish();
    runner.unfold();

    const auto as = [](const Tensor& tensor, const Tensor& like) {
        return tensor.scalar_type() == like.scalar_type()
                   ? tensor
                   : torch::stable::to(tensor, like.scalar_type());
    };
    TensorList out{as(d_query, query), d_before, d_tokens};
    const Tensor weights[4] = {q_weight, k_weight, v_weight, proj_weight};
    const std::optional<Tensor> biases[4] = {q_bias, k_bias, v_bias, proj_bias};
    for (int i = 0; i < 4; ++i) {
        out.push_back(as(d_weights[i], weights[i]));
    }
    for (int i = 0; i < 4; ++i) {
        out.push_back(as(d_biases[i], biases[i] ? *biases[i] : weights[i]));
    }
    out.push_back(as(d_gamma, norm_weight ? *norm_weight : q_weight));
    out.push_back(as(d_beta, norm_bias ? *norm_bias : q_weight));
    return out;
}

}  // namespace
}  // namespace pyvitfast

#if PVF_DEFINES_SCHEMAS
#define PVF_POOL_ARGUMENTS                                                                       \
    "Tensor query, Tensor? tokens_before, Tensor tokens, Tensor q_weight, Tensor k_weight, "     \
    "Tensor v_weight, Tensor proj_weight, Tensor? q_bias, Tensor? k_bias, Tensor? v_bias, "      \
    "Tensor? proj_bias, Tensor? norm_weight, Tensor? norm_bias, int num_heads, float eps, float" \
    " scale"

STABLE_TORCH_LIBRARY_FRAGMENT(pyvitfast, m) {
    m.def("semantic_pool_attention(" PVF_POOL_ARGUMENTS
          ", bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "semantic_pool_attention_backward(Tensor grad, Tensor q, Tensor mixed, Tensor context, "
        "Tensor peaks, Tensor moments, " PVF_POOL_ARGUMENTS ") -> Tensor[]");
}
#endif

PVF_IMPL(m) {
    m.impl("semantic_pool_attention", TORCH_BOX(&pyvitfast::semantic_pool_attention));
    m.impl("semantic_pool_attention_backward",
           TORCH_BOX(&pyvitfast::semantic_pool_attention_backward));
}
