#include <cmath>
#include <cstdint>

#include "ops/two_head_loss/two_head_loss.h"
#include "ops/two_head_loss/two_head_loss_math.h"
#include "portable/device.h"
#include "portable/intrinsics.h"
#include "portable/launch_result.h"
#include "portable/reduce.h"

namespace pyvitfast {

using namespace device;
using two_heads::Target;

namespace {

constexpr int kTeams = kTwoHeadThreads / kWarpSize;

// The threads that share a row: a warp, or the block.
template <bool kBlock>
struct Team {
    static constexpr int kThreads = kBlock ? kTwoHeadThreads : kWarpSize;

    PVF_DEVICE static int64_t row() {
        return kBlock ? int64_t{block_idx().x} : int64_t{block_idx().x} * kTeams + warp_id();
    }
    PVF_DEVICE static int thread() { return static_cast<int>(kBlock ? thread_idx().x : lane_id()); }
    template <typename T>
    PVF_DEVICE static T sum(T value) {
        if constexpr (kBlock) {
            return block_sum(value);
        } else {
            return warp_sum(value);
        }
    }
    template <typename T>
    PVF_DEVICE static T max(T value, T lowest) {
        if constexpr (kBlock) {
            return block_max(value, lowest);
        } else {
            return warp_max(value);
        }
    }
};

// A thread's share of a row, seen once.
template <typename A>
struct Seen {
    A peak = A(-INFINITY);
    A sum = A(0);      // of exp(logit - peak)
    A shifted = A(0);  // of logit - peak
    A count = A(0);

    PVF_DEVICE void take(A value) {
        if (value > peak || value != value) {
            move(value);
        }
        // Also an infinite peak has distance 0 from itself.
        const A over = value == peak ? A(0) : value - peak;
        sum += exponential(over);
        shifted += over;
        count += A(1);
    }
    PVF_DEVICE void move(A to) {
        if (count > A(0) && to != peak) {
            sum *= exponential(peak - to);
            shifted += count * (peak - to);
        }
        peak = to;
    }
};

template <typename A>
struct RowSums {
    A peak;
    A sum;
    A shifted_sum;
};

// f(value, class) for this thread's logits of a row.
template <typename A, typename T, int kVector, int kThreads, typename F>
PVF_DEVICE void for_logits(const T* row, int64_t classes, int thread, const F& f) {
    for (int64_t c = int64_t{thread} * kVector; c < classes; c += kThreads * kVector) {
        const auto values = load_vec<kVector>(row + c);
        PVF_UNROLL
        for (int k = 0; k < kVector; ++k) {
            f(static_cast<A>(to_float(values[k])), c + k);
        }
    }
}

template <typename A, typename T, int kVector, bool kBlock>
PVF_DEVICE RowSums<A> sums_of_row(const T* row, int64_t classes) {
    using Mine = Team<kBlock>;
    constexpr A kLowest = A(-INFINITY);
    Seen<A> seen;
    for_logits<A, T, kVector, Mine::kThreads>(row, classes, Mine::thread(),
                                              [&](A value, int64_t) { seen.take(value); });
    const A peak = Mine::max(seen.peak, kLowest);
    seen.move(peak);
    const A sum = Mine::sum(seen.sum);
    const A shifted = Mine::sum(seen.shifted);
    // An infinite peak has no distance to others.
    const A none = peak - peak;
    return {peak, sum + none, shifted};
}

template <typename A, typename T, int kVector, bool kBlock>
PVF_DEVICE int64_t argmax(const T* row, int64_t classes) {
    using Mine = Team<kBlock>;
    constexpr A kLowest = A(-INFINITY);
    constexpr int32_t kNowhere = INT32_MIN;
    A best = kLowest;
    int32_t place = kNowhere;  // minus the class
    for_logits<A, T, kVector, Mine::kThreads>(
        row, classes, Mine::thread(), [&](A value, int64_t c) {
            if (place == kNowhere || two_heads::leads(value, best)) {
                best = value;
                place = -static_cast<int32_t>(c);
            }
        });
    const A greatest = Mine::max(best, kLowest);
    const bool mine = best == greatest || (best != best && greatest != greatest);
    return -int64_t{Mine::max(mine ? place : kNowhere, kNowhere)};
}

PVF_DEVICE bool is_class(const TwoHeadLoss& p, int64_t c) { return c >= 0 && c < p.classes; }

// A partner that is no class must not pass for none.
template <typename A>
PVF_DEVICE Target<A> target_of_row(const TwoHeadLoss& p, int64_t row) {
    const bool mixed = p.partners != nullptr;
    const int64_t partner = mixed ? load(p.partners + row) : 0;
    return two_heads::target_of(
        p, load(p.labels + row), is_class(p, partner) ? partner : p.classes,
        mixed ? load(static_cast<const A*>(p.lam) + row * p.lam_step) : A(1));
}

template <typename A>
PVF_DEVICE A given(const void* grad) {
    return grad == nullptr ? A(0) : load(static_cast<const A*>(grad));
}

// The logit of a class over the peak; NaN where there is no such class.
template <typename A, typename T>
PVF_DEVICE A over_peak(const TwoHeadLoss& p, const T* row, int64_t c, A peak) {
    return is_class(p, c) ? static_cast<A>(to_float(load(row + c))) - peak : A(NAN);
}

template <typename A>
PVF_DEVICE A weight_of(const TwoHeadLoss& p, int64_t c) {
    if (p.weights == nullptr) {
        return A(1);
    }
    return is_class(p, c) ? load(static_cast<const A*>(p.weights) + c) : A(NAN);
}

template <typename T, typename TeacherT, int kVector, bool kBlock>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kTwoHeadThreads, 2) row_kernel(const __grid_constant__ TwoHeadLoss p) {
    using A = Accumulate<T>;
    using Mine = Team<kBlock>;
    const int64_t row = Mine::row();
    if (row >= p.rows) {
        return;
    }
    int64_t chosen = 0;
    if (p.teacher != nullptr) {
        chosen = argmax<Accumulate<TeacherT>, TeacherT, kVector, kBlock>(
            static_cast<const TeacherT*>(p.teacher) + row * p.teacher_stride, p.classes);
    } else {
        chosen = load(p.chosen + row);
    }
    const T* cls = static_cast<const T*>(p.cls) + row * p.cls_stride;
    const T* dist = static_cast<const T*>(p.dist) + row * p.dist_stride;
    const auto one = sums_of_row<A, T, kVector, kBlock>(cls, p.classes);
    const auto two = sums_of_row<A, T, kVector, kBlock>(dist, p.classes);
    if (Mine::thread() != 0) {
        return;
    }
    const Target<A> target = target_of_row<A>(p, row);
    const A weight = weight_of<A>(p, chosen);
    A* peaks = static_cast<A*>(p.peaks);
    A* sums = static_cast<A*>(p.sums);
    A* parts = static_cast<A*>(p.parts);
    store(peaks + row, one.peak);
    store(peaks + p.rows + row, two.peak);
    store(sums + row, one.sum);
    store(sums + p.rows + row, two.sum);
    store(parts + row,
          two_heads::cross_entropy(
              target, log(one.sum), one.shifted_sum, over_peak(p, cls, target.label, one.peak),
              p.partners == nullptr ? A(0) : over_peak(p, cls, target.partner, one.peak)));
    store(parts + p.rows + row, weight * (log(two.sum) - over_peak(p, dist, chosen, two.peak)));
    store(parts + 2 * p.rows + row, weight);
    if (p.teacher != nullptr) {
        store(p.chosen + row, chosen);
    }
}

// One block: the sums over rows, in an order that depends on the number of rows alone.
template <typename A>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kTwoHeadThreads, 1)
    finish_kernel(const __grid_constant__ TwoHeadLoss p) {
    const A* parts = static_cast<const A*>(p.parts);
    double cls = 0;
    double dist = 0;
    double weight = 0;
    for (int64_t row = thread_idx().x; row < p.rows; row += kTwoHeadThreads) {
        cls += static_cast<double>(load(parts + row));
        dist += static_cast<double>(load(parts + p.rows + row));
        weight += static_cast<double>(load(parts + 2 * p.rows + row));
    }
    cls = block_sum(cls);
    dist = block_sum(dist);
    weight = block_sum(weight);
    if (thread_idx().x != 0) {
        return;
    }
    const double total =
        p.divisor == nullptr ? weight : static_cast<double>(load(static_cast<const A*>(p.divisor)));
    cls = two_heads::quotient(cls, static_cast<double>(p.rows));
    dist = two_heads::quotient(dist, total);
    store(static_cast<A*>(p.loss), static_cast<A>((1 - p.alpha) * cls + p.alpha * dist));
    store(static_cast<A*>(p.cls_loss), static_cast<A>(cls));
    store(static_cast<A*>(p.dist_loss), static_cast<A>(dist));
    store(static_cast<A*>(p.total), static_cast<A>(total));
}

template <typename A, typename T, int kVector, bool kBlock>
PVF_DEVICE void grads_of_row(const T* row, T* out, int64_t classes, A peak, A sum, A slope,
                             const Target<A>& target) {
    using Mine = Team<kBlock>;
    const A share = A(1) / sum;
    for (int64_t c = int64_t{Mine::thread()} * kVector; c < classes;
         c += Mine::kThreads * kVector) {
        const auto values = load_vec<kVector>(row + c);
        Vec<T, kVector> grads;
        PVF_UNROLL
        for (int k = 0; k < kVector; ++k) {
            const A p = share * exponential(static_cast<A>(to_float(values[k])) - peak);
            grads[k] = from_float<T>(slope * (p - target.at(c + k)));
        }
        store_vec(out + c, grads);
    }
}

template <typename T, int kVector, bool kBlock>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kTwoHeadThreads, 2)
    grads_kernel(const __grid_constant__ TwoHeadLoss p) {
    using A = Accumulate<T>;
    const int64_t row = Team<kBlock>::row();
    if (row >= p.rows) {
        return;
    }
    constexpr A kNaN = A(NAN);
    const A* peaks = static_cast<const A*>(p.peaks);
    const A* sums = static_cast<const A*>(p.sums);
    const A grad = given<A>(p.grad);
    const Target<A> target = target_of_row<A>(p, row);
    const bool known =
        is_class(p, target.label) && (p.partners == nullptr || is_class(p, target.partner));
    const A cls_slope = two_heads::cls_slope(p, grad, given<A>(p.grad_c));
    grads_of_row<A, T, kVector, kBlock>(static_cast<const T*>(p.cls) + row * p.cls_stride,
                                        static_cast<T*>(p.grad_cls) + row * p.classes, p.classes,
                                        load(peaks + row), load(sums + row),
                                        known ? cls_slope : kNaN, target);
    const int64_t chosen = load(p.chosen + row);
    const A dist_slope =
        two_heads::dist_slope(p, grad, given<A>(p.grad_d), load(static_cast<const A*>(p.total)));
    grads_of_row<A, T, kVector, kBlock>(
        static_cast<const T*>(p.dist) + row * p.dist_stride,
        static_cast<T*>(p.grad_dist) + row * p.classes, p.classes, load(peaks + p.rows + row),
        load(sums + p.rows + row),
        is_class(p, chosen) ? dist_slope * weight_of<A>(p, chosen) : kNaN,
        Target<A>{chosen, -1, A(1), A(0), A(0)});
}

using Kernel = void (*)(TwoHeadLoss);

const char* run(Kernel kernel, int64_t blocks, const TwoHeadLoss& p, void* stream) {
    return launch_result(launch(kernel, Dim3{static_cast<unsigned>(blocks), 1, 1},
                                Dim3{kTwoHeadThreads, 1, 1}, 0, as_stream(stream), p));
}

template <typename T>
bool takes_vectors(const void* from, int64_t stride, int vector) {
    return reinterpret_cast<uintptr_t>(from) % 16 == 0 && stride % vector == 0;
}

// f<kVector, kBlock>: 16 bytes a load where all rows allow it.
template <typename T, typename F>
const char* with_form(const TwoHeadLoss& p, bool aligned, const F& f) {
    constexpr int kVector = 16 / sizeof(T);
    const bool vectors = aligned && p.classes % kVector == 0 &&
                         takes_vectors<T>(p.cls, p.cls_stride, kVector) &&
                         takes_vectors<T>(p.dist, p.dist_stride, kVector);
    const bool block = p.classes > kTwoHeadWarpClasses;
    if (vectors) {
        return block ? f.template operator()<kVector, true>()
                     : f.template operator()<kVector, false>();
    }
    return block ? f.template operator()<1, true>() : f.template operator()<1, false>();
}

}  // namespace

const char* two_head_loss_cuda(const TwoHeadLoss& p, void* stream) {
    const char* problem = nullptr;
    const int64_t blocks = two_head_loss_blocks(p.rows, p.classes);
    with_float(p.type, [&]<typename T>(Type<T>) {
        if (p.rows > 0) {
            const auto of_teacher = [&]<typename TeacherT>(Type<TeacherT>) {
                constexpr int kVector = 16 / sizeof(T);
                constexpr bool kSame = sizeof(TeacherT) == sizeof(T);
                const bool aligned =
                    p.teacher == nullptr ||
                    (kSame && takes_vectors<TeacherT>(p.teacher, p.teacher_stride, kVector));
                problem = with_form<T>(p, aligned, [&]<int kWidth, bool kBlock>() {
                    return run(row_kernel<T, TeacherT, kWidth, kBlock>, blocks, p, stream);
                });
            };
            if (p.teacher == nullptr || p.teacher_type == p.type) {
                of_teacher(Type<T>{});
            } else {
                with_float(p.teacher_type, of_teacher);
            }
        }
        if (problem == nullptr) {
            problem = run(finish_kernel<Accumulate<T>>, 1, p, stream);
        }
    });
    return problem;
}

const char* two_head_loss_backward_cuda(const TwoHeadLoss& p, void* stream) {
    const char* problem = nullptr;
    with_float(p.type, [&]<typename T>(Type<T>) {
        problem = with_form<T>(p, true, [&]<int kVector, bool kBlock>() {
            return run(grads_kernel<T, kVector, kBlock>, two_head_loss_blocks(p.rows, p.classes), p,
                       stream);
        });
    });
    return problem;
}

}  // namespace pyvitfast
