#include "ops/adaptive_window_pool/adaptive_window_pool.h"

#include <tuple>

#include "adaptor.h"

namespace pyvitfast {

#if PVF_CPU_KERNELS
PVF_DECLARE_CPU_KERNELS(AdaptiveWindowPoolCpu, adaptive_window_pool_cpu)
#else
const char* adaptive_window_pool_weigh_cuda(const WindowPool& p, void* stream);
const char* adaptive_window_pool_cuda(const WindowPool& p, void* stream);
const char* adaptive_window_pool_spread_cuda(const WindowPool& p, void* stream);
const char* adaptive_window_pool_score_cuda(const WindowPool& p, void* stream);
#endif

namespace {

constexpr const char* kName = "adaptive_window_pool";

int64_t widest(int64_t cells, int64_t bins) {
    int64_t most = 0;
    for (int64_t bin = 0; bin < bins; ++bin) {
        const BinSpan span = bin_span(bin, cells, bins);
        most = std::max(most, span.end - span.begin);
    }
    return most;
}

WindowPool sized(const Tensor& like, int64_t batch, int64_t height, int64_t width, int64_t channels,
                 int64_t rows, int64_t cols, int64_t mode) {
    STD_TORCH_CHECK(rows >= 1 && cols >= 1, kName, ": `size` must be at least 1 by 1");
    STD_TORCH_CHECK(height >= 1 && width >= 1, kName, ": a grid needs at least one cell");
    STD_TORCH_CHECK(mode >= 0 && mode <= 2, kName, ": mode is out of range");
    STD_TORCH_CHECK(height * width < (int64_t{1} << 31), kName, ": the grid is too large");
    WindowPool p{};
    p.batch = batch;
    p.height = height;
    p.width = width;
    p.channels = channels;
    p.rows = rows;
    p.cols = cols;
    p.cell_rows = widest(height, rows);
    p.cell_cols = widest(width, cols);
    p.type = float_type(kName, like);
    p.mode = static_cast<PoolMode>(mode);
    return p;
}

DType sum_type(const WindowPool& p) {
    return p.type == FloatType::kFloat64 ? DType::Double : DType::Float;
}

Tensor with_dense_cells(const Tensor& x) {
    return x.size(3) <= 1 || x.stride(3) == 1 ? x : torch::stable::contiguous(x);
}

void read_from(WindowPool& p, const Tensor& x) {
    p.x = x.data_ptr();
    p.batch_stride = x.stride(0);
    p.row_stride = x.stride(1);
    p.cell_stride = x.stride(2);
}

// The third result is what the backward pass wants: softmax weights, or places of the greatest.
std::tuple<Tensor, Tensor> adaptive_window_pool(Tensor x, std::optional<Tensor> logits,
                                                int64_t rows, int64_t cols, int64_t mode,
                                                bool keep) {
    STD_TORCH_CHECK(x.dim() == 4, kName, ": `x` must have shape [B, H, W, C]");
    const Tensor dense = with_dense_cells(x);
    WindowPool p = sized(x, x.size(0), x.size(1), x.size(2), x.size(3), rows, cols, mode);
    read_from(p, dense);
    const Tensor out = empty(x, {p.batch, p.bins(), p.channels});
    p.out = out.data_ptr();
    const bool learned = p.mode == PoolMode::kLearned;
    std::optional<Tensor> given;
    Tensor kept;
    if (learned) {
        STD_TORCH_CHECK(logits.has_value(), kName, ": mode learned needs logits");
        given = torch::stable::contiguous(*logits);
        STD_TORCH_CHECK(given->dim() == 4 && given->size(0) == p.batch &&
                            given->size(1) == p.bins() && given->size(2) == p.cell_rows &&
                            given->size(3) == p.cell_cols && given->scalar_type() == sum_type(p),
                        kName, ": logits must have shape [B, bins, ", p.cell_rows, ", ",
                        p.cell_cols, "] and the dtype of sums");
        kept = empty(x, {p.batch, p.bins(), p.cell_rows, p.cell_cols}, sum_type(p));
        p.logits = given->data_ptr();
        p.weights = kept.data_ptr();
    } else {
        const bool places = keep && p.mode == PoolMode::kMax;
        kept = places ? empty(x, {p.batch, p.bins(), p.channels}, DType::Int)
                      : empty(x, {0}, DType::Int);
        p.places = places ? static_cast<int32_t*>(kept.data_ptr()) : nullptr;
    }
    if (p.batch == 0 || p.channels == 0) {
        return {out, learned ? zeros(x, {p.batch, p.bins(), p.cell_rows, p.cell_cols}, sum_type(p))
                             : kept};
    }
#if PVF_CPU_KERNELS
    const auto& kernels = PVF_CPU_KERNELS_OF(adaptive_window_pool_cpu);
    const int64_t work = p.cells() * p.channels;
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(work, 1));
    torch::stable::parallel_for(0, p.batch * p.bins(), grain, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            if (learned) {
                kernels.weigh(p, task / p.bins(), task % p.bins());
            }
            kernels.pool(p, task / p.bins(), task % p.bins());
        }
    });
#else
    check_grid(kName, p.batch * p.bins() * p.channels / kWindowPoolThreads + 1);
    LaunchScope scope(x);
    if (learned) {
        check_launch(kName, adaptive_window_pool_weigh_cuda(p, scope.stream()));
    }
    check_launch(kName, adaptive_window_pool_cuda(p, scope.stream()));
#endif
    return {out, kept};
}

// `x` is read for the gradient of logits only; `kept` is what the forward pass kept.
std::tuple<Tensor, Tensor> adaptive_window_pool_backward(Tensor grad, std::optional<Tensor> x,
                                                         Tensor kept, int64_t height, int64_t width,
                                                         int64_t rows, int64_t cols, int64_t mode) {
    STD_TORCH_CHECK(grad.dim() == 3, kName, ": the gradient must have shape [B, bins, C]");
    const Tensor upstream = torch::stable::contiguous(grad);
    WindowPool p = sized(grad, grad.size(0), height, width, grad.size(2), rows, cols, mode);
    STD_TORCH_CHECK(grad.size(1) == p.bins(), kName, ": the gradient must have a row for each bin");
    p.grad = upstream.data_ptr();
    const Tensor grad_x = empty(grad, {p.batch, height, width, p.channels});
    p.grad_x = grad_x.data_ptr();
    const Tensor saved = torch::stable::contiguous(kept);
    if (p.mode == PoolMode::kLearned) {
        STD_TORCH_CHECK(saved.numel() == p.batch * p.bins() * p.cells(), kName,
                        ": kept must be the weights");
        p.weights = saved.data_ptr();
    } else if (p.mode == PoolMode::kMax) {
        STD_TORCH_CHECK(saved.numel() == p.batch * p.bins() * p.channels, kName,
                        ": kept must be the places");
        p.places = static_cast<int32_t*>(saved.data_ptr());
    }
    const bool scores = p.mode == PoolMode::kLearned && x.has_value();
    const Tensor grad_logits =
        scores ? empty(grad, {p.batch, p.bins(), p.cell_rows, p.cell_cols}, sum_type(p))
               : empty(grad, {0}, sum_type(p));
    std::optional<Tensor> dense;
    if (scores) {
        dense = with_dense_cells(*x);
        STD_TORCH_CHECK(dense->dim() == 4 && dense->size(0) == p.batch &&
                            dense->size(1) == height && dense->size(2) == width &&
                            dense->size(3) == p.channels &&
                            dense->scalar_type() == grad.scalar_type(),
                        kName, ": `x` must be what was pooled");
        read_from(p, *dense);
        p.grad_logits = grad_logits.data_ptr();
    }
    if (p.batch == 0) {
        return {grad_x, grad_logits};
    }
    if (p.channels == 0) {
        return {grad_x,
                scores ? zeros(grad, {p.batch, p.bins(), p.cell_rows, p.cell_cols}, sum_type(p))
                       : grad_logits};
    }
#if PVF_CPU_KERNELS
    const auto& kernels = PVF_CPU_KERNELS_OF(adaptive_window_pool_cpu);
    const int64_t row_work = p.width * p.channels * 2;
    torch::stable::parallel_for(0, p.batch * height, std::max<int64_t>(1, 16384 / row_work),
                                [&](int64_t begin, int64_t end) {
                                    for (int64_t task = begin; task < end; ++task) {
                                        kernels.spread(p, task / height, task % height);
                                    }
                                });
    if (scores) {
        const int64_t work = p.cells() * p.channels;
        torch::stable::parallel_for(0, p.batch * p.bins(), std::max<int64_t>(1, 16384 / work),
                                    [&](int64_t begin, int64_t end) {
                                        for (int64_t task = begin; task < end; ++task) {
                                            kernels.score(p, task / p.bins(), task % p.bins());
                                        }
                                    });
    }
#else
    check_grid(kName, p.batch * height * width * p.channels / kWindowPoolThreads + 1);
    LaunchScope scope(grad);
    check_launch(kName, adaptive_window_pool_spread_cuda(p, scope.stream()));
    if (scores) {
        check_launch(kName, adaptive_window_pool_score_cuda(p, scope.stream()));
    }
#endif
    return {grad_x, grad_logits};
}

}  // namespace
}  // namespace pyvitfast

#if PVF_DEFINES_SCHEMAS
STABLE_TORCH_LIBRARY_FRAGMENT(pyvitfast, m) {
    m.def(
        "adaptive_window_pool(Tensor x, Tensor? logits, int rows, int cols, int mode, bool keep) "
        "-> (Tensor, Tensor)");
    m.def(
        "adaptive_window_pool_backward(Tensor grad, Tensor? x, Tensor kept, SymInt height, SymInt "
        "width, int rows, int cols, int mode) -> (Tensor, Tensor)");
}
#endif

PVF_IMPL(m) {
    m.impl("adaptive_window_pool", TORCH_BOX(&pyvitfast::adaptive_window_pool));
    m.impl("adaptive_window_pool_backward", TORCH_BOX(&pyvitfast::adaptive_window_pool_backward));
}
