#include "ops/spsa_update_/spsa_update_.h"
#include "ops/spsa_update_/spsa_update__math.h"
#include "portable/device.h"
#include "portable/launch_result.h"
#include "portable/multi_tensor.h"
#include "portable/spsa_device.h"

namespace pyvitfast {

using namespace device;

namespace {

PVF_KERNEL PVF_LAUNCH_BOUNDS(kUpdateThreads, 3)
    spsa_update_kernel(const __grid_constant__ SpsaUpdateParams p) {
    PVF_SHARED(float, shared_guidance, 1);
    PVF_SHARED(float, shared_factor, 1);
    const UpdateOptions& o = p.options;
    const int64_t block = block_idx().x;
    const UpdateTensor& tensor = entry_of_tile(p.entries, p.count, block);
    const bool one_scale = tensor.layout.groups == 0;
    if (thread_idx().x == 0) {
        store_shared(&shared_guidance[0], spsa::guidance(load(o.sqnorm), o.sqrt_beta));
        // A division in double is dear on most GPUs, and mostly there is one scale and direction.
        const float scale = load(static_cast<const float*>(tensor.layout.scales));
        store_shared(&shared_factor[0], spsa::factor_of(load(o.slopes), o.directions, scale));
    }
    sync_threads();
    const float size = load_shared(&shared_guidance[0]);
    const float first_factor = load_shared(&shared_factor[0]);
    const unsigned first_signs = negative_directions(o.seed, o.direction);
    const int64_t tile = (block - tensor.tile_begin) * kUpdateThreads * kUpdateQuads;
    PVF_NO_UNROLL
    for (int q = 0; q < kUpdateQuads; ++q) {
        const int64_t index = tile + q * kUpdateThreads + thread_idx().x;
        const Quad quad = quad_at(index, tensor.numel, tensor.offset);
        const Vec<float, 4> grad = load_quad(tensor.type, tensor.grad, quad);
        const Vec<float, 4> scale = scales_of(tensor.layout, quad);
        Vec<float, 4> total{};
        unsigned signs = first_signs;
        PVF_NO_UNROLL
        for (int i = 0; i < o.directions; ++i) {
            const uint32_t direction = o.direction + static_cast<uint32_t>(i);
            if (i > 0 && i % 32 == 0) {
                signs = negative_directions(o.seed, direction);
            }
            const float guidance = (signs >> (i % 32) & 1u) != 0 ? -size : size;
            const Vec<float, 4> noise =
                spsa::quad_of(o.noise, o.seed, tensor.offset / 4 + index, tensor.id, direction);
            const double slope = load(o.slopes + i);
            float factor = first_factor;
            PVF_UNROLL
            for (int k = 0; k < 4; ++k) {
                const bool known =
                    k == 0 ? i == 0 && one_scale : float_bits(scale[k]) == float_bits(scale[k - 1]);
                if (!known) {
                    factor = spsa::factor_of(slope, o.directions, scale[k]);
                }
                const float v =
                    spsa::direction_at(guidance, product(scale[k], grad[k]), o.spread, noise[k]);
                total[k] = fused(factor, v, total[k]);
            }
        }
        store_quad(tensor.type, tensor.grad, quad, total);
    }
}

}  // namespace

const char* spsa_update_cuda(const SpsaUpdateParams& params, void* stream) {
    const Dim3 grid{static_cast<unsigned>(params.tiles), 1, 1};
    return launch_result(
        launch(spsa_update_kernel, grid, Dim3{kUpdateThreads, 1, 1}, 0, as_stream(stream), params));
}

}  // namespace pyvitfast
