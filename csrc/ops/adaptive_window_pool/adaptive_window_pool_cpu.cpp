#include <cmath>

#include "cpu_vector.h"
#include "ops/adaptive_window_pool/adaptive_window_pool.h"
#include "ops/adaptive_window_pool/adaptive_window_pool_math.h"

namespace pyvitfast::PVF_CPU_CAPABILITY {

using pooling::Window;

template <typename F>
PVF_INLINE void with_sums(const WindowPool& p, const F& f) {
    with_float(p.type, [&]<typename T>(Type<T>) { f(Type<Accumulate<T>>{}, Type<T>{}); });
}

template <typename T>
PVF_INLINE const T* cell_of(const WindowPool& p, int64_t image, int64_t row, int64_t col) {
    return static_cast<const T*>(p.x) + image * p.batch_stride + row * p.row_stride +
           col * p.cell_stride;
}

template <typename A>
static void softmax(const WindowPool& p, int64_t image, int64_t bin) {
    const Window window = pooling::window_of(p, bin);
    const A* logits = static_cast<const A*>(p.logits);
    A* weights = static_cast<A*>(p.weights);
    const auto each = [&](const auto& f) {
        for (int64_t row = window.rows.begin; row < window.rows.end; ++row) {
            for (int64_t col = window.cols.begin; col < window.cols.end; ++col) {
                f(pooling::weight_at(p, image, bin, window, row, col));
            }
        }
    };
    A greatest = -INFINITY;
    each([&](int64_t at) {
        greatest = pooling::replaces(logits[at], greatest) ? logits[at] : greatest;
    });
    const int64_t first = (image * p.bins() + bin) * p.cells();
    for (int64_t at = first; at < first + p.cells(); ++at) {
        weights[at] = A(0);
    }
    A sum = A(0);
    each([&](int64_t at) {
        weights[at] = std::exp(logits[at] - greatest);
        sum += weights[at];
    });
    each([&](int64_t at) { weights[at] /= sum; });
}

static void weigh(const WindowPool& p, int64_t image, int64_t bin) {
    if (p.type == FloatType::kFloat64) {
        softmax<double>(p, image, bin);
    } else {
        softmax<float>(p, image, bin);
    }
}

template <typename A, typename T>
static void add_up(const WindowPool& p, int64_t image, int64_t bin, int64_t first, int64_t count) {
    const Window window = pooling::window_of(p, bin);
    A sums[kWindowPoolChannels] = {};
    const A mean = A(1) / static_cast<A>(window.area());
    for (int64_t row = window.rows.begin; row < window.rows.end; ++row) {
        for (int64_t col = window.cols.begin; col < window.cols.end; ++col) {
            const T* cell = cell_of<T>(p, image, row, col) + first;
            const A weight =
                p.mode == PoolMode::kAverage
                    ? A(1)
                    : static_cast<const A*>(
                          p.weights)[pooling::weight_at(p, image, bin, window, row, col)];
            for (int64_t c = 0; c < count; ++c) {
                sums[c] += weight * static_cast<A>(to_float(cell[c]));
            }
        }
    }
    T* out = static_cast<T*>(p.out) + (image * p.bins() + bin) * p.channels + first;
    for (int64_t c = 0; c < count; ++c) {
        out[c] = from_float<T>(p.mode == PoolMode::kAverage ? sums[c] * mean : sums[c]);
    }
}

template <typename A, typename T>
static void take_greatest(const WindowPool& p, int64_t image, int64_t bin, int64_t first,
                          int64_t count) {
    const Window window = pooling::window_of(p, bin);
    A best[kWindowPoolChannels];
    int32_t places[kWindowPoolChannels];
    for (int64_t c = 0; c < count; ++c) {
        best[c] = -INFINITY;
        places[c] = static_cast<int32_t>(window.rows.begin * p.width + window.cols.begin);
    }
    for (int64_t row = window.rows.begin; row < window.rows.end; ++row) {
        for (int64_t col = window.cols.begin; col < window.cols.end; ++col) {
            const T* cell = cell_of<T>(p, image, row, col) + first;
            const int32_t place = static_cast<int32_t>(row * p.width + col);
            for (int64_t c = 0; c < count; ++c) {
                const A value = static_cast<A>(to_float(cell[c]));
                const bool better = pooling::replaces(value, best[c]);
                best[c] = better ? value : best[c];
                places[c] = better ? place : places[c];
            }
        }
    }
    const int64_t begin = (image * p.bins() + bin) * p.channels + first;
    T* out = static_cast<T*>(p.out) + begin;
    for (int64_t c = 0; c < count; ++c) {
        out[c] = from_float<T>(best[c]);
    }
    if (p.places != nullptr) {
        for (int64_t c = 0; c < count; ++c) {
            p.places[begin + c] = places[c];
        }
    }
}

static void pool(const WindowPool& p, int64_t image, int64_t bin) {
    with_sums(p, [&]<typename A, typename T>(Type<A>, Type<T>) {
        for (int64_t first = 0; first < p.channels; first += kWindowPoolChannels) {
            const int64_t left = p.channels - first;
            const int64_t count = left < kWindowPoolChannels ? left : kWindowPoolChannels;
            if (p.mode == PoolMode::kMax) {
                take_greatest<A, T>(p, image, bin, first, count);
            } else {
                add_up<A, T>(p, image, bin, first, count);
            }
        }
    });
}

// Gathered by cell, so that no two tasks write one place and 16-bit results are rounded once.
template <typename A, typename T>
static void spread_cell(const WindowPool& p, int64_t image, int64_t row, int64_t col, int64_t first,
                        int64_t count) {
    const BinSpan rows = bins_of_cell(row, p.height, p.rows);
    const BinSpan cols = bins_of_cell(col, p.width, p.cols);
    const int32_t place = static_cast<int32_t>(row * p.width + col);
    A sums[kWindowPoolChannels] = {};
    for (int64_t i = rows.begin; i < rows.end; ++i) {
        for (int64_t j = cols.begin; j < cols.end; ++j) {
            const int64_t bin = i * p.cols + j;
            const int64_t begin = (image * p.bins() + bin) * p.channels + first;
            const T* grad = static_cast<const T*>(p.grad) + begin;
            if (p.mode == PoolMode::kMax) {
                for (int64_t c = 0; c < count; ++c) {
                    const A value = static_cast<A>(to_float(grad[c]));
                    sums[c] += p.places[begin + c] == place ? value : A(0);
                }
                continue;
            }
            const Window window = pooling::window_of(p, bin);
            const A weight =
                p.mode == PoolMode::kAverage
                    ? A(1) / static_cast<A>(window.area())
                    : static_cast<const A*>(
                          p.weights)[pooling::weight_at(p, image, bin, window, row, col)];
            for (int64_t c = 0; c < count; ++c) {
                sums[c] += weight * static_cast<A>(to_float(grad[c]));
            }
        }
    }
    T* out =
        static_cast<T*>(p.grad_x) + ((image * p.height + row) * p.width + col) * p.channels + first;
    for (int64_t c = 0; c < count; ++c) {
        out[c] = from_float<T>(sums[c]);
    }
}

static void spread(const WindowPool& p, int64_t image, int64_t row) {
    with_sums(p, [&]<typename A, typename T>(Type<A>, Type<T>) {
        for (int64_t col = 0; col < p.width; ++col) {
            for (int64_t first = 0; first < p.channels; first += kWindowPoolChannels) {
                const int64_t left = p.channels - first;
                spread_cell<A, T>(p, image, row, col, first,
                                  left < kWindowPoolChannels ? left : kWindowPoolChannels);
            }
        }
    });
}

// The order of the sum is that of eight lanes, whatever the instruction set.
template <typename A, typename T>
PVF_INLINE A dot(const T* a, const T* b, int64_t count) {
    A lanes[kLanes] = {};
    int64_t c = 0;
    for (; c + kLanes <= count; c += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
            lanes[lane] +=
                static_cast<A>(to_float(a[c + lane])) * static_cast<A>(to_float(b[c + lane]));
        }
    }
    for (int lane = 0; c + lane < count; ++lane) {
        lanes[lane] +=
            static_cast<A>(to_float(a[c + lane])) * static_cast<A>(to_float(b[c + lane]));
    }
    A sum = lanes[0];
    for (int lane = 1; lane < kLanes; ++lane) {
        sum += lanes[lane];
    }
    return sum;
}

static void score(const WindowPool& p, int64_t image, int64_t bin) {
    with_sums(p, [&]<typename A, typename T>(Type<A>, Type<T>) {
        const Window window = pooling::window_of(p, bin);
        const T* grad = static_cast<const T*>(p.grad) + (image * p.bins() + bin) * p.channels;
        const A* weights = static_cast<const A*>(p.weights);
        A* out = static_cast<A*>(p.grad_logits);
        const int64_t begin = (image * p.bins() + bin) * p.cells();
        for (int64_t at = begin; at < begin + p.cells(); ++at) {
            out[at] = A(0);
        }
        A mean = A(0);
        for (int64_t row = window.rows.begin; row < window.rows.end; ++row) {
            for (int64_t col = window.cols.begin; col < window.cols.end; ++col) {
                const int64_t at = pooling::weight_at(p, image, bin, window, row, col);
                out[at] = dot<A, T>(grad, cell_of<T>(p, image, row, col), p.channels);
                mean += weights[at] * out[at];
            }
        }
        for (int64_t row = window.rows.begin; row < window.rows.end; ++row) {
            for (int64_t col = window.cols.begin; col < window.cols.end; ++col) {
                const int64_t at = pooling::weight_at(p, image, bin, window, row, col);
                out[at] = weights[at] * (out[at] - mean);
            }
        }
    });
}

extern const AdaptiveWindowPoolCpu adaptive_window_pool_cpu;
const AdaptiveWindowPoolCpu adaptive_window_pool_cpu{weigh, pool, spread, score};

}  // namespace pyvitfast::PVF_CPU_CAPABILITY
