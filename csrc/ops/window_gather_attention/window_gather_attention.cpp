#include "ops/window_gather_attention/window_gather_attention.h"

#include "attention_call.h"
#include "ops/window_gather_attention/window_gather_attention_math.h"

namespace pyvitfast {

#if PVF_CPU_KERNELS
PVF_DECLARE_CPU_KERNELS(AttentionCpu, window_gather_attention_cpu)
#else
extern const AttentionCuda window_gather_attention_cuda;
#endif

namespace {

constexpr const char* kName = "window_gather_attention";

AttentionCall call_for(const Tensor& q) {
#if PVF_CPU_KERNELS
    return {kName, q, PVF_CPU_KERNELS_OF(window_gather_attention_cpu), false};
#else
    return {kName, q, window_gather_attention_cuda, false};
#endif
}

// [B, rows of windows, columns of windows, R, H, D].
AttentionRows rows_of(const Tensor& tensor) {
    return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1),
            tensor.stride(2),  tensor.stride(3), tensor.stride(4)};
}

// [B, lines, columns, H, D].
AttentionRows keys_of(const Tensor& tensor) {
    return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2), 0,
            tensor.stride(3)};
}

struct Shapes {
    std::vector<int64_t> queries;
    std::vector<int64_t> keys;
    std::vector<int64_t> before;
};

Shapes describe(AttentionCall& call, const Tensor& q, const Tensor& k, const Tensor& v,
                const std::optional<Tensor>& k_before, const std::optional<Tensor>& v_before,
                const IntList& window, const IntList& stride, const IntList& offset,
                int64_t valid_h, int64_t valid_w, double scale) {
    STD_TORCH_CHECK(q.dim() == 6 && k.dim() == 5, kName, ": `q` must have rank 6 and `k` rank 5");
    STD_TORCH_CHECK(window.size() == 2 && stride.size() == 2 && offset.size() == 2, kName,
                    ": window, stride and offset are two numbers each");
    auto& p = call.params;
    p.batch = q.size(0);
    p.queries = q.size(3);
    p.heads = q.size(4);
    p.width = q.size(5);
    const int64_t valid[2] = {valid_h, valid_w};
    for (int axis = 0; axis < 2; ++axis) {
        const auto i = static_cast<size_t>(axis);
        STD_TORCH_CHECK(set_axis(p, axis, q.size(1 + axis), k.size(1 + axis), valid[axis],
                                 window[i], stride[i], offset[i]),
                        kName,
                        ": windows and strides are at least 1, and `valid_hw` at most the grid");
    }
    p.scale = scale;
    Shapes shapes{{p.batch, p.windows[0], p.windows[1], p.queries, p.heads, p.width},
                  {p.batch, p.grid[0], p.grid[1], p.heads, p.width},
                  {}};
    call.check_shape(k, shapes.keys, "k");
    call.check_shape(v, shapes.keys, "v");
    p.q = rows_of(call.dense(q, "q"));
    p.k = keys_of(call.dense(k, "k"));
    p.v = keys_of(call.dense(v, "v"));
    STD_TORCH_CHECK(k_before.has_value() == v_before.has_value(), kName,
                    ": `k_before` and `v_before` go together");
    shapes.before = shapes.queries;
    if (k_before) {
        p.before = k_before->dim() == 6 ? k_before->size(3) : -1;
        shapes.before[3] = p.before;
        call.check_shape(*k_before, shapes.before, "k_before");
        call.check_shape(*v_before, shapes.before, "v_before");
        p.k_before = rows_of(call.dense(*k_before, "k_before"));
        p.v_before = rows_of(call.dense(*v_before, "v_before"));
    }
    shapes.before[3] = p.before;
    return shapes;
}

std::vector<int64_t> lse_shape(const AttentionParams& p) {
    return {p.batch, p.windows[0], p.windows[1], p.heads, p.queries};
}

std::tuple<Tensor, Tensor> window_gather_attention(Tensor q, Tensor k, Tensor v,
                                                   std::optional<Tensor> k_before,
                                                   std::optional<Tensor> v_before, IntList window,
                                                   IntList stride, IntList offset, int64_t valid_h,
                                                   int64_t valid_w, double scale) {
    AttentionCall call = call_for(q);
    const Shapes shapes = describe(call, q, k, v, k_before, v_before, window, stride, offset,
                                   valid_h, valid_w, scale);
    Tensor o = empty(q, shapes.queries);
    Tensor lse = call.sums(lse_shape(call.params));
    call.params.o = rows_of(o);
    call.params.lse = lse.data_ptr();
    call.forward();
    return {o, lse};
}

TensorList window_gather_attention_backward(Tensor grad, Tensor o, Tensor lse, Tensor q, Tensor k,
                                            Tensor v, std::optional<Tensor> k_before,
                                            std::optional<Tensor> v_before, IntList window,
                                            IntList stride, IntList offset, int64_t valid_h,
                                            int64_t valid_w, double scale) {
    AttentionCall call = call_for(q);
    const Shapes shapes = describe(call, q, k, v, k_before, v_before, window, stride, offset,
                                   valid_h, valid_w, scale);
    auto& p = call.params;
    call.check_shape(grad, shapes.queries, "grad");
    call.check_shape(o, shapes.queries, "o");
    call.check_shape(lse, lse_shape(p), "lse");
    STD_TORCH_CHECK(lse.scalar_type() == call.sum_type(), kName,
                    ": `lse` must have the dtype of the sums");
    const Tensor slope = call.dense(grad, "grad");
    const Tensor out = call.dense(o, "o");
    const Tensor kept = torch::stable::contiguous(lse);
    p.d_o = rows_of(slope);
    p.o = rows_of(out);
    p.lse = kept.data_ptr();
    Tensor d_q = empty(q, shapes.queries);
    Tensor d_k = empty(q, shapes.keys);
    Tensor d_v = empty(q, shapes.keys);
    Tensor d_k_before = empty(q, shapes.before);
    Tensor d_v_before = empty(q, shapes.before);
    p.d_q = rows_of(d_q);
    p.d_k = keys_of(d_k);
    p.d_v = keys_of(d_v);
    p.d_k_before = rows_of(d_k_before);
    p.d_v_before = rows_of(d_v_before);
    call.backward();
    return {d_q, d_k, d_v, d_k_before, d_v_before};
}

}  // namespace
}  // namespace pyvitfast

#if PVF_DEFINES_SCHEMAS
#define PVF_GATHER_ARGUMENTS                                                               \
    "Tensor q, Tensor k, Tensor v, Tensor? k_before, Tensor? v_before, int[] key_window, " \
    "int[] key_stride, int[] key_offset, SymInt valid_h, SymInt valid_w, float scale"

STABLE_TORCH_LIBRARY_FRAGMENT(pyvitfast, m) {
    m.def("window_gather_attention(" PVF_GATHER_ARGUMENTS ") -> (Tensor, Tensor)");
    m.def(
        "window_gather_attention_backward(Tensor grad, Tensor o, Tensor lse, " PVF_GATHER_ARGUMENTS
        ") -> Tensor[]");
}
#endif

PVF_IMPL(m) {
    m.impl("window_gather_attention", TORCH_BOX(&pyvitfast::window_gather_attention));
    m.impl("window_gather_attention_backward",
           TORCH_BOX(&pyvitfast::window_gather_attention_backward));
}
