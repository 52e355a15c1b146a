#include "ops/fake_quantize/fake_quantize.h"
#include "ops/fake_quantize/fake_quantize_math.h"
#include "portable/chunk_sum.h"
#include "portable/device.h"
#include "portable/launch_result.h"
#include "portable/multi_tensor.h"
#include "portable/spsa_device.h"

namespace pyvitfast {

using namespace device;

namespace {

template <typename A>
PVF_DEVICE A quantized(A weight, A scale, const QuantizeOptions& options) {
    return options.levels.sign != 0 ? quantizing::quantized<true>(weight, scale, options)
                                    : quantizing::quantized<false>(weight, scale, options);
}

PVF_KERNEL PVF_LAUNCH_BOUNDS(kQuantizeThreads, 4)
    fake_quantize_kernel(const __grid_constant__ FakeQuantizeParams p) {
    const int64_t block = block_idx().x;
    const QuantizeTensor& tensor = entry_of_tile(p.entries, p.count, block);
    const int64_t tile = (block - tensor.tile_begin) * kQuantizeThreads * kQuantizeQuads;
    PVF_NO_UNROLL
    for (int q = 0; q < kQuantizeQuads; ++q) {
        const int64_t index = tile + q * kQuantizeThreads + thread_idx().x;
        const Quad quad = quad_at(index, tensor.numel, 0);
        const Vec<float, 4> weight = load_quad(tensor.weight_type, tensor.weight, quad);
        const Vec<float, 4> scale = scales_of(tensor.layout, quad);
        Vec<float, 4> out;
        PVF_UNROLL
        for (int k = 0; k < 4; ++k) {
            out[k] = quantized(weight[k], scale[k], p.options);
        }
        store_quad(tensor.other_type, tensor.out, quad, out);
    }
}

PVF_KERNEL PVF_LAUNCH_BOUNDS(kQuantizeThreads, 2)
    fake_quantize_double_kernel(const __grid_constant__ FakeQuantizeParams p) {
    const int64_t block = block_idx().x;
    const QuantizeTensor& tensor = entry_of_tile(p.entries, p.count, block);
    const int64_t first = (block - tensor.tile_begin) * kQuantizeTile;
    const double* scales = static_cast<const double*>(tensor.layout.scales);
    PVF_NO_UNROLL
    for (int k = 0; k < kQuantizeQuads * 4; ++k) {
        const int64_t at = first + k * kQuantizeThreads + thread_idx().x;
        if (at < tensor.numel) {
            const double scale = load(scales + scale_index(tensor.layout, at));
            const double weight = load(static_cast<const double*>(tensor.weight) + at);
            store(static_cast<double*>(tensor.out) + at, quantized(weight, scale, p.options));
        }
    }
}

template <typename A, typename W, typename T>
PVF_DEVICE double differentiate(const QuantizeTensor& tensor, const QuantizeOptions& options,
                                const Chunk& chunk, A scale) {
    const W* weight = static_cast<const W*>(tensor.weight) + chunk.begin;
    const T* upstream = static_cast<const T*>(tensor.upstream) + chunk.begin;
    W* out = static_cast<W*>(tensor.out) + chunk.begin;
    return warp_chunk_sum(
        static_cast<int>(chunk.count), [&](int at, int there, double (&lanes)[4]) {
            const auto weights = load_neighbours(weight + at, there);
            const auto given = load_neighbours(upstream + at, there);
            Vec<W, 4> grads;
            PVF_UNROLL
            for (int i = 0; i < 4; ++i) {
                const A ratio =
                    quantizing::ratio_of(static_cast<A>(to_float(weights[i])), scale, options.mask);
                const auto slopes = options.levels.sign != 0
                                        ? quantizing::slopes_of<true>(ratio, options)
                                        : quantizing::slopes_of<false>(ratio, options);
                const A each = static_cast<A>(to_float(given[i]));
                grads[i] = from_float<W>(product(each, slopes.weight));
                if (i < there) {
                    lanes[i] += static_cast<double>(product(each, slopes.scale));
                }
            }
            store_neighbours(out + at, there, grads);
        });
}

template <typename A>
PVF_DEVICE void store_scale(const QuantizeTensor& tensor, const QuantizeOptions& options,
                            int64_t segment, double sum) {
    if (lane_id() == 0) {
        const int64_t size = segment_size(tensor.layout, segment, tensor.numel);
        store(static_cast<A*>(tensor.scale_grad) + segment,
              static_cast<A>(sum * quantizing::gradient_factor(options, size)));
    }
}

template <typename A>
PVF_KERNEL PVF_LAUNCH_BOUNDS(kQuantizeThreads, 2)
    fake_quantize_backward_kernel(const __grid_constant__ FakeQuantizeParams p) {
    PVF_SHARED(int32_t, is_last, 1);
    const int64_t block = block_idx().x;
    const QuantizeTensor& tensor = entry_of_tile(p.entries, p.count, block);
    const int64_t chunks = quantize_chunks(tensor);
    const int64_t each = chunks_of_segment(tensor);
    const int64_t chunk = (block - tensor.tile_begin) * kQuantizeWarps + warp_id();
    double* sums = p.sums + tensor.sums_begin;
    if (chunk < chunks) {
        const int64_t segment = chunk / each;
        const A scale = load(static_cast<const A*>(tensor.layout.scales) + segment);
        double sum = 0.0;
        with_float_summed_in<A>(tensor.weight_type, [&](auto weight) {
            with_float_summed_in<A>(tensor.other_type, [&](auto other) {
                using W = typename decltype(weight)::type;
                using T = typename decltype(other)::type;
                sum = differentiate<A, W, T>(tensor, p.options, chunk_at(tensor, chunk), scale);
            });
        });
        if (each == 1) {
            store_scale<A>(tensor, p.options, segment, sum);
        } else if (lane_id() == 0) {
            store(sums + chunk, sum);
        }
    }
    if (each == 1) {
        return;
    }
    // The last block of a tensor to finish adds the chunks of its segments.
    thread_fence();
    sync_threads();
    if (thread_idx().x == 0) {
        const int32_t ticket = atomic_add(p.tickets + (&tensor - p.entries), 1);
        store_shared(&is_last[0], int32_t(ticket + 1 == quantize_backward_tiles(tensor)));
    }
    sync_threads();
    if (load_shared(&is_last[0]) == 0) {
        return;
    }
    thread_fence();
    for (int64_t segment = warp_id(); segment < chunks / each; segment += kQuantizeWarps) {
        store_scale<A>(tensor, p.options, segment, warp_sum_of_sums(sums + segment * each, each));
    }
}

}  // namespace

const char* fake_quantize_cuda(const FakeQuantizeParams& params, bool wide, void* stream) {
    const Dim3 grid{static_cast<unsigned>(params.tiles), 1, 1};
    return launch_result(launch(wide ? fake_quantize_double_kernel : fake_quantize_kernel, grid,
                                Dim3{kQuantizeThreads, 1, 1}, 0, as_stream(stream), params));
}

const char* fake_quantize_backward_cuda(const FakeQuantizeParams& params, bool wide, void* stream) {
    const Dim3 grid{static_cast<unsigned>(params.tiles), 1, 1};
    return launch_result(
        launch(wide ? fake_quantize_backward_kernel<double> : fake_quantize_backward_kernel<float>,
               grid, Dim3{kQuantizeThreads, 1, 1}, 0, as_stream(stream), params));
}

}  // namespace pyvitfast
