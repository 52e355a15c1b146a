#include "cpu_quantizer.h"
#include "ops/fake_quantize/fake_quantize.h"
#include "ops/fake_quantize/fake_quantize_math.h"

namespace pyvitfast::PVF_CPU_CAPABILITY {

template <typename A, typename W, typename T, bool kSign>
static void quantize(const QuantizeTensor& tensor, const QuantizeOptions& options, int64_t begin,
                     int64_t end) {
    const W* weight = static_cast<const W*>(tensor.weight);
    T* out = static_cast<T*>(tensor.out);
    A scales[kSumChunk];
    for (int64_t first = begin; first < end; first += kSumChunk) {
        const int64_t count = end - first < kSumChunk ? end - first : kSumChunk;
        spread_scales(tensor.layout, first, first + count, scales);
        for (int64_t j = 0; j < count; ++j) {
            const A w = static_cast<A>(to_float(weight[first + j]));
            out[first + j] = from_float<T>(quantizing::quantized<kSign>(w, scales[j], options));
        }
    }
}

template <typename A, typename W, typename T, bool kSign>
static double differentiate(const QuantizeTensor& tensor, const QuantizeOptions& options,
                            int64_t chunk) {
    const Chunk at = chunk_at(tensor, chunk);
    const W* weight = static_cast<const W*>(tensor.weight) + at.begin;
    const T* upstream = static_cast<const T*>(tensor.upstream) + at.begin;
    W* out = static_cast<W*>(tensor.out) + at.begin;
    const A scale = static_cast<const A*>(
        tensor.layout.scales)[tensor.layout.groups == 0 ? 0 : chunk / chunks_of_segment(tensor)];
    A products[kSumChunk];
    for (int64_t j = 0; j < at.count; ++j) {
        const A ratio =
            quantizing::ratio_of(static_cast<A>(to_float(weight[j])), scale, options.mask);
        const auto slopes = quantizing::slopes_of<kSign>(ratio, options);
        const A given = static_cast<A>(to_float(upstream[j]));
        out[j] = from_float<W>(product(given, slopes.weight));
        products[j] = product(given, slopes.scale);
    }
    return sum_of_chunk(at.count, [&](int64_t j) { return static_cast<double>(products[j]); });
}

// Calls f with the Types of sums, weights and levels; float64 comes alone.
template <typename F>
PVF_INLINE void with_types(const QuantizeTensor& tensor, const F& f) {
    if (tensor.weight_type == FloatType::kFloat64) {
        return f(Type<double>{}, Type<double>{}, Type<double>{});
    }
    with_narrow_float(tensor.weight_type, [&](auto weight) {
        with_narrow_float(tensor.other_type, [&](auto other) { f(Type<float>{}, weight, other); });
    });
}

static void part(const QuantizeTensor& tensor, const QuantizeOptions& options, int64_t begin,
                 int64_t end) {
    with_types(tensor, [&]<typename A, typename W, typename T>(Type<A>, Type<W>, Type<T>) {
        if (options.levels.sign != 0) {
            quantize<A, W, T, true>(tensor, options, begin, end);
        } else {
            quantize<A, W, T, false>(tensor, options, begin, end);
        }
    });
}

static double chunk(const QuantizeTensor& tensor, const QuantizeOptions& options, int64_t chunk) {
    double sum = 0.0;
    with_types(tensor, [&]<typename A, typename W, typename T>(Type<A>, Type<W>, Type<T>) {
        sum = options.levels.sign != 0 ? differentiate<A, W, T, true>(tensor, options, chunk)
                                       : differentiate<A, W, T, false>(tensor, options, chunk);
    });
    return sum;
}

static void scale(const QuantizeTensor& tensor, const QuantizeOptions& options, int64_t segment,
                  const double* sums) {
    const int64_t each = chunks_of_segment(tensor);
    const int64_t size = segment_size(tensor.layout, segment, tensor.numel);
    const double sum =
        sum_of_sums(sums + segment * each, each) * quantizing::gradient_factor(options, size);
    if (tensor.weight_type == FloatType::kFloat64) {
        static_cast<double*>(tensor.scale_grad)[segment] = sum;
    } else {
        static_cast<float*>(tensor.scale_grad)[segment] = static_cast<float>(sum);
    }
}

extern const FakeQuantizeCpu fake_quantize_cpu;
const FakeQuantizeCpu fake_quantize_cpu{part, chunk, scale};

}  // namespace pyvitfast::PVF_CPU_CAPABILITY
