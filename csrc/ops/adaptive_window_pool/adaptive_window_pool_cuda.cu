#include "ops/adaptive_window_pool/adaptive_window_pool.h"
#include "ops/adaptive_window_pool/adaptive_window_pool_math.h"
#include "portable/device.h"
#include "portable/intrinsics.h"
#include "portable/launch_result.h"
#include "portable/reduce.h"

namespace pyvitfast {

using namespace device;
using pooling::Window;

namespace {

constexpr int kWarps = kWindowPoolThreads / kWarpSize;

// f(place among the weights, row, column) for the cells of a window that fall to a lane.
template <typename F>
PVF_DEVICE void for_cells(const WindowPool& p, int64_t image, int64_t bin, const Window& window,
                          int64_t first, int64_t step, const F& f) {
    const int64_t across = window.cols.end - window.cols.begin;
    for (int64_t cell = first; cell < window.area(); cell += step) {
        const int64_t row = window.rows.begin + cell / across;
        const int64_t col = window.cols.begin + cell % across;
        f(pooling::weight_at(p, image, bin, window, row, col), row, col);
    }
}

// A warp for each bin of each image.
template <typename A>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kWindowPoolThreads, 4)
    weigh_kernel(const __grid_constant__ WindowPool p) {
    const int64_t task = int64_t{block_idx().x} * kWarps + warp_id();
    if (task >= p.batch * p.bins()) {
        return;
    }
    const int64_t image = task / p.bins();
    const int64_t bin = task % p.bins();
    const Window window = pooling::window_of(p, bin);
    const A* logits = static_cast<const A*>(p.logits);
    A* weights = static_cast<A*>(p.weights);
    A greatest = A(-INFINITY);
    for_cells(p, image, bin, window, lane_id(), kWarpSize, [&](int64_t at, int64_t, int64_t) {
        const A value = load(logits + at);
        greatest = pooling::replaces(value, greatest) ? value : greatest;
    });
    greatest = warp_max(greatest);
    A sum = A(0);
    for_cells(p, image, bin, window, lane_id(), kWarpSize, [&](int64_t at, int64_t, int64_t) {
        sum += exponential(load(logits + at) - greatest);
    });
    sum = warp_sum(sum);
    const int64_t down = window.rows.end - window.rows.begin;
    const int64_t across = window.cols.end - window.cols.begin;
    for (int64_t cell = lane_id(); cell < p.cells(); cell += kWarpSize) {
        const int64_t at = task * p.cells() + cell;
        const bool there = cell / p.cell_cols < down && cell % p.cell_cols < across;
        store(weights + at, there ? exponential(load(logits + at) - greatest) / sum : A(0));
    }
}

template <typename A, typename T, int kVector>
PVF_DEVICE void widened(const T* from, A (&to)[kVector]) {
    const auto values = load_vec<kVector>(from);
    PVF_UNROLL
    for (int k = 0; k < kVector; ++k) {
        to[k] = static_cast<A>(to_float(values[k]));
    }
}

template <typename A, typename T, int kVector>
PVF_DEVICE void store_narrowed(T* to, const A (&from)[kVector]) {
    Vec<T, kVector> values;
    PVF_UNROLL
    for (int k = 0; k < kVector; ++k) {
        values[k] = from_float<T>(from[k]);
    }
    store_vec(to, values);
}

// Neighbouring threads own neighbouring channels of a bin.
template <typename T, int kVector, PoolMode kMode>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kWindowPoolThreads, 4)
    pool_kernel(const __grid_constant__ WindowPool p) {
    using A = Accumulate<T>;
    const int64_t groups = p.channels / kVector;
    const int64_t task = int64_t{block_idx().x} * kWindowPoolThreads + thread_idx().x;
    if (task >= p.batch * p.bins() * groups) {
        return;
    }
    const int64_t channel = task % groups * kVector;
    const int64_t image = task / groups / p.bins();
    const int64_t bin = task / groups % p.bins();
    const Window window = pooling::window_of(p, bin);
    const T* x = static_cast<const T*>(p.x) + image * p.batch_stride + channel;
    A sums[kVector];
    int32_t places[kVector];
    PVF_UNROLL
    for (int k = 0; k < kVector; ++k) {
        sums[k] = kMode == PoolMode::kMax ? A(-INFINITY) : A(0);
        places[k] = static_cast<int32_t>(window.rows.begin * p.width + window.cols.begin);
    }
    for (int64_t row = window.rows.begin; row < window.rows.end; ++row) {
        for (int64_t col = window.cols.begin; col < window.cols.end; ++col) {
            A values[kVector];
            widened(x + row * p.row_stride + col * p.cell_stride, values);
            A weight = A(1);
            if constexpr (kMode == PoolMode::kLearned) {
                weight = load(static_cast<const A*>(p.weights) +
                              pooling::weight_at(p, image, bin, window, row, col));
            }
            PVF_UNROLL
            for (int k = 0; k < kVector; ++k) {
                if constexpr (kMode == PoolMode::kMax) {
                    const bool better = pooling::replaces(values[k], sums[k]);
                    sums[k] = better ? values[k] : sums[k];
                    places[k] = better ? static_cast<int32_t>(row * p.width + col) : places[k];
                } else {
                    sums[k] += weight * values[k];
                }
            }
        }
    }
    if constexpr (kMode == PoolMode::kAverage) {
        const A mean = A(1) / static_cast<A>(window.area());
        PVF_UNROLL
        for (int k = 0; k < kVector; ++k) {
            sums[k] *= mean;
        }
    }
    const int64_t at = (image * p.bins() + bin) * p.channels + channel;
    store_narrowed(static_cast<T*>(p.out) + at, sums);
    if constexpr (kMode == PoolMode::kMax) {
        if (p.places != nullptr) {
            Vec<int32_t, kVector> found;
            PVF_UNROLL
            for (int k = 0; k < kVector; ++k) {
                found[k] = places[k];
            }
            store_vec(p.places + at, found);
        }
    }
}

// A thread gathers what the bins of its cell give back: no atomics, one rounding.
template <typename T, int kVector, PoolMode kMode>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kWindowPoolThreads, 4)
    spread_kernel(const __grid_constant__ WindowPool p) {
    using A = Accumulate<T>;
    const int64_t groups = p.channels / kVector;
    const int64_t task = int64_t{block_idx().x} * kWindowPoolThreads + thread_idx().x;
    if (task >= p.batch * p.height * p.width * groups) {
        return;
    }
    const int64_t channel = task % groups * kVector;
    const int64_t cell = task / groups;
    const int64_t col = cell % p.width;
    const int64_t row = cell / p.width % p.height;
    const int64_t image = cell / p.width / p.height;
    const BinSpan rows = bins_of_cell(row, p.height, p.rows);
    const BinSpan cols = bins_of_cell(col, p.width, p.cols);
    A sums[kVector] = {};
    for (int64_t i = rows.begin; i < rows.end; ++i) {
        for (int64_t j = cols.begin; j < cols.end; ++j) {
            const int64_t bin = i * p.cols + j;
            const int64_t at = (image * p.bins() + bin) * p.channels + channel;
            A values[kVector];
            widened(static_cast<const T*>(p.grad) + at, values);
            if constexpr (kMode == PoolMode::kMax) {
                const auto places = load_vec<kVector>(p.places + at);
                PVF_UNROLL
                for (int k = 0; k < kVector; ++k) {
                    sums[k] += places[k] == row * p.width + col ? values[k] : A(0);
                }
            } else {
                const Window window = pooling::window_of(p, bin);
                A weight;
                if constexpr (kMode == PoolMode::kAverage) {
                    weight = A(1) / static_cast<A>(window.area());
                } else {
                    weight = load(static_cast<const A*>(p.weights) +
                                  pooling::weight_at(p, image, bin, window, row, col));
                }
                PVF_UNROLL
                for (int k = 0; k < kVector; ++k) {
                    sums[k] += weight * values[k];
                }
            }
        }
    }
    store_narrowed(static_cast<T*>(p.grad_x) + cell * p.channels + channel, sums);
}

// A block for each bin of each image, a warp for a cell at a time.
template <typename T>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kWindowPoolThreads, 4)
    score_kernel(const __grid_constant__ WindowPool p) {
    using A = Accumulate<T>;
    const int64_t image = block_idx().x / p.bins();
    const int64_t bin = block_idx().x % p.bins();
    const Window window = pooling::window_of(p, bin);
    const T* grad = static_cast<const T*>(p.grad) + int64_t{block_idx().x} * p.channels;
    const T* x = static_cast<const T*>(p.x) + image * p.batch_stride;
    const A* weights = static_cast<const A*>(p.weights);
    A* out = static_cast<A*>(p.grad_logits);
    A mean = A(0);
    for_cells(p, image, bin, window, warp_id(), kWarps, [&](int64_t at, int64_t row, int64_t col) {
        const T* cell = x + row * p.row_stride + col * p.cell_stride;
        A product = A(0);
        for (int64_t c = lane_id(); c < p.channels; c += kWarpSize) {
            product +=
                static_cast<A>(to_float(load(grad + c))) * static_cast<A>(to_float(load(cell + c)));
        }
        product = warp_sum(product);
        if (lane_id() == 0) {
            store(out + at, product);
            mean += load(weights + at) * product;
        }
    });
    mean = block_sum(mean);
    const int64_t down = window.rows.end - window.rows.begin;
    const int64_t across = window.cols.end - window.cols.begin;
    for (int64_t cell = thread_idx().x; cell < p.cells(); cell += kWindowPoolThreads) {
        const int64_t at = int64_t{block_idx().x} * p.cells() + cell;
        const bool there = cell / p.cell_cols < down && cell % p.cell_cols < across;
        store(out + at, there ? load(weights + at) * (load(out + at) - mean) : A(0));
    }
}

using Kernel = void (*)(WindowPool);

const char* run(Kernel kernel, int64_t blocks, const WindowPool& p, void* stream) {
    return launch_result(launch(kernel, Dim3{static_cast<unsigned>(blocks), 1, 1},
                                Dim3{kWindowPoolThreads, 1, 1}, 0, as_stream(stream), p));
}

int64_t blocks_of(int64_t tasks, int64_t each) { return (tasks + each - 1) / each; }

// A thread for each value, or for each four where `vectors`.
const char* run_by_value(Kernel four, Kernel one, bool vectors, int64_t values, const WindowPool& p,
                         void* stream) {
    const int64_t each = kWindowPoolThreads * (vectors ? kWindowPoolVector : 1);
    return run(vectors ? four : one, blocks_of(values, each), p, stream);
}

// Whether four channels are always one aligned load.
bool takes_vectors(const WindowPool& p, const void* pointer, int64_t bytes) {
    return p.channels % kWindowPoolVector == 0 &&
           reinterpret_cast<uintptr_t>(pointer) %
                   (kWindowPoolVector * bytes < 16 ? kWindowPoolVector * bytes : 16) ==
               0;
}

template <typename F>
const char* with_mode(PoolMode mode, const F& f) {
    switch (mode) {
        case PoolMode::kAverage:
            return f.template operator()<PoolMode::kAverage>();
        case PoolMode::kMax:
            return f.template operator()<PoolMode::kMax>();
        default:
            return f.template operator()<PoolMode::kLearned>();
    }
}

}  // namespace

const char* adaptive_window_pool_weigh_cuda(const WindowPool& p, void* stream) {
    return run(p.type == FloatType::kFloat64 ? weigh_kernel<double> : weigh_kernel<float>,
               blocks_of(p.batch * p.bins(), kWarps), p, stream);
}

const char* adaptive_window_pool_cuda(const WindowPool& p, void* stream) {
    const char* problem = nullptr;
    with_float(p.type, [&]<typename T>(Type<T>) {
        const bool vectors =
            takes_vectors(p, p.x, sizeof(T)) &&
            (p.batch_stride | p.row_stride | p.cell_stride) % kWindowPoolVector == 0;
        problem = with_mode(p.mode, [&]<PoolMode kMode>() {
            return run_by_value(pool_kernel<T, kWindowPoolVector, kMode>, pool_kernel<T, 1, kMode>,
                                vectors, p.batch * p.bins() * p.channels, p, stream);
        });
    });
    return problem;
}

const char* adaptive_window_pool_spread_cuda(const WindowPool& p, void* stream) {
    const char* problem = nullptr;
    with_float(p.type, [&]<typename T>(Type<T>) {
        problem = with_mode(p.mode, [&]<PoolMode kMode>() {
            return run_by_value(spread_kernel<T, kWindowPoolVector, kMode>,
                                spread_kernel<T, 1, kMode>, takes_vectors(p, p.grad, sizeof(T)),
                                p.batch * p.height * p.width * p.channels, p, stream);
        });
    });
    return problem;
}

const char* adaptive_window_pool_score_cuda(const WindowPool& p, void* stream) {
    const char* problem = nullptr;
    with_float(p.type, [&]<typename T>(Type<T>) {
        problem = run(score_kernel<T>, p.batch * p.bins(), p, stream);
    });
    return problem;
}

}  // namespace pyvitfast
