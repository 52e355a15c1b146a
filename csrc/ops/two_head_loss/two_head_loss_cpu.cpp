#include <cmath>
#include <cstring>
#include <limits>

#include "cpu_matmul.h"
#include "cpu_rows.h"
#include "ops/two_head_loss/two_head_loss.h"
#include "ops/two_head_loss/two_head_loss_math.h"

namespace pyvitfast::PVF_CPU_CAPABILITY {

using two_heads::Target;

// Of lambdas and members, where PVF_INLINE cannot stand.
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

// The first `count` < kWide<A> numbers, and `filler` in the other lanes.
template <typename A>
PVF_INLINE Wide<A> load_first(const A* from, int64_t count, A filler) {
#if defined(__AVX512F__)
    const auto lanes = (1u << count) - 1;
    if constexpr (sizeof(A) == 4) {
        return reinterpret_cast<Wide<A>>(
            _mm512_mask_loadu_ps(_mm512_set1_ps(filler), static_cast<__mmask16>(lanes), from));
    } else {
        return reinterpret_cast<Wide<A>>(
            _mm512_mask_loadu_pd(_mm512_set1_pd(filler), static_cast<__mmask8>(lanes), from));
    }
#else
    Wide<A> values = filler - Wide<A>{};
    for (int lane = 0; lane < kWide<A>; ++lane) {
        if (lane < count) {
            values[lane] = from[lane];
        }
    }
    return values;
#endif
}

// All lanes, or the first `count` of them.
template <bool kWhole, typename A>
PVF_INLINE void store_first(A* to, Wide<A> values, int64_t count) {
    if constexpr (kWhole) {
        store_unaligned(to, values);
    } else {
#if defined(__AVX512F__)
        const auto lanes = (1u << count) - 1;
        if constexpr (sizeof(A) == 4) {
            _mm512_mask_storeu_ps(to, static_cast<__mmask16>(lanes),
                                  reinterpret_cast<__m512>(values));
        } else {
            _mm512_mask_storeu_pd(to, static_cast<__mmask8>(lanes),
                                  reinterpret_cast<__m512d>(values));
        }
#else
        for (int lane = 0; lane < kWide<A>; ++lane) {
            if (lane < count) {
                to[lane] = values[lane];
            }
        }
#endif
    }
}

template <bool kWhole, typename A>
PVF_INLINE Wide<A> load_part(const A* from, int64_t count, A filler) {
    if constexpr (kWhole) {
        return load_wide(from);
    } else {
        return load_first(from, count, filler);
    }
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
        one = f(load_first(values + i, count - i, filler), i, one, std::false_type{});
    }
    slots[0] = one;
    slots[1] = two;
    slots[2] = three;
    slots[3] = four;
}

// One bit a lane.
PVF_INLINE uint32_t lanes_set(WideInts mask) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
#elif defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
#else
    uint32_t bits = 0;
    for (int lane = 0; lane < kWide<float>; ++lane) {
        bits |= static_cast<uint32_t>(mask[lane] & 1) << lane;
    }
    return bits;
#endif
}
PVF_INLINE uint32_t lanes_set(WideLongs mask) {
#if defined(__AVX512F__)
    return _mm512_movepi64_mask(reinterpret_cast<__m512i>(mask));
#elif defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_pd(reinterpret_cast<__m256d>(mask)));
#else
    uint32_t bits = 0;
    for (int lane = 0; lane < kWide<double>; ++lane) {
        bits |= static_cast<uint32_t>(mask[lane] & 1) << lane;
    }
    return bits;
#endif
}

template <typename A, int kStep = kWide<A> / 2>
PVF_INLINE A greatest_lane(Wide<A> vector) {
    if constexpr (kStep == 0) {
        return vector[0];
    } else {
        typename WideOf<A>::index other{};
        for (int lane = 0; lane < kWide<A>; ++lane) {
            other[lane] = lane ^ kStep;
        }
        const Wide<A> turned = __builtin_shuffle(vector, other);
        return greatest_lane<A, kStep / 2>(turned > vector ? turned : vector);
    }
}

template <typename A>
struct Lanes {
    Wide<A> greatest = -std::numeric_limits<A>::infinity() - Wide<A>{};
    Wide<A> zeros{};
};

template <typename A>
struct Greatest {
    A value;      // NaN is passed over
    bool finite;  // with kFinite: whether all of the row is
};

template <bool kFinite, typename A, typename T>
PVF_INLINE Greatest<A> greatest_of(const T* row, int64_t count) {
    constexpr A kLowest = -std::numeric_limits<A>::infinity();
    Lanes<A> slots[kSlots];
    for_chunks<A>(row, count, [&](const A* values, int64_t, int64_t here) {
        for_vectors(values, here, kFinite ? values[0] : kLowest, slots,
                    [](Wide<A> v, int64_t, Lanes<A> old, auto) PVF_LAMBDA_INLINE {
                        if constexpr (kFinite) {
                            old.zeros = multiply_add(v, Wide<A>{}, old.zeros);
                        }
                        old.greatest = v > old.greatest ? v : old.greatest;
                        return old;
                    });
    });
    Lanes<A>& all = slots[0];
    for (int slot = 1; slot < kSlots; ++slot) {
        const Wide<A> greatest = slots[slot].greatest;
        all.greatest = greatest > all.greatest ? greatest : all.greatest;
        all.zeros += slots[slot].zeros;
    }
    return {greatest_lane<A>(all.greatest), sum_of<A>(all.zeros) == A(0)};
}

// As torch's: the first of the greatest, and the first NaN before all. The row is in the cache when
// it is searched.
template <typename A, typename T>
static int64_t argmax(const T* row, int64_t classes) {
    const Greatest<A> top = greatest_of<true, A>(row, classes);
    int64_t found = top.finite ? -1 : 0;
    for_chunks<A>(row, classes, [&](const A* values, int64_t first, int64_t here) {
        int64_t i = 0;
        for (; found < 0 && i + kWide<A> <= here; i += kWide<A>) {
            const uint32_t lanes = lanes_set(load_wide(values + i) == top.value);
            if (lanes != 0) {
                found = first + i + __builtin_ctz(lanes);
            }
        }
        for (; found < 0 && i < here; ++i) {
            if (values[i] == top.value) {
                found = first + i;
            }
        }
    });
    if (!top.finite) {
        A best = static_cast<A>(to_float(row[0]));
        for (int64_t i = 1; i < classes; ++i) {
            const A value = static_cast<A>(to_float(row[i]));
            if (two_heads::leads(value, best)) {
                best = value;
                found = i;
            }
        }
    }
    return found;
}

template <typename A>
struct RowSums {
    A peak;
    A sum;
    A shifted_sum;
};

struct NothingBeside {
    PVF_LAMBDA_INLINE void operator()(int64_t, int64_t, auto) const {}
};

// With kKeep exp(logit - peak) goes to `kept`. beside(place, count left, whole) is done at each
// vector: exponentials leave the units that load and store idle.
template <bool kKeep, typename A, typename T, typename F>
PVF_INLINE RowSums<A> sums_of_row(const T* row, int64_t classes, A peak, bool shifted, A* kept,
                                  const F& beside) {
    constexpr A kLowest = -std::numeric_limits<A>::infinity();
    Wide<A> sums[kSlots] = {};
    Wide<A> over[kSlots] = {};
    for_chunks<A>(
        row, classes, [&](const A* values, int64_t first, int64_t count) PVF_LAMBDA_INLINE {
            for_vectors(values, count, kLowest, sums,
                        [&](Wide<A> v, int64_t i, Wide<A> sum, auto whole) PVF_LAMBDA_INLINE {
                            __builtin_prefetch(row + first + i + classes);  // the next row
                            const Wide<A> e = exp_of(v - peak);
                            if constexpr (kKeep) {
                                store_first<whole>(kept + first + i, e, count - i);
                            }
                            beside(first + i, count - i, whole);
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

static void finish(const TwoHeadLoss& p, double cls_sum, double dist_sum) {
    with_sums(p, [&]<typename A, typename T>(Type<A>, Type<T>) {
        const double cls = two_heads::quotient(cls_sum, static_cast<double>(p.rows));
        const double dist =
            two_heads::quotient(dist_sum, static_cast<double>(*static_cast<const A*>(p.total)));
        *static_cast<A*>(p.loss) = static_cast<A>((1 - p.alpha) * cls + p.alpha * dist);
        *static_cast<A*>(p.cls_loss) = static_cast<A>(cls);
        *static_cast<A*>(p.dist_loss) = static_cast<A>(dist);
    });
}

// What exp(logit - peak) becomes: slope * (softmax - floor of the target).
template <typename A>
struct Scale {
    Wide<A> share;
    Wide<A> floor;

    PVF_LAMBDA_INLINE Scale(A slope, A sum, const Target<A>& target)
        : share(slope / sum - Wide<A>{}), floor(-slope * target.floor - Wide<A>{}) {}
    PVF_LAMBDA_INLINE Wide<A> operator()(Wide<A> e) const { return multiply_add(e, share, floor); }
};

// The rest of the target of label and partner; of a class that is both, both.
template <typename A, typename T>
PVF_INLINE void take_labels(const T* row, T* out, A peak, A sum, A slope, const Target<A>& target) {
    const auto take = [&](int64_t c, A share) {
        if constexpr (std::is_same_v<A, T>) {
            out[c] -= slope * share;
        } else {
            const A p = std::exp(to_float(row[c]) - peak) / sum;
            out[c] = from_float<T>(slope * (p - target.at(c)));
        }
    };
    take(target.label, target.share);
    if (target.partner >= 0) {
        take(target.partner, target.rest);
    }
}

template <typename A, typename T>
PVF_INLINE void grads_of_row(const T* row, T* out, int64_t classes, A peak, A sum, A slope,
                             const Target<A>& target) {
    const Scale<A> scale(slope, sum, target);
    struct Nothing {};
    Nothing nothing[kSlots];
    for_chunks<A>(row, classes, [&](const A* values, int64_t first, int64_t count) {
        A wide[kTwoHeadChunk];
        A* to = wide;
        if constexpr (std::is_same_v<A, T>) {
            to = out;
        }
        for_vectors(values, count, A(0), nothing,
                    [&](Wide<A> v, int64_t i, Nothing none, auto whole) PVF_LAMBDA_INLINE {
                        store_first<whole>(to + i, scale(exp_of(v - peak)), count - i);
                        return none;
                    });
        if constexpr (!std::is_same_v<A, T>) {
            narrow_row(wide, count, out + first);
        }
    });
    take_labels(row, out, peak, sum, slope, target);
}

template <typename A>
struct Sums {
    RowSums<A> cls;
    RowSums<A> dist;
};

template <typename A>
struct Slopes {
    A cls;
    A dist;
};

template <typename A>
PVF_INLINE Slopes<A> slopes_of(const TwoHeadLoss& p, int64_t row) {
    const auto given = [](const void* grad) {
        return grad == nullptr ? A(0) : *static_cast<const A*>(grad);
    };
    const A grad = given(p.grad);
    const A total = *static_cast<const A*>(p.total);
    return {
        two_heads::cls_slope(p, grad, given(p.grad_c)),
        weight_of<A>(p, p.chosen[row]) * two_heads::dist_slope(p, grad, given(p.grad_d), total)};
}

template <typename A>
PVF_INLINE Target<A> teacher_target(const TwoHeadLoss& p, int64_t row) {
    return {p.chosen[row], -1, A(1), A(0), A(0)};
}

template <typename A, typename T>
PVF_INLINE Sums<A> sums_of_heads(const TwoHeadLoss& p, int64_t row) {
    const auto sums = [&](const void* logits, int64_t stride, bool shifted) PVF_LAMBDA_INLINE {
        const T* values = static_cast<const T*>(logits) + row * stride;
        const A peak = greatest_of<false, A>(values, p.classes).value;
        return sums_of_row<false, A>(values, p.classes, peak, shifted, nullptr, NothingBeside{});
    };
    return {sums(p.cls, p.cls_stride, p.smoothing > 0), sums(p.dist, p.dist_stride, false)};
}

template <typename A, typename T>
PVF_INLINE void grads_of_heads(const TwoHeadLoss& p, int64_t row, const Sums<A>& sums) {
    const Slopes<A> slopes = slopes_of<A>(p, row);
    grads_of_row<A>(static_cast<const T*>(p.cls) + row * p.cls_stride,
                    static_cast<T*>(p.grad_cls) + row * p.classes, p.classes, sums.cls.peak,
                    sums.cls.sum, slopes.cls, target_of<A>(p, row));
    grads_of_row<A>(static_cast<const T*>(p.dist) + row * p.dist_stride,
                    static_cast<T*>(p.grad_dist) + row * p.classes, p.classes, sums.dist.peak,
                    sums.dist.sum, slopes.dist, teacher_target<A>(p, row));
}

// Sums and gradients with one exponential a logit, which waits in its gradient's place: the DIST
// head's peak is found while the CLS head's exponentials are made, and so on.
template <typename A, typename T>
PVF_INLINE Sums<A> sums_and_grads(const TwoHeadLoss& p, int64_t row) {
    if constexpr (!std::is_same_v<A, T>) {
        const Sums<A> sums = sums_of_heads<A, T>(p, row);
        grads_of_heads<A, T>(p, row, sums);
        return sums;
    } else {
        constexpr A kLowest = -std::numeric_limits<A>::infinity();
        const int64_t classes = p.classes;
        const A* cls = static_cast<const A*>(p.cls) + row * p.cls_stride;
        const A* dist = static_cast<const A*>(p.dist) + row * p.dist_stride;
        A* grad_cls = static_cast<A*>(p.grad_cls) + row * classes;
        A* grad_dist = static_cast<A*>(p.grad_dist) + row * classes;
        const Slopes<A> slopes = slopes_of<A>(p, row);
        Wide<A> most = kLowest - Wide<A>{};
        Sums<A> sums;
        sums.cls = sums_of_row<true, A>(
            cls, classes, greatest_of<false, A>(cls, classes).value, p.smoothing > 0, grad_cls,
            [&](int64_t i, int64_t left, auto whole) PVF_LAMBDA_INLINE {
                const Wide<A> v = load_part<whole>(dist + i, left, kLowest);
                most = v > most ? v : most;
            });
        const Target<A> target = target_of<A>(p, row);
        const Scale<A> scale_cls(slopes.cls, sums.cls.sum, target);
        sums.dist =
            sums_of_row<true, A>(dist, classes, greatest_lane<A>(most), false, grad_dist,
                                 [&](int64_t i, int64_t left, auto whole) PVF_LAMBDA_INLINE {
                                     const Wide<A> e = load_part<whole>(grad_cls + i, left, A(0));
                                     store_first<whole>(grad_cls + i, scale_cls(e), left);
                                 });
        take_labels(cls, grad_cls, sums.cls.peak, sums.cls.sum, slopes.cls, target);
        const Target<A> chosen = teacher_target<A>(p, row);
        const Scale<A> scale_dist(slopes.dist, sums.dist.sum, chosen);
        struct Nothing {};
        Nothing nothing[kSlots];
        for_vectors(grad_dist, classes, A(0), nothing,
                    [&](Wide<A> e, int64_t i, Nothing none, auto whole) PVF_LAMBDA_INLINE {
                        store_first<whole>(grad_dist + i, scale_dist(e), classes - i);
                        return none;
                    });
        take_labels(dist, grad_dist, sums.dist.peak, sums.dist.sum, slopes.dist, chosen);
        return sums;
    }
}

static TwoHeadRow row(const TwoHeadLoss& p, int64_t row) {
    TwoHeadRow losses{};
    with_sums(p, [&]<typename A, typename T>(Type<A>, Type<T>) {
        const Sums<A> sums =
            p.grad_cls == nullptr ? sums_of_heads<A, T>(p, row) : sums_and_grads<A, T>(p, row);
        const Target<A> target = target_of<A>(p, row);
        const T* cls = static_cast<const T*>(p.cls) + row * p.cls_stride;
        const T* dist = static_cast<const T*>(p.dist) + row * p.dist_stride;
        const auto over = [&](int64_t c) {
            return c < 0 ? A(0) : static_cast<A>(to_float(cls[c])) - sums.cls.peak;
        };
        const int64_t chosen = p.chosen[row];
        losses.cls = two_heads::cross_entropy(target, std::log(sums.cls.sum), sums.cls.shifted_sum,
                                              over(target.label), over(target.partner));
        const A over_dist = static_cast<A>(to_float(dist[chosen])) - sums.dist.peak;
        losses.dist = weight_of<A>(p, chosen) * (std::log(sums.dist.sum) - over_dist);
        if (p.peaks != nullptr) {
            A* peaks = static_cast<A*>(p.peaks);
            A* kept = static_cast<A*>(p.sums);
            peaks[row] = sums.cls.peak;
            peaks[p.rows + row] = sums.dist.peak;
            kept[row] = sums.cls.sum;
            kept[p.rows + row] = sums.dist.sum;
        }
    });
    return losses;
}

static void grads(const TwoHeadLoss& p, int64_t row) {
    with_sums(p, [&]<typename A, typename T>(Type<A>, Type<T>) {
        if (p.peaks == nullptr) {
            sums_and_grads<A, T>(p, row);
            return;
        }
        const A* peaks = static_cast<const A*>(p.peaks);
        const A* sums = static_cast<const A*>(p.sums);
        grads_of_heads<A, T>(
            p, row,
            {{peaks[row], sums[row], A(0)}, {peaks[p.rows + row], sums[p.rows + row], A(0)}});
    });
}

extern const TwoHeadLossCpu two_head_loss_cpu;
const TwoHeadLossCpu two_head_loss_cpu{choose, divide, row, finish, grads};

}  // namespace pyvitfast::PVF_CPU_CAPABILITY
