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

PVF_INLINE Floats load_sums(Type<float>, const auto* from) { return load_floats(from); }
PVF_INLINE Doubles load_sums(Type<double>, const auto* from) { return load_doubles(from); }

// A weighted sum of rows at channels first to first + count: each_row calls f(row, weight).
// A whole task's channels stay in registers.
template <typename A, typename T, typename EachRow>
PVF_INLINE void weighted_sum(int64_t first, int64_t count, T* out, A scale,
                             const EachRow& each_row) {
    if (count == kWindowPoolChannels) {
        constexpr int kVectors = kWindowPoolChannels / kLanes;
        decltype(load_sums(Type<A>{}, out)) sums[kVectors] = {};
        each_row([&](const T* row, A weight) {
            for (int v = 0; v < kVectors; ++v) {
                sums[v] += weight * load_sums(Type<A>{}, row + first + v * kLanes);
            }
        });
        for (int v = 0; v < kVectors; ++v) {
            for (int lane = 0; lane < kLanes; ++lane) {
                out[first + v * kLanes + lane] = from_float<T>(sums[v][lane] * scale);
            }
        }
        return;
    }
    A sums[kWindowPoolChannels] = {};
    each_row([&](const T* row, A weight) {
        for (int64_t c = 0; c < count; ++c) {
            sums[c] += weight * static_cast<A>(to_float(row[first + c]));
        }
    });
    for (int64_t c = 0; c < count; ++c) {
        out[first + c] = from_float<T>(sums[c] * scale);
    }
}

template <typename A, typename T>
static void add_up(const WindowPool& p, int64_t image, int64_t bin, int64_t first, int64_t count) {
    const Window window = pooling::window_of(p, bin);
    const bool average = p.mode == PoolMode::kAverage;
    const A* weights = static_cast<const A*>(p.weights);
    T* out = static_cast<T*>(p.out) + (image * p.bins() + bin) * p.channels;
    weighted_sum(first, count, out, average ? A(1) / static_cast<A>(window.area()) : A(1),
                 [&](const auto& f) {
                     for (int64_t row = window.rows.begin; row < window.rows.end; ++row) {
                         for (int64_t col = window.cols.begin; col < window.cols.end; ++col) {
                             f(cell_of<T>(p, image, row, col),
                               average
                                   ? A(1)
                                   : weights[pooling::weight_at(p, image, bin, window, row, col)]);
                         }
                     }
                 });
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
    const T* grads = static_cast<const T*>(p.grad) + image * p.bins() * p.channels;
    T* out = static_cast<T*>(p.grad_x) + ((image * p.height + row) * p.width + col) * p.channels;
    const auto each_bin = [&](const auto& f) {
        for (int64_t i = rows.begin; i < rows.end; ++i) {
            for (int64_t j = cols.begin; j < cols.end; ++j) {
                f(i * p.cols + j);
            }
        }
    };
    if (p.mode == PoolMode::kMax) {
        const int32_t place = static_cast<int32_t>(row * p.width + col);
        const int32_t* places = p.places + image * p.bins() * p.channels;
        A sums[kWindowPoolChannels] = {};
        each_bin([&](int64_t bin) {
            const int64_t begin = bin * p.channels + first;
            for (int64_t c = 0; c < count; ++c) {
                const A value = static_cast<A>(to_float(grads[begin + c]));
                sums[c] += places[begin + c] == place ? value : A(0);
            }
        });
        for (int64_t c = 0; c < count; ++c) {
            out[first + c] = from_float<T>(sums[c]);
        }
        return;
    }
    weighted_sum(first, count, out, A(1), [&](const auto& f) {
        each_bin([&](int64_t bin) {
            const Window window = pooling::window_of(p, bin);
            f(grads + bin * p.channels,
              p.mode == PoolMode::kAverage
                  ? A(1) / static_cast<A>(window.area())
                  : static_cast<const A*>(
                        p.weights)[pooling::weight_at(p, image, bin, window, row, col)]);
        });
    });
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
