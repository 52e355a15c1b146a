#include "ops/tensor_ring_grow/tensor_ring_grow.h"

#include "products.h"

namespace pyvitfast {

#if PVF_CPU_KERNELS
PVF_DECLARE_CPU_KERNELS(TensorRingCpu, tensor_ring_grow_cpu)
#else
const char* tensor_ring_grow_cuda(const StridedProduct& product, void* stream);
#endif

namespace {

constexpr const char* kName = "tensor_ring_grow";

struct Ring {
    Tensor weight, s_b, s_o, s_l, s_i;
    RingSizes n{};
    bool wide = false;

    int64_t source() const { return n.layers1 * n.slots1; }
    int64_t target() const { return n.layers2 * n.slots2; }
};

Ring describe(const Tensor& weight, const Tensor& s_b, const Tensor& s_o, const Tensor& s_l,
              const Tensor& s_i) {
    Ring ring;
    Tensor* own[] = {&ring.weight, &ring.s_b, &ring.s_o, &ring.s_l, &ring.s_i};
    const Tensor* given[] = {&weight, &s_b, &s_o, &s_l, &s_i};
    for (int k = 0; k < 5; ++k) {
        STD_TORCH_CHECK(given[k]->dim() == 4, kName, ": the source and all cores have 4 modes");
        STD_TORCH_CHECK(given[k]->scalar_type() == weight.scalar_type(), kName,
                        ": the source and all cores must have one dtype");
        *own[k] = torch::stable::contiguous(*given[k]);
    }
    const FloatType type = float_type(kName, weight);
    ring.wide = type == FloatType::kFloat64;
    STD_TORCH_CHECK(ring.wide || type == FloatType::kFloat32, kName,
                    ": dtype must be float32 or float64");
    ring.n = {weight.size(0), weight.size(1), weight.size(2), weight.size(3),
              s_l.size(0),    s_b.size(1),    s_o.size(2),    s_i.size(3),
              s_b.size(0),    s_b.size(3),    s_o.size(1),    s_l.size(1)};
    const RingSizes& n = ring.n;
    const bool fits = s_b.size(2) == n.slots1 && s_o.size(0) == n.r2 && s_o.size(3) == n.out1 &&
                      s_l.size(2) == n.layers1 && s_l.size(3) == n.r3 && s_i.size(0) == n.r4 &&
                      s_i.size(1) == n.r1 && s_i.size(2) == n.in1;
    STD_TORCH_CHECK(fits, kName, ": sizes of the cores do not fit each other or the source");
    return ring;
}

Products products_of([[maybe_unused]] const Ring& ring) {
#if PVF_CPU_KERNELS
    return Products(kName, ring.weight, PVF_CPU_KERNELS_OF(tensor_ring_grow_cpu).products);
#else
    return Products(kName, ring.weight, tensor_ring_grow_cuda);
#endif
}

// The results: all slots but the last `columns`, and these side by side as columns.
struct Slots {
    RingSlots part[2];
};

Slots slots_of(const Ring& ring, const Tensor& main, const Tensor& tail, int64_t columns) {
    const RingSizes& n = ring.n;
    const int64_t kept = n.slots2 - columns;
    Slots slots{};
    slots.part[0] = {main.data_ptr(), 0, kept, kept * n.out2 * n.in2, n.out2 * n.in2, n.in2};
    slots.part[1] = {tail.data_ptr(),          kept,  columns,
                     n.out2 * columns * n.in2, n.in2, columns * n.in2};
    return slots;
}

// What lies between the cores, for rows [at, at + tile) of the target.
class Tile {
   public:
    Tile(const Ring& ring, const Products& products, int64_t at, int64_t tile)
        : ring_(ring),
          n_(ring.n),
          products_(products),
          at_(at),
          tile_(tile),
          cols_(tile * n_.in1) {}

    // [l, b, r2, r3, p, i]
    void first(const View& y) const {
        products_.run(outputs_core(), sources(), y_by_source(y), bonds_and_rows(), all_of(n_.out1),
                      all_of(n_.in1), all_of(ring_.source()));
    }

    // [l, r3, r1, c, p, i], or back
    void second(const View& y, const View& z, bool back) const {
        const StridedMatrix core = stack_of(view_of(ring_.s_b), depth_b());
        const Extent batch{n_.layers1 * n_.r3, n_.r3};
        if (back) {
            products_.run(transposed(core), z_by_layer(z), y_by_slot(y), all_of(depth_b()),
                          all_of(rows_b()), all_of(cols_), batch);
        } else {
            products_.run(core, y_by_slot(y), z_by_layer(z), all_of(rows_b()), all_of(depth_b()),
                          all_of(cols_), batch);
        }
    }

    // [m, r4, r1, c, p, i], or back
    void third(const View& z, const View& x, bool back) const {
        const StridedMatrix core = stack_of(view_of(ring_.s_l), depth_l());
        const StridedMatrix before = stack_of(z, wide_cols());
        const StridedMatrix after = stack_of(x, wide_cols());
        if (back) {
            products_.run(transposed(core), after, before, all_of(depth_l()), all_of(rows_l()),
                          all_of(wide_cols()), all_of(1));
        } else {
            products_.run(core, before, after, all_of(rows_l()), all_of(depth_l()),
                          all_of(wide_cols()), all_of(1));
        }
    }

    // The target, or back from its gradient.
    void fourth(const View& x, const Slots& slots, bool back) const {
        for (const RingSlots& part : slots.part) {
            const StridedMatrix core = inputs_core(view_of(ring_.s_i));
            const Extent batch{n_.layers2 * part.count, part.count};
            if (back) {
                products_.run(target_of(part), transposed(core), x_by_row(x, part), all_of(tile_),
                              all_of(n_.in2), bonds_and_cols(), batch);
            } else {
                products_.run(x_by_row(x, part), core, target_of(part), all_of(tile_),
                              bonds_and_cols(), all_of(n_.in2), batch);
            }
        }
    }

    // Onto the gradient of s_i, a layer at a time: x^T times the target's gradient.
    void inputs_gradient(const View& x, const Slots& slots, const View& grad) const {
        for (const RingSlots& part : slots.part) {
            const View target{static_cast<char*>(part.data), x.item};
            for (int64_t m = 0; m < n_.layers2; ++m) {
                const int64_t offset = m * n_.r4 * wide_cols() + part.first * cols_;
                products_.run(x.matrix({1, n_.slots2 * cols_}, {n_.in1, cols_}, {}, offset),
                              target.matrix({part.row, part.slot}, {1, 0}, {},
                                            m * part.layer + at_ * part.row),
                              inputs_core(grad), bonds_and_cols(), {part.count * tile_, tile_},
                              all_of(n_.in2), all_of(1), true);
            }
        }
    }

    // Of s_l: sums over all columns, in parts that are added up in order.
    void layers_gradient(const View& dx, const View& z, const View& parts, const View& units,
                         const View& grad) const {
        const int64_t count = n_.r1 * n_.slots2;
        const int64_t size = rows_l() * depth_l();
        products_.run(stack_of(dx, wide_cols(), cols_), transposed(stack_of(z, wide_cols(), cols_)),
                      stack_of(parts, depth_l(), size), all_of(rows_l()), all_of(cols_),
                      all_of(depth_l()), all_of(count));
        products_.add_up(parts, count, size, units, stack_of(grad, size), true);
    }

    void slots_gradient(const View& dz, const View& y, const View& parts, const View& units,
                        const View& grad) const {
        const int64_t count = n_.layers1 * n_.r3;
        const int64_t size = rows_b() * depth_b();
        StridedMatrix out = stack_of(parts, depth_b(), size);
        out.batch.outer = n_.r3 * size;
        products_.run(z_by_layer(dz), transposed(y_by_slot(y)), out, all_of(rows_b()),
                      all_of(cols_), all_of(depth_b()), {count, n_.r3});
        products_.add_up(parts, count, size, units, stack_of(grad, size), true);
    }

    void outputs_gradient(const View& dy, const View& grad) const {
        products_.run(dy.matrix({n_.in1, tile_ * n_.in1}, {1, source_stride()}),
                      view_of(ring_.weight).matrix({1, n_.out1 * n_.in1}, {n_.in1, 0}),
                      rows_of_tile(grad), bonds_and_rows(), {ring_.source() * n_.in1, n_.in1},
                      all_of(n_.out1), all_of(1));
    }

    void source_gradient(const View& dy, const View& grad) const {
        products_.run(transposed(outputs_core()), y_by_source(dy),
                      stack_of(grad, n_.in1, n_.out1 * n_.in1), all_of(n_.out1), bonds_and_rows(),
                      all_of(n_.in1), all_of(ring_.source()), true);
    }

   private:
    int64_t bonds() const { return n_.r4 * n_.r1; }
    int64_t rows_b() const { return n_.r1 * n_.slots2; }
    int64_t depth_b() const { return n_.slots1 * n_.r2; }
    int64_t rows_l() const { return n_.layers2 * n_.r4; }
    int64_t depth_l() const { return n_.layers1 * n_.r3; }
    int64_t wide_cols() const { return rows_b() * cols_; }
    int64_t source_stride() const { return n_.r2 * n_.r3 * cols_; }

    Extent bonds_and_rows() const { return {n_.r2 * n_.r3 * tile_, tile_}; }
    Extent bonds_and_cols() const { return {bonds() * n_.in1, n_.in1}; }

    // Rows (r2, r3, p) of s_o, or of its gradient.
    StridedMatrix rows_of_tile(const View& core) const {
        return core.matrix({n_.out1, n_.out2 * n_.out1}, {1, 0}, {}, at_ * n_.out1);
    }
    StridedMatrix outputs_core() const { return rows_of_tile(view_of(ring_.s_o)); }
    StridedMatrix inputs_core(const View& core) const {
        return core.matrix({n_.in2, n_.in1 * n_.in2}, {1, 0});
    }
    StridedMatrix sources() const {
        return stack_of(view_of(ring_.weight), n_.in1, n_.out1 * n_.in1);
    }
    // By source matrix: rows (r2, r3, p).
    StridedMatrix y_by_source(const View& y) const {
        return y.matrix({n_.in1, tile_ * n_.in1}, {1, 0}, {source_stride(), 0});
    }
    // By (layer, r3): rows (slot, r2).
    StridedMatrix y_by_slot(const View& y) const {
        return y.matrix({n_.r3 * cols_, 0}, {1, 0}, {cols_, n_.slots1 * source_stride()});
    }
    StridedMatrix z_by_layer(const View& z) const {
        return z.matrix({cols_, 0}, {1, 0}, {wide_cols(), n_.r3 * wide_cols()});
    }
    // By (layer, slot): rows p, columns (r4, r1, i).
    StridedMatrix x_by_row(const View& x, const RingSlots& part) const {
        return x.matrix({n_.in1, 0}, {1, n_.slots2 * cols_}, {cols_, n_.r4 * wide_cols()},
                        part.first * cols_);
    }
    StridedMatrix target_of(const RingSlots& part) const {
        const View view{static_cast<char*>(part.data), view_of(ring_.weight).item};
        return view.matrix({part.row, 0}, {1, 0}, {part.slot, part.layer}, at_ * part.row);
    }
    const Ring& ring_;
    const RingSizes& n_;
    const Products& products_;
    int64_t at_;
    int64_t tile_;
    int64_t cols_;
};

#if !PVF_CPU_KERNELS
void by_products(const Ring& ring, const Slots& slots) {
    const Products products = products_of(ring);
    const int64_t most = ring_tile(ring.n, 2);
    const Tensor one =
        empty(ring.weight, {most * std::max(ring_first(ring.n), ring_third(ring.n))});
    const Tensor other = empty(ring.weight, {most * ring_second(ring.n)});
    for (int64_t at = 0; at < ring.n.out2; at += most) {
        const Tile tile(ring, products, at, std::min(most, ring.n.out2 - at));
        tile.first(view_of(one));
        tile.second(view_of(one), view_of(other), false);
        tile.third(view_of(other), view_of(one), false);
        tile.fourth(view_of(one), slots, false);
    }
}

#else
// Rows of the target a thread handles at once: their part of the mixed source fits in a cache.
int64_t rows_at_once(const Ring& ring) {
    constexpr int64_t kCached = 1 << 20;
    const RingSizes& n = ring.n;
    const int64_t row = 48 * (ring.wide ? 8 : 4) * std::max(n.slots1 * n.r2, n.slots2 * n.r1) *
                        std::max(n.layers1 * n.r3, n.layers2 * n.r4);
    return std::min<int64_t>(std::max<int64_t>(kCached / std::max<int64_t>(row, 1), 1), 16);
}

void by_rows(const Ring& ring, const Slots& slots) {
    const auto& kernels = PVF_CPU_KERNELS_OF(tensor_ring_grow_cpu);
    RingForward p{ring.n,
                  ring.weight.data_ptr(),
                  ring.s_b.data_ptr(),
                  ring.s_o.data_ptr(),
                  ring.s_l.data_ptr(),
                  ring.s_i.data_ptr(),
                  {slots.part[0], slots.part[1]},
                  ring.wide};
    const int64_t count = rows_at_once(ring);
    const int64_t groups = (ring.n.out2 + count - 1) / count;
    const int64_t item = ring.wide ? 8 : 4;
    const Tensor weight = empty(ring.weight, {kernels.weight_bytes(p) / item});
    const Tensor s_i = empty(ring.weight, {kernels.s_i_bytes(p) / item});
    const RingPanels panels{weight.data_ptr(), s_i.data_ptr()};
    torch::stable::parallel_for(0, ring.source(), 1, [&](int64_t begin, int64_t end) {
        kernels.pack_weight(p, panels, begin, end);
    });
    torch::stable::parallel_for(0, ring.n.r4 * ring.n.r1, 1, [&](int64_t begin, int64_t end) {
        kernels.pack_s_i(p, panels, begin, end);
    });
    torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
        const Tensor scratch = empty(ring.weight, {kernels.scratch_bytes(p, count) / item});
        for (int64_t group = begin; group < end; ++group) {
            const int64_t first = group * count;
            kernels.rows(p, panels, first, std::min(count, ring.n.out2 - first),
                         scratch.data_ptr());
        }
    });
}
#endif

std::tuple<Tensor, Tensor> tensor_ring_grow(Tensor weight, Tensor s_b, Tensor s_o, Tensor s_l,
                                            Tensor s_i, int64_t columns) {
    const Ring ring = describe(weight, s_b, s_o, s_l, s_i);
    const RingSizes& n = ring.n;
    STD_TORCH_CHECK(columns >= 0 && columns <= n.slots2, kName, ": columns are out of range");
    const Tensor main = empty(weight, {n.layers2, n.slots2 - columns, n.out2, n.in2});
    const Tensor tail = empty(weight, {n.layers2, n.out2, columns * n.in2});
    if (ring.target() * n.out2 * n.in2 > 0) {
        const Slots slots = slots_of(ring, main, tail, columns);
#if PVF_CPU_KERNELS
        by_rows(ring, slots);
#else
        by_products(ring, slots);
#endif
    }
    return {main, tail};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> tensor_ring_grow_backward(
    Tensor grad, Tensor grad_tail, Tensor weight, Tensor s_b, Tensor s_o, Tensor s_l, Tensor s_i,
    bool of_source) {
    const Ring ring = describe(weight, s_b, s_o, s_l, s_i);
    const RingSizes& n = ring.n;
    const Tensor main = torch::stable::contiguous(grad);
    const Tensor tail = torch::stable::contiguous(grad_tail);
    const int64_t columns = n.slots2 - grad.size(1);
    STD_TORCH_CHECK(grad.dim() == 4 && grad_tail.dim() == 3 && columns >= 0 &&
                        grad_tail.size(2) == columns * n.in2 && grad.size(0) == n.layers2 &&
                        grad.size(2) == n.out2 && grad.size(3) == n.in2 &&
                        grad.scalar_type() == weight.scalar_type() &&
                        grad_tail.scalar_type() == weight.scalar_type(),
                    kName, ": gradients must have the shapes and dtype of the results");
    const Tensor d_source = of_source ? zeros_as(ring.weight) : empty(weight, {0});
    const Tensor d_b = zeros_as(ring.s_b);
    const Tensor d_o = zeros_as(ring.s_o);
    const Tensor d_l = zeros_as(ring.s_l);
    const Tensor d_i = zeros_as(ring.s_i);
    if (ring.target() * n.out2 * n.in2 > 0) {
        const Slots slots = slots_of(ring, main, tail, columns);
        const Products products = products_of(ring);
        const int64_t most = ring_tile(ring.n, 4);
        const Tensor y = empty(weight, {most * ring_first(ring.n)});
        const Tensor z = empty(weight, {most * ring_second(ring.n)});
        const Tensor x = empty(weight, {most * ring_third(ring.n)});
        const Tensor dz = empty(weight, {most * ring_second(ring.n)});
        const int64_t b_parts = n.layers1 * n.r3 * n.r1 * n.slots2 * n.slots1 * n.r2;
        const int64_t l_parts = n.r1 * n.slots2 * n.layers2 * n.r4 * n.layers1 * n.r3;
        const Tensor parts = empty(weight, {std::max(b_parts, l_parts)});
        const int64_t most_parts = std::max(n.layers1 * n.r3, n.r1 * n.slots2);
        const Tensor units = ones(weight, most_parts);
        for (int64_t at = 0; at < n.out2; at += most) {
            const Tile tile(ring, products, at, std::min(most, n.out2 - at));
            tile.first(view_of(y));
            tile.second(view_of(y), view_of(z), false);
            tile.third(view_of(z), view_of(x), false);
            tile.inputs_gradient(view_of(x), slots, view_of(d_i));
            tile.fourth(view_of(x), slots, true);
            tile.layers_gradient(view_of(x), view_of(z), view_of(parts), view_of(units),
                                 view_of(d_l));
            tile.third(view_of(dz), view_of(x), true);
            tile.slots_gradient(view_of(dz), view_of(y), view_of(parts), view_of(units),
                                view_of(d_b));
            tile.second(view_of(y), view_of(dz), true);
            tile.outputs_gradient(view_of(y), view_of(d_o));
            if (of_source) {
                tile.source_gradient(view_of(y), view_of(d_source));
            }
        }
    }
    return {d_source, d_b, d_o, d_l, d_i};
}

}  // namespace
}  // namespace pyvitfast

#if PVF_DEFINES_SCHEMAS
STABLE_TORCH_LIBRARY_FRAGMENT(pyvitfast, m) {
    m.def(
        "tensor_ring_grow(Tensor weight, Tensor s_b, Tensor s_o, Tensor s_l, Tensor s_i, "
        "int columns) -> (Tensor, Tensor)");
    m.def(
        "tensor_ring_grow_backward(Tensor grad, Tensor grad_tail, Tensor weight, Tensor s_b, "
        "Tensor s_o, Tensor s_l, Tensor s_i, bool of_source) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor)");
}
#endif

PVF_IMPL(m) {
    m.impl("tensor_ring_grow", TORCH_BOX(&pyvitfast::tensor_ring_grow));
    m.impl("tensor_ring_grow_backward", TORCH_BOX(&pyvitfast::tensor_ring_grow_backward));
}
