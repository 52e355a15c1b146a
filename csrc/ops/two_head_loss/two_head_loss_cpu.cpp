#include <cmath>
#include <cstring>
#include <limits>

#include "cpu_matmul.h"
#include "cpu_rows.h"
#include "ops/two_head_loss/two_head_loss.h"
#include "ops/two_head_loss/two_head_loss_math.h"

namespace pyvitfast::PVF_CPU_CAPABILITY {

using two_heads::Target;

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

// f(vector, place, slot) for all vectors of a row, neighbours in slots of their own, so that none
// waits for another; the last one is filled up with `filler`.
constexpr int kSlots = 4;

template <typename A, typename F>
PVF_INLINE void for_vectors(const A* values, int64_t count, A filler, const F& f) {
    int64_t i = 0;
    for (; i + kSlots * kWide<A> <= count; i += kSlots * kWide<A>) {
#pragma GCC unroll 4
        for (int slot = 0; slot < kSlots; ++slot) {
            f(load_wide(values + i + slot * kWide<A>), i + slot * kWide<A>, slot);
        }
    }
    for (; i + kWide<A> <= count; i += kWide<A>) {
        f(load_wide(values + i), i, 0);
    }
    if (i < count) {
        A last[kWide<A>];
        store_unaligned(last, filler - Wide<A>{});
        std::memcpy(last, values + i, static_cast<size_t>(count - i) * sizeof(A));
        f(load_wide(last), i, 0);
    }
}

template <typename A>
struct RowSums {
    A peak;
    A log_sum;
    A shifted_sum;
};

template <typename A, typename T>
PVF_INLINE RowSums<A> sums_of_row(const T* row, int64_t classes, bool shifted) {
    constexpr A kLowest = -std::numeric_limits<A>::infinity();
    Wide<A> best[kSlots];
    for (Wide<A>& slot : best) {
        slot = kLowest - Wide<A>{};
    }
    for_chunks<A>(row, classes, [&](const A* values, int64_t, int64_t count) {
        for_vectors(values, count, kLowest, [&](Wide<A> v, int64_t, int slot) {
            best[slot] = v > best[slot] ? v : best[slot];
        });
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
    for_chunks<A>(row, classes, [&](const A* values, int64_t, int64_t count) {
        for_vectors(values, count, kLowest,
                    [&](Wide<A> v, int64_t, int slot) { sums[slot] += exp_of(v - peak); });
        if (shifted) {
            for_vectors(values, count, peak,
                        [&](Wide<A> v, int64_t, int slot) { over[slot] += v - peak; });
        }
    });
    const auto all = [](const Wide<A>(&parts)[kSlots]) {
        return sum_of<A>((parts[0] + parts[1]) + (parts[2] + parts[3]));
    };
    return {peak, std::log(all(sums)), all(over)};
}

template <typename A, typename T>
static int64_t argmax(const T* row, int64_t classes) {
    using Index = typename WideOf<A>::index;
    using Whole = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
    constexpr A kLowest = -std::numeric_limits<A>::infinity();
    Wide<A> best[kSlots];
    Index places[kSlots] = {};
    Index lanes{};
    for (int lane = 0; lane < kWide<A>; ++lane) {
        lanes[lane] = lane;
    }
    for (Wide<A>& slot : best) {
        slot = kLowest - Wide<A>{};
    }
    for_chunks<A>(row, classes, [&](const A* values, int64_t first, int64_t count) {
        for_vectors(values, count, kLowest, [&](Wide<A> v, int64_t i, int slot) {
            const Wide<A> old = best[slot];
            const Index better = (v > old) | ((v != v) & (old == old));
            best[slot] = better ? v : old;
            places[slot] = better ? lanes + static_cast<Whole>(first + i) : places[slot];
        });
    });
    for (int slot = 1; slot < kSlots; ++slot) {
        const Index equal =
            (best[slot] == best[0]) | ((best[slot] != best[slot]) & (best[0] != best[0]));
        const Index nan = (best[slot] != best[slot]) & (best[0] == best[0]);
        const Index better = (best[slot] > best[0]) | nan | (equal & (places[slot] < places[0]));
        best[0] = better ? best[slot] : best[0];
        places[0] = better ? places[slot] : places[0];
    }
    A greatest = best[0][0];
    int64_t found = places[0][0];
    for (int lane = 1; lane < kWide<A>; ++lane) {
        const A value = best[0][lane];
        const bool same = value == greatest || (value != value && greatest != greatest);
        if (two_heads::leads(value, greatest) || (same && places[0][lane] < found)) {
            greatest = value;
            found = places[0][lane];
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

static void row(const TwoHeadLoss& p, int64_t row) {
    if (p.teacher != nullptr) {
        with_float(p.teacher_type, [&]<typename T>(Type<T>) {
            p.chosen[row] = argmax<Accumulate<T>>(
                static_cast<const T*>(p.teacher) + row * p.teacher_stride, p.classes);
        });
    }
    with_sums(p, [&]<typename A, typename T>(Type<A>, Type<T>) {
        const T* cls = static_cast<const T*>(p.cls) + row * p.cls_stride;
        const T* dist = static_cast<const T*>(p.dist) + row * p.dist_stride;
        const auto one = sums_of_row<A>(cls, p.classes, p.smoothing > 0);
        const auto two = sums_of_row<A>(dist, p.classes, false);
        const Target<A> target = target_of<A>(p, row);
        const auto over = [&](int64_t c) {
            return c < 0 ? A(0) : static_cast<A>(to_float(cls[c])) - one.peak;
        };
        const int64_t chosen = p.chosen[row];
        const A weight = p.weights == nullptr ? A(1) : static_cast<const A*>(p.weights)[chosen];
        A* peaks = static_cast<A*>(p.peaks);
        A* log_sums = static_cast<A*>(p.log_sums);
        A* parts = static_cast<A*>(p.parts);
        peaks[row] = one.peak;
        peaks[p.rows + row] = two.peak;
        log_sums[row] = one.log_sum;
        log_sums[p.rows + row] = two.log_sum;
        parts[row] = two_heads::cross_entropy(target, one.log_sum, one.shifted_sum,
                                              over(target.label), over(target.partner));
        parts[p.rows + row] =
            weight * (two.log_sum - (static_cast<A>(to_float(dist[chosen])) - two.peak));
        parts[2 * p.rows + row] = weight;
    });
}

static void finish(const TwoHeadLoss& p) {
    with_sums(p, [&]<typename A, typename T>(Type<A>, Type<T>) {
        const A* parts = static_cast<const A*>(p.parts);
        double sums[3] = {};
        for (int part = 0; part < 3; ++part) {
            for (int64_t i = 0; i < p.rows; ++i) {
                sums[part] += static_cast<double>(parts[part * p.rows + i]);
            }
        }
        const double total =
            p.divisor == nullptr ? sums[2] : static_cast<double>(*static_cast<const A*>(p.divisor));
        const double cls = two_heads::quotient(sums[0], static_cast<double>(p.rows));
        const double dist = two_heads::quotient(sums[1], total);
        *static_cast<A*>(p.loss) = static_cast<A>((1 - p.alpha) * cls + p.alpha * dist);
        *static_cast<A*>(p.cls_loss) = static_cast<A>(cls);
        *static_cast<A*>(p.dist_loss) = static_cast<A>(dist);
        *static_cast<A*>(p.total) = static_cast<A>(total);
    });
}

// slope * (softmax - floor), then the entries whose target is more than the floor once more.
template <typename A, typename T>
PVF_INLINE void grads_of_row(const T* row, T* out, int64_t classes, A peak, A log_sum, A slope,
                             const Target<A>& target) {
    for_chunks<A>(row, classes, [&](const A* values, int64_t first, int64_t count) {
        A narrow[kTwoHeadChunk];
        A* to = nullptr;
        if constexpr (std::is_same_v<A, T>) {
            to = out;
        } else {
            to = narrow;
        }
        for_vectors(values, count, A(0), [&](Wide<A> v, int64_t i, int) {
            const Wide<A> g = slope * (exp_of(v - peak - log_sum) - target.floor);
            if (i + kWide<A> <= count) {
                store_unaligned(to + i, g);
                return;
            }
            for (int64_t lane = 0; i + lane < count; ++lane) {
                to[i + lane] = g[lane];
            }
        });
        if constexpr (!std::is_same_v<A, T>) {
            narrow_row(narrow, count, out + first);
        }
    });
    for (const int64_t c : {target.label, target.partner}) {
        if (c >= 0) {
            const A p = std::exp(static_cast<A>(to_float(row[c])) - peak - log_sum);
            out[c] = from_float<T>(slope * (p - target.at(c)));
        }
    }
}

static void grads(const TwoHeadLoss& p, int64_t row) {
    with_sums(p, [&]<typename A, typename T>(Type<A>, Type<T>) {
        const A* peaks = static_cast<const A*>(p.peaks);
        const A* log_sums = static_cast<const A*>(p.log_sums);
        const auto given = [](const void* grad) {
            return grad == nullptr ? A(0) : *static_cast<const A*>(grad);
        };
        const A grad = given(p.grad);
        const int64_t chosen = p.chosen[row];
        const A weight = p.weights == nullptr ? A(1) : static_cast<const A*>(p.weights)[chosen];
        grads_of_row<A>(static_cast<const T*>(p.cls) + row * p.cls_stride,
                        static_cast<T*>(p.grad_cls) + row * p.classes, p.classes, peaks[row],
                        log_sums[row], two_heads::cls_slope(p, grad, given(p.grad_c)),
                        target_of<A>(p, row));
        const A slope =
            two_heads::dist_slope(p, grad, given(p.grad_d), *static_cast<const A*>(p.total));
        grads_of_row<A>(static_cast<const T*>(p.dist) + row * p.dist_stride,
                        static_cast<T*>(p.grad_dist) + row * p.classes, p.classes,
                        peaks[p.rows + row], log_sums[p.rows + row], weight * slope,
                        Target<A>{chosen, -1, A(1), A(0), A(0)});
    });
}

extern const TwoHeadLossCpu two_head_loss_cpu;
const TwoHeadLossCpu two_head_loss_cpu{row, finish, grads};

}  // namespace pyvitfast::PVF_CPU_CAPABILITY
