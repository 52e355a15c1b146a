#include "ops/kron_grow/kron_grow.h"

#include <numeric>

#include "growth.h"

namespace pyvitfast {

#if PVF_CPU_KERNELS
PVF_DECLARE_CPU_KERNELS(KronGrowCpu, kron_grow_cpu)
#else
const char* kron_grow_cuda(const StridedProduct& product, void* stream);
#endif

namespace {

constexpr const char* kName = "kron_grow";

struct Kron : KronSizes {
    Tensor weight, a, b, d;
    Factors factors;
    bool identity = false;

    int64_t source() const { return out1 * in1; }
    int64_t target() const { return out2 * in2; }
    bool depth_first() const { return identity || kron_depth_first(*this, factors); }
};

Kron describe(const Tensor& weight, const Tensor& a, const Tensor& b, const Tensor& d,
              int64_t factors, bool identity) {
    STD_TORCH_CHECK(weight.dim() == 4 && a.dim() == 3 && b.dim() == 3 && d.dim() == 3 &&
                        factors >= 0 && factors <= 2,
                    kName, ": `weight` has 4 dimensions, factors and depth have 3");
    const FloatType type = float_type(kName, weight);
    STD_TORCH_CHECK(type == FloatType::kFloat32 || type == FloatType::kFloat64, kName,
                    ": dtype must be float32 or float64");
    for (const Tensor* tensor : {&a, &b, &d}) {
        STD_TORCH_CHECK(tensor->scalar_type() == weight.scalar_type(), kName,
                        ": all tensors must have one dtype");
    }
    Kron k{
        {weight.size(0), weight.size(1), weight.size(2), weight.size(3), d.size(1),
         b.size(1) + (identity ? weight.size(2) : 0), a.size(1) + (identity ? weight.size(3) : 0)},
        torch::stable::contiguous(weight),
        torch::stable::contiguous(a),
        torch::stable::contiguous(b),
        torch::stable::contiguous(d),
        static_cast<Factors>(factors),
        identity};
    STD_TORCH_CHECK(!identity || k.factors != Factors::kSource, kName,
                    ": with an identity on top, factors must not be the source's");
    const int64_t count = k.factors == Factors::kShared   ? 1
                          : k.factors == Factors::kSource ? k.layers1
                                                          : k.layers2;
    STD_TORCH_CHECK(a.size(0) == count && b.size(0) == count && a.size(2) == k.in1 &&
                        b.size(2) == k.out1 && d.size(0) == k.types && d.size(2) == k.layers1,
                    kName, ": sizes of factors, depth and source do not fit");
    return k;
}

Products products_of([[maybe_unused]] const Kron& k) {
#if PVF_CPU_KERNELS
    return Products(kName, k.weight, PVF_CPU_KERNELS_OF(kron_grow_cpu).products);
#else
    return Products(kName, k.weight, kron_grow_cuda);
#endif
}

StridedMatrix rows_of_view(const View& view, int64_t cols, Stride batch, int64_t offset = 0) {
    return view.matrix({cols, 0}, {1, 0}, batch, offset);
}

StridedMatrix transposed(StridedMatrix matrix) {
    std::swap(matrix.row, matrix.col);
    return matrix;
}

// The steps of both passes over `count` matrices of one type, from layer `first` on.
class Steps {
   public:
    Steps(const Kron& k, const Products& products) : k_(k), products_(products) {}

    // Layers of every type mixed: from [types, layers, size] to the other side's layers.
    void mix(const View& from, const View& to, int64_t size, bool back, bool onto = false) const {
        const int64_t before = back ? k_.layers2 : k_.layers1;
        const int64_t after = back ? k_.layers1 : k_.layers2;
        StridedMatrix depth = rows_of_view(view_of(k_.d), k_.layers1, {k_.layers1 * k_.layers2, 0});
        StridedProduct p{};
        p.a = back ? transposed(depth) : depth;
        p.b = rows_of_view(from, size, {before * size, 0});
        p.c = rows_of_view(to, size, {after * size, 0});
        p.rows = all_of(after);
        p.depth = all_of(before);
        p.cols = all_of(size);
        p.batch = all_of(k_.types);
        p.accumulate = onto;
        products_.run(p);
    }

    // Layers mixed into the corners of the target, [types, layers2, out2, in2].
    void mix_into_corners(const View& target) const {
        StridedProduct p{};
        p.a = rows_of_view(view_of(k_.d), k_.layers1, {k_.layers1 * k_.layers2, 0});
        p.b = rows_of_view(view_of(k_.weight), k_.source(), {k_.layers1 * k_.source(), 0});
        p.b.col.outer = k_.in1;
        p.c = target.matrix({k_.target(), 0}, {1, k_.in2}, {k_.layers2 * k_.target(), 0});
        p.rows = all_of(k_.layers2);
        p.depth = all_of(k_.layers1);
        p.cols = {k_.source(), k_.in1};
        p.batch = all_of(k_.types);
        products_.run(p);
    }

    // What is right of the corners, then all that is below.
    void widen_corners(const View& target, int64_t at, int64_t first, int64_t count) const {
        StridedProduct p{};
        p.a = rows_of_view(target, k_.in2, {k_.target(), 0}, at);
        p.b = transposed(factor(k_.a, k_.in2 - k_.in1, k_.in1, first));
        p.c = rows_of_view(target, k_.in2, {k_.target(), 0}, at + k_.in1);
        p.rows = all_of(k_.out1);
        p.depth = all_of(k_.in1);
        p.cols = all_of(k_.in2 - k_.in1);
        p.batch = all_of(count);
        products_.run(p);
        StridedProduct q{};
        q.a = factor(k_.b, k_.out2 - k_.out1, k_.out1, first);
        q.b = rows_of_view(target, k_.in2, {k_.target(), 0}, at);
        q.c = rows_of_view(target, k_.in2, {k_.target(), 0}, at + k_.out1 * k_.in2);
        q.rows = all_of(k_.out2 - k_.out1);
        q.depth = all_of(k_.out1);
        q.cols = all_of(k_.in2);
        q.batch = all_of(count);
        products_.run(q);
    }

    // Both factors on matrices [count, out1, in1] at `source`; `between` holds [count, ...].
    void widen(const View& source, int64_t from, const View& between, const View& target,
               int64_t to, int64_t first, int64_t count) const {
        if (kron_right_first(k_) <= kron_left_first(k_)) {
            right(source, from, between, first, count);
            StridedProduct p = left(first, count);
            p.b = rows_of_view(between, k_.in2, {k_.out1 * k_.in2, 0});
            p.c = rows_of_view(target, k_.in2, {k_.target(), 0}, to);
            p.cols = all_of(k_.in2);
            products_.run(p);
            return;
        }
        StridedProduct p = left(first, count);
        p.b = rows_of_view(source, k_.in1, {k_.source(), 0}, from);
        p.c = rows_of_view(between, k_.in1, {k_.out2 * k_.in1, 0});
        p.cols = all_of(k_.in1);
        products_.run(p);
        StridedProduct q{};
        q.a = rows_of_view(between, k_.in1, {k_.out2 * k_.in1, 0});
        q.b = transposed(factor(k_.a, k_.in2, k_.in1, first));
        q.c = rows_of_view(target, k_.in2, {k_.target(), 0}, to);
        q.rows = all_of(k_.out2);
        q.depth = all_of(k_.in1);
        q.cols = all_of(k_.in2);
        q.batch = all_of(count);
        products_.run(q);
    }

    // S A^T, [count, out1, in2]
    void right(const View& source, int64_t from, const View& to, int64_t first,
               int64_t count) const {
        StridedProduct p{};
        p.a = rows_of_view(source, k_.in1, {k_.source(), 0}, from);
        p.b = transposed(factor(k_.a, k_.in2, k_.in1, first));
        p.c = rows_of_view(to, k_.in2, {k_.out1 * k_.in2, 0});
        p.rows = all_of(k_.out1);
        p.depth = all_of(k_.in1);
        p.cols = all_of(k_.in2);
        p.batch = all_of(count);
        products_.run(p);
    }

    // B^T G, [count, out1, in2]
    void left_back(const View& grad, int64_t from, const View& to, int64_t first,
                   int64_t count) const {
        StridedProduct p{};
        p.a = transposed(factor(k_.b, k_.out2, k_.out1, first));
        p.b = rows_of_view(grad, k_.in2, {k_.target(), 0}, from);
        p.c = rows_of_view(to, k_.in2, {k_.out1 * k_.in2, 0});
        p.rows = all_of(k_.out1);
        p.depth = all_of(k_.out2);
        p.cols = all_of(k_.in2);
        p.batch = all_of(count);
        products_.run(p);
    }

    // Times A, [count, out1, in1]
    void right_back(const View& half, const View& to, int64_t at, int64_t first,
                    int64_t count) const {
        StridedProduct p{};
        p.a = rows_of_view(half, k_.in2, {k_.out1 * k_.in2, 0});
        p.b = factor(k_.a, k_.in2, k_.in1, first);
        p.c = rows_of_view(to, k_.in1, {k_.source(), 0}, at);
        p.rows = all_of(k_.out1);
        p.depth = all_of(k_.in2);
        p.cols = all_of(k_.in1);
        p.batch = all_of(count);
        products_.run(p);
    }

    // Onto the gradient of a factor: the sum over matrices and `inner` of left[.., i] right[.., j].
    void factor_gradient(StridedMatrix left, StridedMatrix right, const Tensor& grad, int64_t inner,
                         int64_t first, int64_t count) const {
        const int64_t rows = grad.size(1);
        const int64_t cols = grad.size(2);
        StridedProduct p{};
        p.a = transposed(left);
        p.b = right;
        p.rows = all_of(rows);
        p.cols = all_of(cols);
        p.accumulate = true;
        if (k_.factors == Factors::kShared) {
            p.a.col.outer = left.batch.inner;
            p.b.row.outer = right.batch.inner;
            p.a.batch = p.b.batch = {};
            p.c = rows_of_view(view_of(grad), cols, {});
            p.depth = {count * inner, inner};
            p.batch = all_of(1);
        } else {
            p.c = rows_of_view(view_of(grad), cols, {rows * cols, 0}, first * rows * cols);
            p.depth = all_of(inner);
            p.batch = all_of(count);
        }
        products_.run(p);
    }

    // Of the depth of one type: every matrix of the target's layers times every one of the
    // source's.
    void depth_gradient(const View& targets, int64_t target_at, const View& sources,
                        int64_t source_at, int64_t rows, int64_t cols, const View& parts,
                        const View& ones, const View& grad, int64_t type) const {
        // Sums in parts of whole rows, added up in order.
        const int64_t size = std::gcd(rows, int64_t{32}) * cols;
        const int64_t count = rows * cols / size;
        const int64_t layers = k_.layers1 * k_.layers2;
        StridedProduct p{};
        p.a = targets.matrix({rows * cols, 0}, {1, 0}, {size, 0}, target_at);
        p.b = sources.matrix({1, 0}, {rows * cols, 0}, {size, 0}, source_at);
        p.c = rows_of_view(parts, k_.layers1, {layers, 0});
        p.rows = all_of(k_.layers2);
        p.cols = all_of(k_.layers1);
        p.depth = all_of(size);
        p.batch = all_of(count);
        products_.run(p);
        StridedProduct q{};
        q.a = ones.matrix({0, 0}, {1, 0});
        q.b = rows_of_view(parts, layers, {});
        q.c = rows_of_view(grad, layers, {}, type * layers);
        q.rows = all_of(1);
        q.cols = all_of(layers);
        q.depth = all_of(count);
        q.batch = all_of(1);
        products_.run(q);
    }

   private:
    StridedMatrix factor(const Tensor& tensor, int64_t rows, int64_t cols, int64_t first) const {
        const bool shared = k_.factors == Factors::kShared;
        return rows_of_view(view_of(tensor), cols, {shared ? 0 : rows * cols, 0},
                            shared ? 0 : first * rows * cols);
    }
    StridedProduct left(int64_t first, int64_t count) const {
        StridedProduct p{};
        p.a = factor(k_.b, k_.out2, k_.out1, first);
        p.rows = all_of(k_.out2);
        p.depth = all_of(k_.out1);
        p.batch = all_of(count);
        return p;
    }

    const Kron& k_;
    const Products& products_;
};

template <typename F>
void for_each_chunk(const Kron& k, int64_t layers, const F& f) {
    for (int64_t type = 0; type < k.types; ++type) {
        for (int64_t first = 0; first < layers; first += kKronAtOnce) {
            f(type, first, std::min(kKronAtOnce, layers - first));
        }
    }
}

Tensor kron_grow(Tensor weight, Tensor a, Tensor b, Tensor d, int64_t factors, bool identity) {
    const Kron k = describe(weight, a, b, d, factors, identity);
    const Tensor out = empty(weight, {k.types, k.layers2, k.out2, k.in2});
    if (out.numel() == 0) {
        return out;
    }
    const Products products = products_of(k);
    const Steps steps(k, products);
    if (identity) {
        steps.mix_into_corners(view_of(out));
        for_each_chunk(k, k.layers2, [&](int64_t type, int64_t first, int64_t count) {
            steps.widen_corners(view_of(out), (type * k.layers2 + first) * k.target(), first,
                                count);
        });
        return out;
    }
    const bool depth_first = k.depth_first();
    const int64_t layers = depth_first ? k.layers2 : k.layers1;
    const Tensor between = empty(weight, {kKronAtOnce * std::max(k.out1 * k.in2, k.out2 * k.in1)});
    const Tensor mixed =
        empty(weight, {k.types * layers * (depth_first ? k.source() : k.target())});
    if (depth_first) {
        steps.mix(view_of(k.weight), view_of(mixed), k.source(), false);
    }
    const Tensor& source = depth_first ? mixed : k.weight;
    const Tensor& target = depth_first ? out : mixed;
    for_each_chunk(k, layers, [&](int64_t type, int64_t first, int64_t count) {
        const int64_t at = type * layers + first;
        steps.widen(view_of(source), at * k.source(), view_of(between), view_of(target),
                    at * k.target(), first, count);
    });
    if (!depth_first) {
        steps.mix(view_of(mixed), view_of(out), k.target(), false);
    }
    return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> kron_grow_backward(Tensor grad, Tensor weight, Tensor a,
                                                              Tensor b, Tensor d, int64_t factors,
                                                              bool of_source) {
    const Kron k = describe(weight, a, b, d, factors, false);
    const Tensor given = torch::stable::contiguous(grad);
    STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == k.types && grad.size(1) == k.layers2 &&
                        grad.size(2) == k.out2 && grad.size(3) == k.in2 &&
                        grad.scalar_type() == weight.scalar_type(),
                    kName, ": the gradient must have the shape and dtype of the result");
    const Tensor d_source = of_source ? zeros_as(k.weight) : empty(weight, {0});
    const Tensor d_a = zeros_as(k.a);
    const Tensor d_b = zeros_as(k.b);
    const Tensor d_d = zeros_as(k.d);
    if (given.numel() == 0 || k.weight.numel() == 0) {
        return {d_source, d_a, d_b, d_d};
    }
    const Products products = products_of(k);
    const Steps steps(k, products);
    const bool depth_first = k.depth_first();
    const int64_t layers = depth_first ? k.layers2 : k.layers1;
    const int64_t half_size = k.out1 * k.in2;
    const Tensor half = empty(weight, {kKronAtOnce * half_size});
    const Tensor other = empty(weight, {kKronAtOnce * std::max(half_size, k.out2 * k.in1)});
    // Of the source side: what the factors read, and its gradient. Of the target side with the
    // factors first: what they made, or its gradient.
    const Tensor read = depth_first ? empty(weight, {k.types * layers * k.source()}) : k.weight;
    const Tensor d_read =
        !depth_first && of_source ? d_source : empty(weight, {k.types * layers * k.source()});
    const Tensor made = depth_first ? given : empty(weight, {k.types * layers * k.target()});
    const int64_t rows = depth_first ? k.out1 : k.out2;
    const int64_t cols = depth_first ? k.in1 : k.in2;
    const int64_t count_of_parts = rows / std::gcd(rows, int64_t{32});
    const Tensor parts = empty(weight, {count_of_parts * k.layers1 * k.layers2});
    const Tensor units = ones(weight, count_of_parts);
    const auto of_depth = [&](const View& targets, const View& sources) {
        for (int64_t type = 0; type < k.types; ++type) {
            steps.depth_gradient(targets, type * k.layers2 * rows * cols, sources,
                                 type * k.layers1 * rows * cols, rows, cols, view_of(parts),
                                 view_of(units), view_of(d_d), type);
        }
    };
    if (depth_first) {
        steps.mix(view_of(k.weight), view_of(read), k.source(), false);
    } else {
        for_each_chunk(k, layers, [&](int64_t type, int64_t first, int64_t count) {
            const int64_t at = type * layers + first;
            steps.widen(view_of(read), at * k.source(), view_of(other), view_of(made),
                        at * k.target(), first, count);
        });
        of_depth(view_of(given), view_of(made));
        steps.mix(view_of(given), view_of(made), k.target(), true);
    }
    for_each_chunk(k, layers, [&](int64_t type, int64_t first, int64_t count) {
        const int64_t at = type * layers + first;
        steps.left_back(view_of(made), at * k.target(), view_of(half), first, count);
        steps.factor_gradient(rows_of_view(view_of(half), k.in2, {half_size, 0}),
                              rows_of_view(view_of(read), k.in1, {k.source(), 0}, at * k.source()),
                              d_a, k.out1, first, count);
        steps.right(view_of(read), at * k.source(), view_of(other), first, count);
        steps.factor_gradient(
            view_of(made).matrix({1, 0}, {k.in2, 0}, {k.target(), 0}, at * k.target()),
            view_of(other).matrix({1, 0}, {k.in2, 0}, {half_size, 0}), d_b, k.in2, first, count);
        if (depth_first || of_source) {
            steps.right_back(view_of(half), view_of(d_read), at * k.source(), first, count);
        }
    });
    if (depth_first) {
        of_depth(view_of(d_read), view_of(k.weight));
        if (of_source) {
            steps.mix(view_of(d_read), view_of(d_source), k.source(), true);
        }
    }
    return {d_source, d_a, d_b, d_d};
}

}  // namespace
}  // namespace pyvitfast

#if PVF_DEFINES_SCHEMAS
STABLE_TORCH_LIBRARY_FRAGMENT(pyvitfast, m) {
    m.def(
        "kron_grow(Tensor weight, Tensor a, Tensor b, Tensor d, int factors, bool identity) -> "
        "Tensor");
    m.def(
        "kron_grow_backward(Tensor grad, Tensor weight, Tensor a, Tensor b, Tensor d, int factors, "
        "bool of_source) -> (Tensor, Tensor, Tensor, Tensor)");
}
#endif

PVF_IMPL(m) {
    m.impl("kron_grow", TORCH_BOX(&pyvitfast::kron_grow));
    m.impl("kron_grow_backward", TORCH_BOX(&pyvitfast::kron_grow_backward));
}
