#include "cpu_strided_product.h"
#include "ops/tensor_ring_grow/tensor_ring_grow.h"

namespace pyvitfast::PVF_CPU_CAPABILITY {

// Columns of the source that a pass takes: a panel, so that both mixes work on whole panels.
template <typename A>
constexpr int64_t kRingCols = kPanelCols<A>;
// With a panel of s_i so deep there is room for one of the source beside it in the first cache.
constexpr int64_t kRingDepth = 144;

static int64_t panels(int64_t rows) { return (rows + kPanelRows - 1) / kPanelRows; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
template <typename A>
static int64_t passes(int64_t cols) {
    return (cols + kRingCols<A> - 1) / kRingCols<A>;
}

// Where the parts of the scratch lie, in elements.
struct RingScratch {
    int64_t modes;    // rows of the (slot, bond) side, before or after its mix
    int64_t layers;   // the same of the (layer, bond) side
    int64_t mixed;    // [layers, modes, count, cols]
    int64_t outputs;  // the rows of s_o, in panels
    int64_t b_core;
    int64_t l_core;
    int64_t right;   // a panel of what is mixed
    int64_t left;    // panels of the mixed source
    int64_t sums;    // of the target, in tiles
    int64_t places;  // offsets, as int64
    int64_t total;
};

template <typename A>
static RingScratch scratch_of(const RingSizes& n, int64_t count) {
    RingScratch s{};
    s.modes = larger(n.slots1 * n.r2, n.slots2 * n.r1);
    s.layers = larger(n.layers1 * n.r3, n.layers2 * n.r4);
    int64_t at = 0;
    const auto take = [&](int64_t size) {
        const int64_t begin = at;
        at += (size + 63) / 64 * 64;
        return begin;
    };
    const int64_t rows = panels(n.layers2 * n.slots2 * count) * kPanelRows;
    const int64_t deepest = larger(n.out1, larger(n.slots1 * n.r2, n.layers1 * n.r3));
    s.mixed = take(s.layers * s.modes * count * kRingCols<A>);
    s.outputs = take(panels(n.r2 * n.r3 * count) * kPanelRows * n.out1);
    s.b_core = take(panels(n.r1 * n.slots2) * kPanelRows * n.slots1 * n.r2);
    s.l_core = take(panels(n.layers2 * n.r4) * kPanelRows * n.layers1 * n.r3);
    s.right = take(deepest * kRingCols<A>);
    s.left = take(rows * kRingDepth);
    s.sums = take(rows * passes<A>(n.in2) * kRingCols<A>);
    s.places = take(2 * (rows + larger(deepest, kRingDepth)));
    s.total = at;
    return s;
}

// [pass, layer and slot, out1, cols]
template <typename A>
static void pack_weight_as(const RingForward& p, const RingPanels& panels, int64_t first,
                           int64_t last) {
    const RingSizes& n = p.sizes;
    constexpr int64_t kCols = kRingCols<A>;
    const A* from = static_cast<const A*>(p.weight);
    A* to = static_cast<A*>(panels.weight);
    for (int64_t lb = first; lb < last; ++lb) {
        for (int64_t o = 0; o < n.out1; ++o) {
            const A* row = from + (lb * n.out1 + o) * n.in1;
            for (int64_t pass = 0; pass < passes<A>(n.in1); ++pass) {
                A* place = to + ((pass * n.layers1 * n.slots1 + lb) * n.out1 + o) * kCols;
                for (int64_t j = 0; j < kCols; ++j) {
                    place[j] = pass * kCols + j < n.in1 ? row[pass * kCols + j] : A(0);
                }
            }
        }
    }
}

// [pass over the source, pass over the target, r4 and r1, column of the source in its pass, cols]
template <typename A>
static void pack_s_i_as(const RingForward& p, const RingPanels& panels, int64_t first,
                        int64_t last) {
    const RingSizes& n = p.sizes;
    constexpr int64_t kCols = kRingCols<A>;
    const A* from = static_cast<const A*>(p.s_i);
    A* to = static_cast<A*>(panels.s_i);
    const int64_t bonds = n.r4 * n.r1;
    for (int64_t bond = first; bond < last; ++bond) {
        for (int64_t i = 0; i < n.in1; ++i) {
            const A* row = from + (bond * n.in1 + i) * n.in2;
            const int64_t pass = i / kCols;
            const int64_t cols = n.in1 - pass * kCols < kCols ? n.in1 - pass * kCols : kCols;
            for (int64_t j = 0; j < passes<A>(n.in2); ++j) {
                A* place = to + (pass * kCols * bonds * passes<A>(n.in2) +
                                 (j * bonds + bond) * cols + i % kCols) *
                                    kCols;
                for (int64_t e = 0; e < kCols; ++e) {
                    place[e] = j * kCols + e < n.in2 ? row[j * kCols + e] : A(0);
                }
            }
        }
    }
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
static void ring_rows(const RingForward& p, const RingPanels& packed, int64_t first, int64_t count,
                      void* memory) {
    const RingSizes& n = p.sizes;
    constexpr int64_t kCols = kRingCols<A>;
    const RingScratch s = scratch_of<A>(n, count);
    A* const scratch = static_cast<A*>(memory);
    A* const mixed = scratch + s.mixed;
    A* const right = scratch + s.right;
    A* const left = scratch + s.left;
    A* const target = scratch + s.sums;
    int64_t* const places = reinterpret_cast<int64_t*>(scratch + s.places);
    const int64_t width = count * kCols;    // of a row of `mixed`
    const int64_t layer = s.modes * width;  // from a layer to the next in `mixed`
    const int64_t source_rows = n.r2 * n.r3 * count;
    const int64_t b_depth = n.slots1 * n.r2;
    const int64_t l_depth = n.layers1 * n.r3;
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
        // The output core: row (l, r3) and (b, r2) of `mixed` get the rows of the target.
        const A* panel_of_weight =
            static_cast<const A*>(packed.weight) + col * n.layers1 * n.slots1 * n.out1;
        for (int64_t lb = 0; lb < n.layers1 * n.slots1; ++lb) {
            for (int64_t i = 0; i < source_rows; i += kPanelRows) {
                Wide<A> sums[kPanelRows][kTallVectors];
                const char* next =
                    reinterpret_cast<const char*>(panel_of_weight + (lb + 1) * n.out1 * kCols);
                multiply_panels<A, true>(scratch + s.outputs + i * n.out1,
                                         panel_of_weight + lb * n.out1 * kCols, n.out1, sums,
                                         next + i / kPanelRows * n.out1 * 64);
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
        int64_t at[kCols];
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
        const A* panel_of_inputs =
            static_cast<const A*>(packed.s_i) + col * bonds * passes<A>(n.in2) * kCols;
        const int64_t whole_bonds = kRingDepth / cols;
        for (int64_t bond = 0; bond < bonds; bond += whole_bonds) {
            const int64_t held = bonds - bond < whole_bonds ? bonds - bond : whole_bonds;
            const int64_t depth = held * cols;
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
            A* tile = target;
            for (int64_t j = 0; j < passes<A>(n.in2); ++j) {
                const A* inputs = panel_of_inputs + (j * bonds + bond) * cols * kCols;
                for (int64_t i = 0; i < target_rows; i += kPanelRows) {
                    Wide<A> sums[kPanelRows][kTallVectors];
                    multiply_panels<A>(left + i * depth, inputs, depth, sums);
#pragma GCC unroll 8
                    for (int r = 0; r < kPanelRows; ++r) {
#pragma GCC unroll 4
                        for (int v = 0; v < kTallVectors; ++v) {
                            A* place = tile + r * kCols + v * kWide<A>;
                            store_unaligned(place,
                                            onto ? load_wide(place) + sums[r][v] : sums[r][v]);
                        }
                    }
                    tile += kPanelRows * kCols;
                }
            }
        }
    }
    const int64_t tiles = panels(target_rows) * kPanelRows;
    for (int64_t i = 0; i < target_rows; ++i) {
        const int64_t c = i / count % n.slots2;
        const RingSlots& slots = p.slots[c >= p.slots[1].first ? 1 : 0];
        A* to = static_cast<A*>(slots.data) + i / count / n.slots2 * slots.layer +
                (c - slots.first) * slots.slot + (first + i % count) * slots.row;
        for (int64_t j = 0; j < n.in2; j += kCols) {
            const int64_t present = n.in2 - j < kCols ? n.in2 - j : kCols;
            const A* tile = target + (j / kCols * tiles + i) * kCols;
            for (int64_t e = 0; e < present; ++e) {
                to[j + e] = tile[e];
            }
        }
    }
}

static int64_t item(const RingForward& p) { return p.wide ? 8 : 4; }

static int64_t weight_bytes(const RingForward& p) {
    const RingSizes& n = p.sizes;
    const int64_t cols = p.wide ? passes<double>(n.in1) * kRingCols<double>
                                : passes<float>(n.in1) * kRingCols<float>;
    return item(p) * n.layers1 * n.slots1 * n.out1 * cols;
}

static int64_t s_i_bytes(const RingForward& p) {
    const RingSizes& n = p.sizes;
    const int64_t cols = p.wide ? passes<double>(n.in2) * kRingCols<double>
                                : passes<float>(n.in2) * kRingCols<float>;
    return item(p) * n.r4 * n.r1 * n.in1 * cols;
}

static int64_t scratch_bytes(const RingForward& p, int64_t count) {
    return item(p) * (p.wide ? scratch_of<double>(p.sizes, count).total
                             : scratch_of<float>(p.sizes, count).total);
}

static void pack_weight(const RingForward& p, const RingPanels& panels, int64_t first,
                        int64_t last) {
    (p.wide ? pack_weight_as<double> : pack_weight_as<float>)(p, panels, first, last);
}

static void pack_s_i(const RingForward& p, const RingPanels& panels, int64_t first, int64_t last) {
    (p.wide ? pack_s_i_as<double> : pack_s_i_as<float>)(p, panels, first, last);
}

static void rows(const RingForward& p, const RingPanels& panels, int64_t first, int64_t count,
                 void* scratch) {
    (p.wide ? ring_rows<double> : ring_rows<float>)(p, panels, first, count, scratch);
}

extern const TensorRingCpu tensor_ring_grow_cpu;
const TensorRingCpu tensor_ring_grow_cpu{
    {strided_product_part}, weight_bytes, s_i_bytes, scratch_bytes, pack_weight, pack_s_i, rows};

}  // namespace pyvitfast::PVF_CPU_CAPABILITY
