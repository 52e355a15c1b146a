#include "ops/scaled_sqnorm/scaled_sqnorm.h"
#include "ops/scaled_sqnorm/scaled_sqnorm_math.h"
#include "portable/chunk_sum.h"
#include "portable/device.h"
#include "portable/launch_result.h"
#include "portable/multi_tensor.h"

namespace pyvitfast {

using namespace device;

namespace {

template <typename A, typename T>
PVF_DEVICE double chunk_of(const SqnormTensor& tensor, int64_t begin, int count) {
    const T* grad = static_cast<const T*>(tensor.grad) + begin;
    const A* scales = static_cast<const A*>(tensor.layout.scales);
    const ScaleLayout& layout = tensor.layout;
    const bool together = layout.groups == 0 || (layout.cols % 4 == 0 && layout.group % 4 == 0);
    return warp_chunk_sum(count, [&](int at, int there, double (&lanes)[4]) {
        const auto quad = load_neighbours(grad + at, there);
        A scale = load(scales + scale_index(layout, begin + at));
        PVF_UNROLL
        for (int i = 0; i < 4; ++i) {
            if (i < there) {
                if (i > 0 && !together) {
                    scale = load(scales + scale_index(layout, begin + at + i));
                }
                lanes[i] += sqnorm::square(scale, static_cast<A>(to_float(quad[i])));
            }
        }
    });
}

PVF_KERNEL PVF_LAUNCH_BOUNDS(kSqnormThreads, 2)
    scaled_sqnorm_kernel(const __grid_constant__ ScaledSqnormParams p) {
    PVF_SHARED(int32_t, is_last, 1);
    const int64_t block = block_idx().x;
    const SqnormTensor& tensor = entry_of_tile(p.entries, p.count, block);
    const int64_t chunk = (block - tensor.tile_begin) * kSqnormWarps + warp_id();
    if (chunk < sqnorm_chunks(tensor.numel)) {
        const int64_t begin = chunk * kSumChunk;
        const int64_t left = tensor.numel - begin;
        const int count = static_cast<int>(left < kSumChunk ? left : kSumChunk);
        double sum = 0.0;
        with_float(tensor.type, [&](auto type) {
            using T = typename decltype(type)::type;
            sum = chunk_of<Accumulate<T>, T>(tensor, begin, count);
        });
        if (lane_id() == 0) {
            store(p.sums + tensor.chunk_begin + chunk, sum);
        }
    }
    thread_fence();
    sync_threads();
    if (thread_idx().x == 0) {
        const int32_t ticket = atomic_add(p.ticket, 1);
        store_shared(&is_last[0], int32_t(ticket + 1 == p.all_tiles));
    }
    sync_threads();
    if (load_shared(&is_last[0]) == 0) {
        return;
    }
    thread_fence();
    const int64_t groups = (p.all_chunks + kSumChunk - 1) / kSumChunk;
    double* group_sums = p.sums + p.all_chunks;
    for (int64_t group = warp_id(); group < groups; group += kSqnormWarps) {
        const int64_t first = group * kSumChunk;
        const int64_t left = p.all_chunks - first;
        const double sum =
            warp_sum_of_sums(p.sums + first, left < kSumChunk ? left : int64_t{kSumChunk});
        if (lane_id() == 0) {
            store(group_sums + group, sum);
        }
    }
    sync_threads();
    if (thread_idx().x == 0) {
        double total = 0.0;
        for (int64_t group = 0; group < groups; ++group) {
            total += load(group_sums + group);
        }
        store(p.result, total);
    }
}

}  // namespace

const char* scaled_sqnorm_cuda(const ScaledSqnormParams& params, void* stream) {
    const Dim3 grid{static_cast<unsigned>(params.tiles), 1, 1};
    return launch_result(launch(scaled_sqnorm_kernel, grid, Dim3{kSqnormThreads, 1, 1}, 0,
                                as_stream(stream), params));
}

}  // namespace pyvitfast
