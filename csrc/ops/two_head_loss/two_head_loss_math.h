#pragma once

#include "ops/two_head_loss/two_head_loss.h"

namespace pyvitfast::two_heads {

// As torch's argmax: the first of the greatest, and the first NaN before all.
template <typename A>
PVF_HOST_DEVICE bool leads(A value, A best) {
    return value > best || (value != value && best == best);
}

template <typename A>
struct Target {
    int64_t label;
    int64_t partner;
    A share;  // of the label
    A rest;   // of the partner
    A floor;  // of every class, by smoothing

    PVF_HOST_DEVICE A at(int64_t c) const {
        return floor + (c == label ? share : A(0)) + (c == partner ? rest : A(0));
    }
};

// A partner below 0 is none.
template <typename A>
PVF_HOST_DEVICE Target<A> target_of(const TwoHeadLoss& p, int64_t label, int64_t partner, A lam) {
    const A smoothing = static_cast<A>(p.smoothing);
    const A floor = smoothing / static_cast<A>(p.classes);
    if (p.partners == nullptr) {
        return {label, -1, A(1) - smoothing, A(0), floor};
    }
    return {label, partner, (A(1) - smoothing) * lam, (A(1) - smoothing) * (A(1) - lam), floor};
}

// own and other are the logits of label and partner, shifted_sum that of all, over the peak.
template <typename A>
PVF_HOST_DEVICE A cross_entropy(const Target<A>& target, A log_sum, A shifted_sum, A own, A other) {
    A loss = log_sum - target.share * own;
    loss -= target.partner < 0 ? A(0) : target.rest * other;
    // Smoothing by 0 of an infinite logit is no smoothing, not NaN.
    return target.floor > A(0) ? loss - target.floor * shifted_sum : loss;
}

template <typename A>
PVF_HOST_DEVICE A quotient(A sum, A total) {
    return total == A(0) ? A(0) : sum / total;
}

// What the gradients of all logits of a head are multiplied with, from those of the losses.
template <typename A>
PVF_HOST_DEVICE A cls_slope(const TwoHeadLoss& p, A grad, A grad_c) {
    return (grad * static_cast<A>(1 - p.alpha) + grad_c) / static_cast<A>(p.rows);
}
template <typename A>
PVF_HOST_DEVICE A dist_slope(const TwoHeadLoss& p, A grad, A grad_d, A total) {
    return quotient(grad * static_cast<A>(p.alpha) + grad_d, total);
}

}  // namespace pyvitfast::two_heads
