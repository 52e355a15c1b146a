#include "ops/saliency_commit_/saliency_commit_.h"
#include "ops/saliency_commit_/saliency_commit__math.h"
#include "portable/device.h"
#include "portable/launch_result.h"

namespace pyvitfast {

using namespace device;

namespace {

// Squares into scratch and the flag; nothing is added before the whole minibatch is known to be
// finite.
template <typename T, typename I>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kCommitThreads, 2)
    saliency_square_kernel(const __grid_constant__ SaliencyCommitParams p) {
    const int64_t step = static_cast<int64_t>(grid_dim().x) * kCommitThreads;
    const int64_t first = static_cast<int64_t>(block_idx().x) * kCommitThreads + thread_idx().x;
    const I* indptr = static_cast<const I*>(p.indptr);
    const I* indices = static_cast<const I*>(p.indices);
    const T* workspace = static_cast<const T*>(p.workspace);
    const T* coeff = static_cast<const T*>(p.coeff);
    T* squares = static_cast<T*>(p.squares);
    bool clean = true;
    for (int64_t i = first; i < p.size; i += step) {
        clean &= saliency::is_finite(load(workspace + i));
    }
    for (int64_t unit = first; unit < p.units; unit += step) {
        const int64_t begin = load(indptr + unit);
        const int64_t end = load(indptr + unit + 1);
        const bool inside = begin >= 0 && begin <= end && end <= p.entries;
        clean &= inside;
        T sum = T(0);
        for (int64_t k = begin; inside && k < end; ++k) {
            const int64_t index = load(indices + k);
            if (index >= 0 && index < p.size) {
                sum += load(workspace + index);
            } else {
                clean = false;
            }
        }
        const T square = saliency::unit_square(sum, coeff != nullptr ? load(coeff + unit) : T(1));
        clean &= saliency::is_finite(square);
        store(squares + unit, square);
    }
    if (!clean) {
        atomic_or(p.unclean, 1);
    }
}

template <typename T>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kCommitThreads, 2)
    saliency_add_kernel(const __grid_constant__ SaliencyCommitParams p) {
    const bool clean = load(p.unclean) == 0;
    const int64_t step = static_cast<int64_t>(grid_dim().x) * kCommitThreads;
    const int64_t first = static_cast<int64_t>(block_idx().x) * kCommitThreads + thread_idx().x;
    if (first == 0) {
        int64_t* count = p.counts + (clean ? 0 : 1);
        store(count, load(count) + 1);
    }
    if (!clean) {
        return;
    }
    T* acc = static_cast<T*>(p.acc);
    for (int64_t unit = first; unit < p.units; unit += step) {
        store(acc + unit, load(acc + unit) + load(static_cast<const T*>(p.squares) + unit));
    }
}

template <typename T, typename I>
LaunchStatus run(const SaliencyCommitParams& p, Stream stream) {
    const Dim3 grid{static_cast<unsigned>(commit_blocks(p.units > p.size ? p.units : p.size)), 1,
                    1};
    const Dim3 block{kCommitThreads, 1, 1};
    const LaunchStatus error = launch(saliency_square_kernel<T, I>, grid, block, 0, stream, p);
    if (error != kLaunchOk) {
        return error;
    }
    return launch(saliency_add_kernel<T>, grid, block, 0, stream, p);
}

}  // namespace

const char* saliency_commit_cuda(const SaliencyCommitParams& p, void* stream) {
    if (p.wide != 0) {
        return launch_result(p.wide_indices != 0 ? run<double, int64_t>(p, as_stream(stream))
                                                 : run<double, int32_t>(p, as_stream(stream)));
    }
    return launch_result(p.wide_indices != 0 ? run<float, int64_t>(p, as_stream(stream))
                                             : run<float, int32_t>(p, as_stream(stream)));
}

}  // namespace pyvitfast
