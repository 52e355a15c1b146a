#include "ops/few_query_attention/few_query_attention.h"

#include "attention_call.h"
#include "ops/few_query_attention/few_query_attention_math.h"

namespace pyvitfast {

#if PVF_CPU_KERNELS
PVF_DECLARE_CPU_KERNELS(AttentionCpu, few_query_attention_cpu)
#else
extern const AttentionCuda few_query_attention_cuda;
#endif

namespace {

constexpr const char* kName = "few_query_attention";

AttentionCall call_for(const Tensor& q) {
#if PVF_CPU_KERNELS
    return {kName, q, PVF_CPU_KERNELS_OF(few_query_attention_cpu), true};
#else
    return {kName, q, few_query_attention_cuda, true};
#endif
}

// [B, H, R, D] as the rows of one window.
AttentionRows rows_of(const Tensor& tensor) {
    return {tensor.data_ptr(), tensor.stride(0), 0, 0, tensor.stride(2), tensor.stride(1)};
}

// [B, H, N, D] as a line of keys.
AttentionRows keys_of(const Tensor& tensor) {
    return {tensor.data_ptr(), tensor.stride(0), 0, tensor.stride(2), 0, tensor.stride(1)};
}

// [B, R, H, D], dense, as rows or as a line of keys.
AttentionRows dense_rows(const Tensor& tensor) {
    return {tensor.data_ptr(), tensor.stride(0), 0, 0, tensor.stride(1), tensor.stride(2)};
}
AttentionRows dense_keys(const Tensor& tensor) {
    return {tensor.data_ptr(), tensor.stride(0), 0, tensor.stride(1), 0, tensor.stride(2)};
}

void describe(AttentionCall& call, const Tensor& q, const Tensor& k, const Tensor& v,
              const std::optional<Tensor>& bias, const std::optional<Tensor>& k_before,
              const std::optional<Tensor>& v_before, double scale) {
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, kName, ": `q` and `k` must have rank 4");
    auto& p = call.params;
    p.batch = q.size(0);
    p.heads = q.size(1);
    p.queries = q.size(2);
    p.width = q.size(3);
    const int64_t keys = k.size(2);
    call.check_shape(k, {p.batch, p.heads, keys, p.width}, "k");
    call.check_shape(v, {p.batch, p.heads, keys, p.width}, "v");
    set_one_window(p, keys);
    p.scale = scale;
    p.q = rows_of(call.dense(q, "q"));
    p.k = keys_of(call.dense(k, "k"));
    p.v = keys_of(call.dense(v, "v"));
    STD_TORCH_CHECK(k_before.has_value() == v_before.has_value(), kName,
                    ": `k_before` and `v_before` go together");
    if (k_before) {
        p.before = k_before->dim() == 4 ? k_before->size(2) : -1;
        call.check_shape(*k_before, {p.batch, p.heads, p.before, p.width}, "k_before");
        call.check_shape(*v_before, {p.batch, p.heads, p.before, p.width}, "v_before");
        p.k_before = rows_of(call.dense(*k_before, "k_before"));
        p.v_before = rows_of(call.dense(*v_before, "v_before"));
    }
    if (bias) {
        const int64_t whole[4] = {p.batch, p.heads, p.queries, p.before + keys};
        int64_t strides[4] = {};
        STD_TORCH_CHECK(bias->dim() == 4, kName, ": `bias` must have rank 4");
        for (int64_t i = 0; i < 4; ++i) {
            const int64_t size = bias->size(i);
            STD_TORCH_CHECK(size == whole[i] || size == 1, kName, ": `bias` has the wrong shape");
            strides[i] = size == 1 ? 0 : bias->stride(i);
        }
        STD_TORCH_CHECK(
            (bias->scalar_type() == DType::Double) == (q.scalar_type() == DType::Double), kName,
            ": float64 cannot be mixed with other dtypes in one call");
        p.bias = {bias->data_ptr(), strides[0], strides[1],
                  strides[2],       strides[3], float_type(kName, *bias)};
    }
}

std::tuple<Tensor, Tensor> few_query_attention(Tensor q, Tensor k, Tensor v,
                                               std::optional<Tensor> bias,
                                               std::optional<Tensor> k_before,
                                               std::optional<Tensor> v_before, double scale) {
    AttentionCall call = call_for(q);
    describe(call, q, k, v, bias, k_before, v_before, scale);
    auto& p = call.params;
    Tensor o = empty(q, {p.batch, p.queries, p.heads, p.width});
    Tensor lse = call.sums({p.batch, p.heads, p.queries});
    p.o = dense_rows(o);
    p.lse = lse.data_ptr();
    call.forward();
    return {o, lse};
}

TensorList few_query_attention_backward(Tensor grad, Tensor grad_lse, Tensor o, Tensor lse,
                                        Tensor q, Tensor k, Tensor v, std::optional<Tensor> bias,
                                        std::optional<Tensor> k_before,
                                        std::optional<Tensor> v_before, double scale,
                                        bool bias_slope) {
    AttentionCall call = call_for(q);
    describe(call, q, k, v, bias, k_before, v_before, scale);
    auto& p = call.params;
    const int64_t keys = k.size(2);
    call.check_shape(grad, {p.batch, p.queries, p.heads, p.width}, "grad");
    call.check_shape(o, {p.batch, p.queries, p.heads, p.width}, "o");
    call.check_shape(lse, {p.batch, p.heads, p.queries}, "lse");
    call.check_shape(grad_lse, {p.batch, p.heads, p.queries}, "grad_lse");
    STD_TORCH_CHECK(
        lse.scalar_type() == call.sum_type() && grad_lse.scalar_type() == call.sum_type(), kName,
        ": `lse` and its gradient must have the dtype of the sums");
    const Tensor slope = call.dense(grad, "grad");
    const Tensor out = call.dense(o, "o");
    const Tensor kept = torch::stable::contiguous(lse);
    const Tensor lse_slope = torch::stable::contiguous(grad_lse);
    p.d_o = dense_rows(slope);
    p.o = dense_rows(out);
    p.lse = kept.data_ptr();
    p.d_lse = lse_slope.data_ptr();
    Tensor d_q = empty(q, {p.batch, p.queries, p.heads, p.width});
    Tensor d_k = empty(q, {p.batch, keys, p.heads, p.width});
    Tensor d_v = empty(q, {p.batch, keys, p.heads, p.width});
    Tensor d_k_before = empty(q, {p.batch, p.before, p.heads, p.width});
    Tensor d_v_before = empty(q, {p.batch, p.before, p.heads, p.width});
    const bool wanted = bias && bias_slope;
    Tensor d_bias =
        empty(wanted ? *bias : q, {p.batch, p.heads, p.queries, wanted ? p.before + keys : 0});
    p.d_q = dense_rows(d_q);
    p.d_k = dense_keys(d_k);
    p.d_v = dense_keys(d_v);
    p.d_k_before = dense_rows(d_k_before);
    p.d_v_before = dense_rows(d_v_before);
    p.d_bias = wanted ? d_bias.data_ptr() : nullptr;
    call.backward();
    return {d_q, d_k, d_v, d_k_before, d_v_before, d_bias};
}

}  // namespace
}  // namespace pyvitfast

#if PVF_DEFINES_SCHEMAS
#define PVF_ATTENTION_ARGUMENTS                                                              \
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? k_before, Tensor? v_before, float " \
    "scale"

STABLE_TORCH_LIBRARY_FRAGMENT(pyvitfast, m) {
    m.def("few_query_attention(" PVF_ATTENTION_ARGUMENTS ") -> (Tensor, Tensor)");
    m.def(
        "few_query_attention_backward(Tensor grad, Tensor grad_lse, Tensor o, Tensor "
        "lse, " PVF_ATTENTION_ARGUMENTS ", bool bias_slope) -> Tensor[]");
}
#endif

PVF_IMPL(m) {
    m.impl("few_query_attention", TORCH_BOX(&pyvitfast::few_query_attention));
    m.impl("few_query_attention_backward", TORCH_BOX(&pyvitfast::few_query_attention_backward));
}
