#include "cpu_vector.h"
#include "ops/saliency_commit_/saliency_commit_.h"
#include "ops/saliency_commit_/saliency_commit__math.h"

namespace pyvitfast::PVF_CPU_CAPABILITY {

template <typename T, typename I>
PVF_INLINE bool valid_of(const SaliencyCommitParams& p, int64_t begin, int64_t end) {
    const I* indptr = static_cast<const I*>(p.indptr);
    const I* indices = static_cast<const I*>(p.indices);
    if (indptr[0] != 0 || indptr[p.units] != p.entries) {
        return false;
    }
    for (int64_t unit = begin; unit < end; ++unit) {
        if (indptr[unit] < 0 || indptr[unit] > indptr[unit + 1] || indptr[unit + 1] > p.entries) {
            return false;
        }
        bool inside = true;
        for (int64_t k = indptr[unit]; k < indptr[unit + 1]; ++k) {
            inside &= indices[k] >= 0 && indices[k] < p.size;
        }
        if (!inside) {
            return false;
        }
    }
    return true;
}

template <typename T, typename I>
PVF_INLINE bool finite_of(const SaliencyCommitParams& p, int64_t begin, int64_t end) {
    const T* workspace = static_cast<const T*>(p.workspace);
    bool finite = true;
    for (int64_t i = begin; i < end; ++i) {
        finite &= saliency::is_finite(workspace[i]);
    }
    return finite;
}

template <typename T, typename I>
PVF_INLINE bool square_of(const SaliencyCommitParams& p, int64_t begin, int64_t end) {
    const I* indptr = static_cast<const I*>(p.indptr);
    const I* indices = static_cast<const I*>(p.indices);
    const T* workspace = static_cast<const T*>(p.workspace);
    const T* coeff = static_cast<const T*>(p.coeff);
    T* squares = static_cast<T*>(p.squares);
    bool finite = true;
    for (int64_t unit = begin; unit < end; ++unit) {
        double sum = 0.0;
        for (int64_t k = indptr[unit]; k < indptr[unit + 1]; ++k) {
            sum += static_cast<double>(workspace[indices[k]]);
        }
        const double scale = coeff != nullptr ? static_cast<double>(coeff[unit]) : 1.0;
        squares[unit] = static_cast<T>(saliency::unit_square(sum, scale));
        finite &= saliency::is_finite(squares[unit]);
    }
    return finite;
}

template <typename T, typename I>
PVF_INLINE bool add_of(const SaliencyCommitParams& p, int64_t begin, int64_t end) {
    const T* squares = static_cast<const T*>(p.squares);
    T* acc = static_cast<T*>(p.acc);
    for (int64_t unit = begin; unit < end; ++unit) {
        acc[unit] += squares[unit];
    }
    return true;
}

template <typename F>
PVF_INLINE bool with_types(const SaliencyCommitParams& p, const F& f) {
    if (p.wide != 0) {
        return p.wide_indices != 0 ? f(double{}, int64_t{}) : f(double{}, int32_t{});
    }
    return p.wide_indices != 0 ? f(float{}, int64_t{}) : f(float{}, int32_t{});
}

static bool valid(const SaliencyCommitParams& p, int64_t begin, int64_t end) {
    return with_types(p,
                      [&]<typename T, typename I>(T, I) { return valid_of<T, I>(p, begin, end); });
}

static bool finite(const SaliencyCommitParams& p, int64_t begin, int64_t end) {
    return with_types(p,
                      [&]<typename T, typename I>(T, I) { return finite_of<T, I>(p, begin, end); });
}

static bool square(const SaliencyCommitParams& p, int64_t begin, int64_t end) {
    return with_types(p,
                      [&]<typename T, typename I>(T, I) { return square_of<T, I>(p, begin, end); });
}

static void add(const SaliencyCommitParams& p, int64_t begin, int64_t end) {
    with_types(p, [&]<typename T, typename I>(T, I) { return add_of<T, I>(p, begin, end); });
}

extern const SaliencyCommitCpu saliency_commit_cpu;
const SaliencyCommitCpu saliency_commit_cpu{valid, finite, square, add};

}  // namespace pyvitfast::PVF_CPU_CAPABILITY
