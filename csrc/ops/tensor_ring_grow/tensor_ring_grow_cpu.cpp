#include "ops/tensor_ring_grow/tensor_ring_grow.h"

#include "cpu_strided_product.h"

namespace pyvitfast::PVF_CPU_CAPABILITY {

// Columns of the source that a pass takes: a panel, so that both mixes work on whole panels.
template <typename A>
constexpr int64_t kRingCols = kPanelCols<A>;
constexpr int64_t kRingDepth = 192;

static int64_t panels(int64_t rows) { return (rows + kPanelRows - 1) / kPanelRows; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Where the parts of the scratch lie, in elements.
struct RingScratch {
    int64_t modes;    // rows of the (slot, bond) side, before or after its mix
    int64_t layers;   // the same of the (layer, bond) side
    int64_t mixed;    // [layers, modes, count, cols]
    int64_t outputs;  // the rows of s_o, in panels
    int64_t b_core;
    int64_t l_core;
    int64_t right;   // a panel, or a block of s_i
    int64_t left;    // panels of the mixed source
    int64_t places;  // offsets, as int64
    int64_t total;
};

template <typename A>
static RingScratch scratch_of(const RingSizes& n, int64_t count) {
    RingScratch s{};
    s.modes = larger(n.slots1 * n.r2, n.slots2 * n.r1);
    s.layers = larger(n.layers1 * n.r3, n.layers2 * n.r4);
    const auto whole = [](int64_t size) { return (size + 63) / 64 * 64; };
    int64_t at = 0;
    const auto take = [&](int64_t size) {
        const int64_t begin = at;
        at += whole(size);
        return begin;
    };
    const int64_t rows = n.layers2 * n.slots2 * count;
    const int64_t right_cols = (n.in2 + kPanelCols<A> - 1) / kPanelCols<A> * kPanelCols<A>;
    s.mixed = take(s.layers * s.modes * count * kRingCols<A>);
    s.outputs = take(panels(n.r2 * n.r3 * count) * kPanelRows * n.out1);
    s.b_core = take(panels(n.r1 * n.slots2) * kPanelRows * n.slots1 * n.r2);
    s.l_core = take(panels(n.layers2 * n.r4) * kPanelRows * n.layers1 * n.r3);
    const int64_t deepest =
        larger(n.out1, larger(n.slots1 * n.r2, larger(n.layers1 * n.r3, int64_t{0})));
    s.right = take(larger(kRingDepth * right_cols, deepest * kPanelCols<A>));
    s.left = take(panels(rows) * kPanelRows * kRingDepth);
    s.places = take((larger(rows, larger(deepest, kRingDepth)) + n.r4 * n.r1 * kRingCols<A>) *
                    static_cast<int64_t>(sizeof(int64_t)) / static_cast<int64_t>(sizeof(A)) * 2);
    s.total = at;
    return s;
}

// A core [rows, depth], contiguous, in panels of rows.
template <typename A>
static void pack_core(const A* core, int64_t rows, int64_t depth, const int64_t* depths, A* to) {
    for (int64_t i = 0; i < rows; i += kPanelRows) {
        int64_t at[kPanelRows];
        const int count = static_cast<int>(rows - i < kPanelRows ? rows - i : kPanelRows);
        for (int r = 0; r < count; ++r) {
            at[r] = (i + r) * depth;
        }
        pack<kPanelRows>(core, at, count, depths, depth, to + i * depth);
    }
}

// Panels of a core times a panel of columns, to rows `stride` apart.
template <typename A>
PVF_INLINE void mix(const A* core, int64_t rows, int64_t depth, const A* right, A* to,
                    int64_t stride) {
    for (int64_t i = 0; i < rows; i += kPanelRows) {
        Wide<A> sums[kPanelRows][kTallVectors];
        multiply_panels<A>(core + i * depth, right, depth, sums);
        const int64_t count = rows - i < kPanelRows ? rows - i : kPanelRows;
#pragma GCC unroll 8
        for (int r = 0; r < kPanelRows; ++r) {
            if (r < count) {
#pragma GCC unroll 4
                for (int v = 0; v < kTallVectors; ++v) {
                    store_unaligned(to + (i + r) * stride + v * kWide<A>, sums[r][v]);
                }
            }
        }
    }
}

template <typename A>
static void ring_rows(const RingForward& p, int64_t first, int64_t count, void* memory) {
    const RingSizes& n = p.sizes;
    constexpr int64_t kCols = kRingCols<A>;
    const RingScratch s = scratch_of<A>(n, count);
    A* const scratch = static_cast<A*>(memory);
    A* const mixed = scratch + s.mixed;
    A* const right = scratch + s.right;
    A* const left = scratch + s.left;
    int64_t* const places = reinterpret_cast<int64_t*>(scratch + s.places);
    const int64_t width = count * kCols;     // of a row of `mixed`
    const int64_t layer = s.modes * width;   // from a layer to the next in `mixed`
    const int64_t source_rows = n.r2 * n.r3 * count;
    const int64_t b_depth = n.slots1 * n.r2;
    const int64_t l_depth = n.layers1 * n.r3;
    const A* weight = static_cast<const A*>(p.weight);
    const A* s_i = static_cast<const A*>(p.s_i);
    const int64_t deepest = larger(n.out1, larger(b_depth, l_depth));
    for (int64_t k = 0; k < deepest; ++k) {
        places[k] = k;
    }
    pack_core(static_cast<const A*>(p.s_b), n.r1 * n.slots2, b_depth, places, scratch + s.b_core);
    pack_core(static_cast<const A*>(p.s_l), n.layers2 * n.r4, l_depth, places, scratch + s.l_core);
    for (int64_t i = 0; i < source_rows; i += kPanelRows) {
        int64_t at[kPanelRows];
        const int64_t rows = source_rows - i < kPanelRows ? source_rows - i : kPanelRows;
        for (int64_t r = 0; r < rows; ++r) {
            at[r] = ((i + r) / count * n.out2 + first + (i + r) % count) * n.out1;
        }
        pack<kPanelRows>(static_cast<const A*>(p.s_o), at, static_cast<int>(rows), places, n.out1,
                         scratch + s.outputs + i * n.out1);
    }
    const int64_t target_rows = n.layers2 * n.slots2 * count;
    const int64_t bonds = n.r4 * n.r1;
    for (int64_t col = 0; col < n.in1; col += kCols) {
        const int64_t cols = n.in1 - col < kCols ? n.in1 - col : kCols;
        int64_t at[kCols];
        for (int64_t j = 0; j < cols; ++j) {
            at[j] = col + j;
        }
        // The output core: row (l, r3) and (b, r2) of `mixed` get the rows of the target.
        for (int64_t k = 0; k < n.out1; ++k) {
            places[k] = k * n.in1;
        }
        for (int64_t lb = 0; lb < n.layers1 * n.slots1; ++lb) {
            pack<kCols>(weight + lb * n.out1 * n.in1, at, static_cast<int>(cols), places, n.out1,
                        right);
            for (int64_t i = 0; i < source_rows; i += kPanelRows) {
                Wide<A> sums[kPanelRows][kTallVectors];
                multiply_panels<A>(scratch + s.outputs + i * n.out1, right, n.out1, sums);
                const int64_t rows = source_rows - i < kPanelRows ? source_rows - i : kPanelRows;
#pragma GCC unroll 8
                for (int r = 0; r < kPanelRows; ++r) {
                    if (r < rows) {
                        const int64_t bond = (i + r) / count;
                        A* to = mixed + ((lb / n.slots1) * n.r3 + bond % n.r3) * layer +
                                (lb % n.slots1 * n.r2 + bond / n.r3) * width +
                                (i + r) % count * kCols;
#pragma GCC unroll 4
                        for (int v = 0; v < kTallVectors; ++v) {
                            store_unaligned(to + v * kWide<A>, sums[r][v]);
                        }
                    }
                }
            }
        }
        // The slot core, in place: a panel is copied before its rows are written again.
        for (int64_t j = 0; j < kCols; ++j) {
            at[j] = j;
        }
        for (int64_t k = 0; k < b_depth; ++k) {
            places[k] = k * width;
        }
        for (int64_t u = 0; u < l_depth; ++u) {
            for (int64_t one = 0; one < count; ++one) {
                A* panel = mixed + u * layer + one * kCols;
                pack<kCols>(panel, at, kCols, places, b_depth, right);
                mix(scratch + s.b_core, n.r1 * n.slots2, b_depth, right, panel, width);
            }
        }
        for (int64_t k = 0; k < l_depth; ++k) {
            places[k] = k * layer;
        }
        for (int64_t x = 0; x < n.r1 * n.slots2; ++x) {
            for (int64_t one = 0; one < count; ++one) {
                A* panel = mixed + x * width + one * kCols;
                pack<kCols>(panel, at, kCols, places, l_depth, right);
                mix(scratch + s.l_core, n.layers2 * n.r4, l_depth, right, panel, layer);
            }
        }
        // The input core, onto the target.
        int64_t* const rows_at = places;
        int64_t* const depths = places + target_rows;
        for (int64_t i = 0; i < target_rows; ++i) {
            const int64_t c = i / count % n.slots2;
            rows_at[i] = i / count / n.slots2 * n.r4 * layer + c * width + i % count * kCols;
        }
        const int64_t whole_bonds = kRingDepth / cols > 0 ? kRingDepth / cols : 1;
        for (int64_t bond = 0; bond < bonds; bond += whole_bonds) {
            const int64_t held = bonds - bond < whole_bonds ? bonds - bond : whole_bonds;
            const int64_t depth = held * cols;
            for (int64_t k = 0; k < depth; ++k) {
                const int64_t q = bond + k / cols;
                depths[k] = (q * n.in1 + col + k % cols) * n.in2;
            }
            for (int64_t j = 0; j < n.in2; j += kCols) {
                const int present = static_cast<int>(n.in2 - j < kCols ? n.in2 - j : kCols);
                for (int r = 0; r < present; ++r) {
                    at[r] = j + r;
                }
                pack<kPanelCols<A>>(s_i, at, present, depths, depth, right + j * depth);
            }
            for (int64_t k = 0; k < depth; ++k) {
                const int64_t q = bond + k / cols;
                depths[k] = q / n.r1 * layer + q % n.r1 * n.slots2 * width + k % cols;
            }
            for (int64_t i = 0; i < target_rows; i += kPanelRows) {
                const int rows =
                    static_cast<int>(target_rows - i < kPanelRows ? target_rows - i : kPanelRows);
                pack<kPanelRows>(mixed, rows_at + i, rows, depths, depth, left + i * depth);
            }
            const bool onto = col > 0 || bond > 0;
            for (int64_t j = 0; j < n.in2; j += kCols) {
                const int present = static_cast<int>(n.in2 - j < kCols ? n.in2 - j : kCols);
                for (int64_t i = 0; i < target_rows; i += kPanelRows) {
                    Wide<A> sums[kPanelRows][kTallVectors];
                    multiply_panels<A>(left + i * depth, right + j * depth, depth, sums);
                    A tile[kPanelRows][kCols];
                    const int64_t rows =
                        target_rows - i < kPanelRows ? target_rows - i : kPanelRows;
#pragma GCC unroll 8
                    for (int r = 0; r < kPanelRows; ++r) {
#pragma GCC unroll 4
                        for (int v = 0; v < kTallVectors; ++v) {
                            store_unaligned(&tile[r][v * kWide<A>], sums[r][v]);
                        }
                    }
                    for (int64_t r = 0; r < rows; ++r) {
                        const int64_t c = (i + r) / count % n.slots2;
                        const RingSlots& slots = p.slots[c >= p.slots[1].first ? 1 : 0];
                        A* to = static_cast<A*>(slots.data) +
                                (i + r) / count / n.slots2 * slots.layer +
                                (c - slots.first) * slots.slot +
                                (first + (i + r) % count) * slots.row + j;
                        if (present == kCols) {
#pragma GCC unroll 4
                            for (int v = 0; v < kTallVectors; ++v) {
                                const Wide<A> sum = load_wide(&tile[r][v * kWide<A>]);
                                A* place = to + v * kWide<A>;
                                store_unaligned(place, onto ? load_wide(place) + sum : sum);
                            }
                        } else {
                            for (int e = 0; e < present; ++e) {
                                to[e] = onto ? to[e] + tile[r][e] : tile[r][e];
                            }
                        }
                    }
                }
            }
        }
    }
}

static int64_t scratch_bytes(const RingForward& p, int64_t count) {
    return p.wide ? 8 * scratch_of<double>(p.sizes, count).total
                  : 4 * scratch_of<float>(p.sizes, count).total;
}

static void rows(const RingForward& p, int64_t first, int64_t count, void* scratch) {
    const auto run = p.wide ? ring_rows<double> : ring_rows<float>;
    run(p, first, count, scratch);
}

extern const TensorRingCpu tensor_ring_grow_cpu;
const TensorRingCpu tensor_ring_grow_cpu{{strided_product_part}, scratch_bytes, rows};

}  // namespace pyvitfast::PVF_CPU_CAPABILITY
