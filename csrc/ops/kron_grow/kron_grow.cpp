#include "ops/kron_grow/kron_grow.h"

#include <numeric>

#include "products.h"

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
    // Matrices from number `at` on of a tensor of the source's or of the target's.
    StridedMatrix sources(const Tensor& tensor, int64_t at) const {
        return stack_of(view_of(tensor), in1, source(), at * source());
    }
    StridedMatrix targets(const Tensor& tensor, int64_t at) const {
        return stack_of(view_of(tensor), in2, target(), at * target());
    }
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

// The steps of both passes over `count` matrices of one type, from layer `first` on.
class Steps {
   public:
    Steps(const Kron& k, const Products& products) : k_(k), products_(products) {}

    // Layers of every type mixed: from [types, layers, size] to the other side's layers.
    void mix(const View& from, const View& to, int64_t size, bool back, bool onto = false) const {
        const int64_t before = back ? k_.layers2 : k_.layers1;
        const int64_t after = back ? k_.layers1 : k_.layers2;
        products_.run(back ? transposed(depth()) : depth(), stack_of(from, size, before * size),
                      stack_of(to, size, after * size), all_of(after), all_of(before), all_of(size),
                      all_of(k_.types), onto);
    }

    // Layers mixed into the corners of the target, [types, layers2, out2, in2].
    void mix_into_corners(const View& target) const {
        StridedMatrix source = stack_of(view_of(k_.weight), k_.source(), k_.layers1 * k_.source());
        source.col.outer = k_.in1;
        products_.run(depth(), source,
                      target.matrix({k_.target(), 0}, {1, k_.in2}, {k_.layers2 * k_.target(), 0}),
                      all_of(k_.layers2), all_of(k_.layers1), {k_.source(), k_.in1},
                      all_of(k_.types));
    }

    // What is right of the corners, then all that is below.
    void widen_corners(const View& target, int64_t at, int64_t first, int64_t count) const {
        const auto from = [&](int64_t offset) {
            return stack_of(target, k_.in2, k_.target(), at + offset);
        };
        right(from(0), from(k_.in1), k_.out1, first, count);
        left(from(0), from(k_.out1 * k_.in2), k_.in2, first, count);
    }

    // Both factors on matrices [count, out1, in1]; `between` holds them after one.
    void widen(const StridedMatrix& source, const View& between, const StridedMatrix& target,
               int64_t first, int64_t count) const {
        if (kron_right_first(k_) <= kron_left_first(k_)) {
            const StridedMatrix half = stack_of(between, k_.in2, k_.out1 * k_.in2);
            right(source, half, k_.out1, first, count);
            left(half, target, k_.in2, first, count);
        } else {
            const StridedMatrix half = stack_of(between, k_.in1, k_.out2 * k_.in1);
            left(source, half, k_.in1, first, count);
            right(half, target, k_.out2, first, count);
        }
    }

    // M A^T, for matrices of so many rows.
    void right(const StridedMatrix& from, const StridedMatrix& to, int64_t rows, int64_t first,
               int64_t count) const {
        products_.run(from, transposed(factor(k_.a, first)), to, all_of(rows), all_of(k_.in1),
                      all_of(k_.a.size(1)), all_of(count));
    }

    // B M, for matrices of so many columns.
    void left(const StridedMatrix& from, const StridedMatrix& to, int64_t cols, int64_t first,
              int64_t count) const {
        products_.run(factor(k_.b, first), from, to, all_of(k_.b.size(1)), all_of(k_.out1),
                      all_of(cols), all_of(count));
    }

    // B^T G, [count, out1, in2]
    void left_back(const StridedMatrix& grad, const StridedMatrix& to, int64_t first,
                   int64_t count) const {
        products_.run(transposed(factor(k_.b, first)), grad, to, all_of(k_.out1), all_of(k_.out2),
                      all_of(k_.in2), all_of(count));
    }

    // Times A, [count, out1, in1]
    void right_back(const StridedMatrix& half, const StridedMatrix& to, int64_t first,
                    int64_t count) const {
        products_.run(half, factor(k_.a, first), to, all_of(k_.out1), all_of(k_.in2),
                      all_of(k_.in1), all_of(count));
    }

    // Onto the gradient of a factor: the sum over matrices and `inner` of left[.., i] right[.., j].
    void factor_gradient(const StridedMatrix& left, StridedMatrix right, const Tensor& grad,
                         int64_t inner, int64_t first, int64_t count) const {
        const int64_t rows = grad.size(1);
        const int64_t cols = grad.size(2);
        StridedMatrix turned = transposed(left);
        const View sum = view_of(grad);
        if (k_.factors == Factors::kShared) {
            turned.col.outer = left.batch.inner;
            right.row.outer = right.batch.inner;
            turned.batch = right.batch = {};
            products_.run(turned, right, stack_of(sum, cols), all_of(rows), {count * inner, inner},
                          all_of(cols), all_of(1), true);
        } else {
            products_.run(turned, right, stack_of(sum, cols, rows * cols, first * rows * cols),
                          all_of(rows), all_of(inner), all_of(cols), all_of(count), true);
        }
    }

    // Of the depth of one type: every matrix of the target's layers times every one of the
    // source's.
    void depth_gradient(const View& targets, int64_t target_at, const View& sources,
                        int64_t source_at, int64_t rows, int64_t cols, const View& parts,
                        const View& units, const View& grad, int64_t type) const {
        // Sums in parts of whole rows, added up in order.
        const int64_t size = std::gcd(rows, int64_t{32}) * cols;
        const int64_t count = rows * cols / size;
        const int64_t layers = k_.layers1 * k_.layers2;
        products_.run(stack_of(targets, rows * cols, size, target_at),
                      transposed(stack_of(sources, rows * cols, size, source_at)),
                      stack_of(parts, k_.layers1, layers), all_of(k_.layers2), all_of(size),
                      all_of(k_.layers1), all_of(count));
        products_.add_up(parts, count, layers, units, stack_of(grad, layers, 0, type * layers),
                         false);
    }

   private:
    StridedMatrix depth() const {
        return stack_of(view_of(k_.d), k_.layers1, k_.layers1 * k_.layers2);
    }
    StridedMatrix factor(const Tensor& tensor, int64_t first) const {
        const int64_t size = k_.factors == Factors::kShared ? 0 : tensor.size(1) * tensor.size(2);
        return stack_of(view_of(tensor), tensor.size(2), size, first * size);
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
        steps.widen(k.sources(source, at), view_of(between), k.targets(target, at), first, count);
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
            steps.widen(k.sources(read, at), view_of(other), k.targets(made, at), first, count);
        });
        of_depth(view_of(given), view_of(made));
        steps.mix(view_of(given), view_of(made), k.target(), true);
    }
    for_each_chunk(k, layers, [&](int64_t type, int64_t first, int64_t count) {
        const int64_t at = type * layers + first;
        const StridedMatrix of_half = stack_of(view_of(half), k.in2, half_size);
        const StridedMatrix of_other = stack_of(view_of(other), k.in2, half_size);
        steps.left_back(k.targets(made, at), of_half, first, count);
        steps.factor_gradient(of_half, k.sources(read, at), d_a, k.out1, first, count);
        steps.right(k.sources(read, at), of_other, k.out1, first, count);
        steps.factor_gradient(transposed(k.targets(made, at)), transposed(of_other), d_b, k.in2,
                              first, count);
        if (depth_first || of_source) {
            steps.right_back(of_half, k.sources(d_read, at), first, count);
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
