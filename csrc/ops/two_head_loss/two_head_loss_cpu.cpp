#include <cmath>
#include <cstring>
#include <limits>

#include "cpu_matmul.h"
#include "cpu_rows.h"
#include "ops/two_head_loss/two_head_loss.h"
#include "ops/two_head_loss/two_head_loss_math.h"

namespace pyvitfast::PVF_CPU_CAPABILITY {

using two_heads::Target;

#define PVF_LAMBDA_INLINE __attribute__((always_inline))

// Logits that are widened at a time where they are not of type A already.
constexpr int64_t kTwoHeadChunk = 512;

// f(values, first, count) for the chunks of a row, as A.
template <typename A, typename T, typename F>
PVF_INLINE void for_chunks(const T* row, int64_t count, const F& f) {
    if constexpr (std::is_same_v<A, T>) {
        f(row, int64_t{0}, count);
    } else {
        A values[kTwoHeadChunk];
        for (int64_t first = 0; first < count; first += kTwoHeadChunk) {
            const int64_t left = count - first;
            const int64_t here = left < kTwoHeadChunk ? left : kTwoHeadChunk;
            widen_row(row + first, here, values);
            f(values, first, here);
        }
    }
}

// The first `count` < kWide<A> numbers, in moves of sizes that are known: a call would cost more.
template <typename A>
PVF_INLINE void copy_part(A* to, const A* from, int64_t count) {
    const auto move = [&]<int64_t kSize>(std::integral_constant<int64_t, kSize>) PVF_LAMBDA_INLINE {
        if constexpr (kSize < kWide<A>) {
            if ((count & kSize) != 0) {
                std::memcpy(to, from, kSize * sizeof(A));
                to += kSize;
                from += kSize;
            }
        }
    };
    static_assert(kWide<A> <= 16);
    move(std::integral_constant<int64_t, 8>{});
    move(std::integral_constant<int64_t, 4>{});
    move(std::integral_constant<int64_t, 2>{});
    move(std::integral_constant<int64_t, 1>{});
}

// state = f(vector, place, state, whole) for all vectors of a row, neighbours in slots of their
// own, so that none waits for another; the last vector is filled up with `filler` and not whole.
constexpr int kSlots = 4;

template <typename A, typename State, typename F>
PVF_INLINE void for_vectors(const A* values, int64_t count, A filler, State (&slots)[kSlots],
                            const F& f) {
    State one = slots[0];
    State two = slots[1];
    State three = slots[2];
    State four = slots[3];
    constexpr std::true_type kWhole;
    int64_t i = 0;
    for (; i + kSlots * kWide<A> <= count; i += kSlots * kWide<A>) {
        one = f(load_wide(values + i), i, one, kWhole);
        two = f(load_wide(values + i + kWide<A>), i + kWide<A>, two, kWhole);
        three = f(load_wide(values + i + 2 * kWide<A>), i + 2 * kWide<A>, three, kWhole);
        four = f(load_wide(values + i + 3 * kWide<A>), i + 3 * kWide<A>, four, kWhole);
    }
    for (; i + kWide<A> <= count; i += kWide<A>) {
        one = f(load_wide(values + i), i, one, kWhole);
    }
    if (i < count) {
        A last[kWide<A>];
        store_unaligned(last, filler - Wide<A>{});
        copy_part(last, values + i, count - i);
        one = f(load_wide(last), i, one, std::false_type{});
    }
    slots[0] = one;
    slots[1] = two;
    slots[2] = three;
    slots[3] = four;
}

// All lanes, or the first `count` of them.
template <bool kWhole, typename A>
PVF_INLINE void store_first(A* to, Wide<A> values, int64_t count) {
    if constexpr (kWhole) {
        store_unaligned(to, values);
    } else {
        A lanes[kWide<A>];
        store_unaligned(lanes, values);
        copy_part(to, lanes, count);
    }
}

template <typename A>
struct RowSums {
    A peak;
    A sum;
    A shifted_sum;
};

// With kKeep exp(logit - peak) goes to `kept`.
template <bool kKeep, typename A, typename T>
PVF_INLINE RowSums<A> sums_of_row(const T* row, int64_t classes, bool shifted, A* kept) {
    constexpr A kLowest = -std::numeric_limits<A>::infinity();
    Wide<A> best[kSlots];
    for (Wide<A>& slot : best) {
        slot = kLowest - Wide<A>{};
    }
    for_chunks<A>(row, classes, [&](const A* values, int64_t, int64_t count) {
        for_vectors(values, count, kLowest, best,
                    [](Wide<A> v, int64_t, Wide<A> most, auto)
                        PVF_LAMBDA_INLINE { return v > most ? v : most; });
    });
    for (int slot = 1; slot < kSlots; ++slot) {
        best[0] = best[slot] > best[0] ? best[slot] : best[0];
    }
    A peak = best[0][0];
    for (int lane = 1; lane < kWide<A>; ++lane) {
        peak = best[0][lane] > peak ? best[0][lane] : peak;
    }
    Wide<A> sums[kSlots] = {};
    Wide<A> over[kSlots] = {};
    for_chunks<A>(row, classes, [&](const A* values, int64_t first, int64_t count) {
        for_vectors(values, count, kLowest, sums,
                    [=](Wide<A> v, int64_t i, Wide<A> sum, auto whole) PVF_LAMBDA_INLINE {
                        const Wide<A> e = exp_of(v - peak);
                        if constexpr (kKeep) {
                            store_first<whole>(kept + first + i, e, count - i);
                        }
                        return sum + e;
                    });
        if (shifted) {
            for_vectors(values, count, peak, over,
                        [=](Wide<A> v, int64_t, Wide<A> sum, auto)
                            PVF_LAMBDA_INLINE { return sum + (v - peak); });
        }
    });
    const auto all = [](const Wide<A>(&parts)[kSlots]) {
        return sum_of<A>((parts[0] + parts[1]) + (parts[2] + parts[3]));
    };
    return {peak, all(sums), all(over)};
}

template <typename A>
struct Greatest {
    Wide<A> value;
    typename WideOf<A>::index place;
};

template <typename A, typename T>
static int64_t argmax(const T* row, int64_t classes) {
    using Index = typename WideOf<A>::index;
    using Whole = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
    constexpr A kLowest = -std::numeric_limits<A>::infinity();
    Greatest<A> best[kSlots];
    Index lanes{};
    for (int lane = 0; lane < kWide<A>; ++lane) {
        lanes[lane] = lane;
    }
    for (Greatest<A>& slot : best) {
        slot = {kLowest - Wide<A>{}, Index{}};
    }
    for_chunks<A>(row, classes, [&](const A* values, int64_t first, int64_t count) {
        for_vectors(
            values, count, kLowest, best,
            [=](Wide<A> v, int64_t i, Greatest<A> old, auto) PVF_LAMBDA_INLINE {
                const Index better = (v > old.value) | ((v != v) & (old.value == old.value));
                return Greatest<A>{better ? v : old.value,
                                   better ? lanes + static_cast<Whole>(first + i) : old.place};
            });
    });
    Greatest<A>& top = best[0];
    for (int slot = 1; slot < kSlots; ++slot) {
        const Greatest<A>& next = best[slot];
        const Index equal =
            (next.value == top.value) | ((next.value != next.value) & (top.value != top.value));
        const Index nan = (next.value != next.value) & (top.value == top.value);
        const Index better = (next.value > top.value) | nan | (equal & (next.place < top.place));
        top.value = better ? next.value : top.value;
        top.place = better ? next.place : top.place;
    }
    A greatest = top.value[0];
    int64_t found = top.place[0];
    for (int lane = 1; lane < kWide<A>; ++lane) {
        const A value = top.value[lane];
        const bool same = value == greatest || (value != value && greatest != greatest);
        if (two_heads::leads(value, greatest) || (same && top.place[lane] < found)) {
            greatest = value;
            found = top.place[lane];
        }
    }
    return found;
}

template <typename A>
PVF_INLINE Target<A> target_of(const TwoHeadLoss& p, int64_t row) {
    const bool mixed = p.partners != nullptr;
    return two_heads::target_of(p, p.labels[row], mixed ? p.partners[row] : 0,
                                mixed ? static_cast<const A*>(p.lam)[row * p.lam_step] : A(1));
}

template <typename F>
PVF_INLINE void with_sums(const TwoHeadLoss& p, const F& f) {
    with_float(p.type, [&]<typename T>(Type<T>) { f(Type<Accumulate<T>>{}, Type<T>{}); });
}

static void choose(const TwoHeadLoss& p, int64_t row) {
    with_float(p.teacher_type, [&]<typename T>(Type<T>) {
        p.chosen[row] = argmax<Accumulate<T>>(
            static_cast<const T*>(p.teacher) + row * p.teacher_stride, p.classes);
    });
}

template <typename A>
PVF_INLINE A weight_of(const TwoHeadLoss& p, int64_t chosen) {
    return p.weights == nullptr ? A(1) : static_cast<const A*>(p.weights)[chosen];
}

static void divide(const TwoHeadLoss& p) {
    with_sums(p, [&]<typename A, typename T>(Type<A>, Type<T>) {
        double total = 0;
        if (p.divisor != nullptr) {
            total = static_cast<double>(*static_cast<const A*>(p.divisor));
        } else if (p.weights == nullptr) {
            total = static_cast<double>(p.rows);
        } else {
            for (int64_t i = 0; i < p.rows; ++i) {
                total += static_cast<double>(weight_of<A>(p, p.chosen[i]));
            }
        }
        *static_cast<A*>(p.total) = static_cast<A>(total);
    });
}

static void finish(const TwoHeadLoss& p) {
    with_sums(p, [&]<typename A, typename T>(Type<A>, Type<T>) {
        const A* parts = static_cast<const A*>(p.parts);
        double sums[2] = {};
        for (int part = 0; part < 2; ++part) {
            for (int64_t i = 0; i < p.rows; ++i) {
                sums[part] += static_cast<double>(parts[part * p.rows + i]);
            }
        }
        const double cls = two_heads::quotient(sums[0], static_cast<double>(p.rows));
        const double dist =
            two_heads::quotient(sums[1], static_cast<double>(*static_cast<const A*>(p.total)));
        *static_cast<A*>(p.loss) = static_cast<A>((1 - p.alpha) * cls + p.alpha * dist);
        *static_cast<A*>(p.cls_loss) = static_cast<A>(cls);
        *static_cast<A*>(p.dist_loss) = static_cast<A>(dist);
    });
}

// slope * (softmax - floor), then the entries whose target is more than the floor once more. With
// kKept `out` holds exp(logit - peak).
template <bool kKept, typename A, typename T>
PVF_INLINE void grads_of_row(const T* row, T* out, int64_t classes, A peak, A sum, A slope,
                             const Target<A>& target) {
    const A share = A(1) / sum;
    const A floor = target.floor;
    struct Nothing {};
    Nothing nothing[kSlots];
    if constexpr (kKept) {
        for_vectors(out, classes, A(0), nothing,
                    [=](Wide<A> e, int64_t i, Nothing none, auto whole) PVF_LAMBDA_INLINE {
                        store_first<whole>(out + i, slope * (e * share - floor), classes - i);
                        return none;
                    });
    } else {
        for_chunks<A>(row, classes, [&](const A* values, int64_t first, int64_t count) {
            A narrow[kTwoHeadChunk];
            A* to = nullptr;
            if constexpr (std::is_same_v<A, T>) {
                to = out;
            } else {
                to = narrow;
            }
            for_vectors(values, count, A(0), nothing,
                        [=](Wide<A> v, int64_t i, Nothing none, auto whole) PVF_LAMBDA_INLINE {
                            const Wide<A> e = exp_of(v - peak);
                            store_first<whole>(to + i, slope * (e * share - floor), count - i);
                            return none;
                        });
            if constexpr (!std::is_same_v<A, T>) {
                narrow_row(narrow, count, out + first);
            }
        });
    }
    for (const int64_t c : {target.label, target.partner}) {
        if (c >= 0) {
            const A p = share * std::exp(static_cast<A>(to_float(row[c])) - peak);
            out[c] = from_float<T>(slope * (p - target.at(c)));
        }
    }
}

template <bool kKept>
PVF_INLINE void grads_with(const TwoHeadLoss& p, int64_t row) {
    with_sums(p, [&]<typename A, typename T>(Type<A>, Type<T>) {
        constexpr bool kHere = kKept && std::is_same_v<A, T>;
        const A* peaks = static_cast<const A*>(p.peaks);
        const A* sums = static_cast<const A*>(p.sums);
        const auto given = [](const void* grad) {
            return grad == nullptr ? A(0) : *static_cast<const A*>(grad);
        };
        const A grad = given(p.grad);
        const int64_t chosen = p.chosen[row];
        grads_of_row<kHere, A>(static_cast<const T*>(p.cls) + row * p.cls_stride,
                               static_cast<T*>(p.grad_cls) + row * p.classes, p.classes, peaks[row],
                               sums[row], two_heads::cls_slope(p, grad, given(p.grad_c)),
                               target_of<A>(p, row));
        const A slope =
            two_heads::dist_slope(p, grad, given(p.grad_d), *static_cast<const A*>(p.total));
        grads_of_row<kHere, A>(static_cast<const T*>(p.dist) + row * p.dist_stride,
                               static_cast<T*>(p.grad_dist) + row * p.classes, p.classes,
                               peaks[p.rows + row], sums[p.rows + row],
                               weight_of<A>(p, chosen) * slope,
                               Target<A>{chosen, -1, A(1), A(0), A(0)});
    });
}

static void grads(const TwoHeadLoss& p, int64_t row) { grads_with<false>(p, row); }

template <bool kKeep>
PVF_INLINE void losses_with(const TwoHeadLoss& p, int64_t row) {
    with_sums(p, [&]<typename A, typename T>(Type<A>, Type<T>) {
        constexpr bool kHere = kKeep && std::is_same_v<A, T>;
        const T* cls = static_cast<const T*>(p.cls) + row * p.cls_stride;
        const T* dist = static_cast<const T*>(p.dist) + row * p.dist_stride;
        A* keep_cls = nullptr;
        A* keep_dist = nullptr;
        if constexpr (kHere) {
            keep_cls = static_cast<A*>(p.grad_cls) + row * p.classes;
            keep_dist = static_cast<A*>(p.grad_dist) + row * p.classes;
        }
        const auto one = sums_of_row<kHere, A>(cls, p.classes, p.smoothing > 0, keep_cls);
        const auto two = sums_of_row<kHere, A>(dist, p.classes, false, keep_dist);
        const Target<A> target = target_of<A>(p, row);
        const auto over = [&](int64_t c) {
            return c < 0 ? A(0) : static_cast<A>(to_float(cls[c])) - one.peak;
        };
        const int64_t chosen = p.chosen[row];
        A* peaks = static_cast<A*>(p.peaks);
        A* sums = static_cast<A*>(p.sums);
        A* parts = static_cast<A*>(p.parts);
        peaks[row] = one.peak;
        peaks[p.rows + row] = two.peak;
        sums[row] = one.sum;
        sums[p.rows + row] = two.sum;
        parts[row] = two_heads::cross_entropy(target, std::log(one.sum), one.shifted_sum,
                                              over(target.label), over(target.partner));
        const A over_dist = static_cast<A>(to_float(dist[chosen])) - two.peak;
        parts[p.rows + row] = weight_of<A>(p, chosen) * (std::log(two.sum) - over_dist);
    });
}

static void row(const TwoHeadLoss& p, int64_t row) {
    if (p.grad_cls == nullptr) {
        losses_with<false>(p, row);
    } else {
        losses_with<true>(p, row);
        grads_with<true>(p, row);
    }
}

extern const TwoHeadLossCpu two_head_loss_cpu;
const TwoHeadLossCpu two_head_loss_cpu{choose, divide, row, finish, grads};

}  // namespace pyvitfast::PVF_CPU_CAPABILITY
