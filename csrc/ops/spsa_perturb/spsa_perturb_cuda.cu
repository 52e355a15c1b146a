#include "ops/spsa_perturb/spsa_perturb.h"
#include "ops/spsa_perturb/spsa_perturb_math.h"
#include "portable/device.h"
#include "portable/launch_result.h"
#include "portable/multi_tensor.h"
#include "portable/spsa_device.h"

namespace pyvitfast {

using namespace device;

namespace {

template <bool kSign>
PVF_DEVICE void store_side(const PerturbTensor& tensor, void* side, int i, const Quad& quad,
                           const Vec<float, 4>& weight, const Vec<float, 4>& direction,
                           const Vec<float, 4>& scale, float radius, const Levels& levels) {
    Vec<float, 4> out;
    PVF_UNROLL
    for (int k = 0; k < 4; ++k) {
        out[k] = spsa::perturbed<kSign>(weight[k], product(radius, scale[k]), direction[k],
                                        scale[k], levels);
    }
    const Quad at{quad.at + i * tensor.numel, quad.low, quad.high};
    store_quad(tensor.out_type, side, at, out);
}

PVF_KERNEL PVF_LAUNCH_BOUNDS(kPerturbThreads, 3)
    spsa_perturb_kernel(const __grid_constant__ SpsaPerturbParams p) {
    PVF_SHARED(float, shared_guidance, 1);
    const PerturbOptions& o = p.options;
    const int64_t block = block_idx().x;
    const PerturbTensor& tensor = entry_of_tile(p.entries, p.count, block);
    if (thread_idx().x == 0) {
        store_shared(&shared_guidance[0], spsa::guidance(load(o.sqnorm), o.sqrt_beta));
    }
    sync_threads();
    const float size = load_shared(&shared_guidance[0]);
    const unsigned first_signs = negative_directions(o.seed, o.direction);
    const int64_t tile = (block - tensor.tile_begin) * kPerturbThreads * kPerturbQuads;
    PVF_NO_UNROLL
    for (int q = 0; q < kPerturbQuads; ++q) {
        const int64_t index = tile + q * kPerturbThreads + thread_idx().x;
        const Quad quad = quad_at(index, tensor.numel, tensor.offset);
        const Vec<float, 4> weight = load_quad(FloatType::kFloat32, tensor.weight, quad);
        const Vec<float, 4> grad = load_quad(tensor.grad_type, tensor.grad, quad);
        const Vec<float, 4> scale = scales_of(tensor.layout, quad);
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
            Vec<float, 4> v;
            PVF_UNROLL
            for (int k = 0; k < 4; ++k) {
                v[k] = spsa::direction_at(guidance, product(scale[k], grad[k]), o.spread, noise[k]);
            }
            if (o.levels.sign != 0) {
                store_side<true>(tensor, tensor.plus, i, quad, weight, v, scale, o.eps_bar,
                                 o.levels);
                store_side<true>(tensor, tensor.minus, i, quad, weight, v, scale, -o.eps_bar,
                                 o.levels);
            } else {
                store_side<false>(tensor, tensor.plus, i, quad, weight, v, scale, o.eps_bar,
                                  o.levels);
                store_side<false>(tensor, tensor.minus, i, quad, weight, v, scale, -o.eps_bar,
                                  o.levels);
            }
        }
    }
}

}  // namespace

const char* spsa_perturb_cuda(const SpsaPerturbParams& params, void* stream) {
    const Dim3 grid{static_cast<unsigned>(params.tiles), 1, 1};
    return launch_result(launch(spsa_perturb_kernel, grid, Dim3{kPerturbThreads, 1, 1}, 0,
                                as_stream(stream), params));
}

}  // namespace pyvitfast
