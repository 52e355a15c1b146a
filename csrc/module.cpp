// Introspection only; never on an op's path.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "build_info.h"
#include "cpu_capability.h"
#include "fma_loop.h"
#include "ops/adaptive_window_pool/adaptive_window_pool.h"
#include "ops/fake_quantize/fake_quantize.h"
#include "ops/few_query_attention/few_query_attention.h"
#include "ops/kron_grow/kron_grow.h"
#include "ops/linear_cross_attention/linear_cross_attention.h"
#include "ops/saliency_commit_/saliency_commit_.h"
#include "ops/saliency_rowcol/saliency_rowcol.h"
#include "ops/scaled_sqnorm/scaled_sqnorm.h"
#include "ops/semantic_pool_attention/semantic_pool_attention.h"
#include "ops/spsa_perturb/spsa_perturb.h"
#include "ops/spsa_update_/spsa_update_.h"
#include "ops/structured_gather/structured_gather.h"
#include "ops/structured_zero_/structured_zero_.h"
#include "ops/tensor_ring_grow/tensor_ring_grow.h"
#include "ops/two_head_loss/two_head_loss.h"
#include "ops/window_gather_attention/window_gather_attention.h"

namespace py = pybind11;

namespace pyvitfast {
PVF_DECLARE_CPU_KERNELS(FmaLoop, fma_loop)
}

namespace {

using Shapes = std::vector<std::pair<int64_t, int64_t>>;

py::dict plan(int64_t launches, int64_t blocks, int64_t threads, int64_t shared,
              int64_t least_bytes) {
    py::dict out;
    out["launches"] = launches;
    out["blocks"] = blocks;
    out["threads"] = threads;
    out["shared_bytes"] = shared;
    out["least_bytes"] = least_bytes;
    return out;
}

int64_t launches(size_t count, size_t most) {
    return static_cast<int64_t>((count + most - 1) / most);
}

// Products of strided matrices, in float32: tiles of 128 x 128 by 256 threads.
py::dict product_plan(int64_t launches, int64_t rows, int64_t cols, int64_t count,
                      int64_t elements) {
    const int64_t tiles = (rows + 127) / 128 * ((cols + 127) / 128);
    return plan(launches, tiles * count, 256, 4 * 2 * 2 * 8 * (128 + 4), 4 * elements);
}

py::dict growth_plan(const std::string& op, const Shapes& shapes) {
    using namespace pyvitfast;
    if (op == "kron_grow") {
        if (shapes.size() != 4) {
            throw py::value_error("launch_plan: kron_grow takes 4 shapes, got " +
                                  std::to_string(shapes.size()));
        }
        const KronSizes n{shapes[0].first,  shapes[1].first, shapes[2].first, shapes[2].second,
                          shapes[1].second, shapes[3].first, shapes[3].second};
        const int64_t elements = n.types * (n.layers1 * n.out1 * n.in1 +
                                            n.layers2 * n.out2 * n.in2 + n.layers1 * n.layers2) +
                                 n.out1 * n.out2 + n.in1 * n.in2;
        const int64_t count = n.layers2 < kKronAtOnce ? n.layers2 : kKronAtOnce;
        return product_plan(kron_products(n, Factors::kShared), n.out2, n.in2, count, elements);
    }
    if (shapes.size() != 6) {
        throw py::value_error("launch_plan: tensor_ring_grow takes 6 shapes, got " +
                              std::to_string(shapes.size()));
    }
    const RingSizes n{shapes[0].first, shapes[0].second, shapes[1].first, shapes[1].second,
                      shapes[2].first, shapes[2].second, shapes[3].first, shapes[3].second,
                      shapes[4].first, shapes[4].second, shapes[5].first, shapes[5].second};
    const int64_t tile = ring_tile(n, 2);
    const int64_t elements = n.layers1 * n.slots1 * n.out1 * n.in1 +
                             n.layers2 * n.slots2 * n.out2 * n.in2 +
                             n.r1 * n.slots1 * n.slots2 * n.r2 + n.r2 * n.out1 * n.out2 * n.r3 +
                             n.r3 * n.layers1 * n.layers2 * n.r4 + n.r4 * n.in1 * n.in2 * n.r1;
    return product_plan(4 * ((n.out2 + tile - 1) / tile), tile, n.in2, n.layers2 * n.slots2,
                        elements);
}

// One head: (groups, queries), (keys, channels), and for windows (tokens of the grid, 1), which are
// read once however many windows share them.
py::dict attention_plan(const std::string& op, const Shapes& shapes) {
    using namespace pyvitfast;
    const bool windows = op == "window_gather_attention";
    if (shapes.size() != (windows ? 3 : 2)) {
        throw py::value_error("launch_plan: " + op + " takes " + (windows ? "3" : "2") +
                              " shapes, got " + std::to_string(shapes.size()));
    }
    const auto [groups, queries] = shapes[0];
    const auto [keys, width] = shapes[1];
    const int64_t splits = attention_cuda_splits(groups, queries, keys);
    const int64_t read = windows ? shapes[2].first : groups * keys;
    return plan(splits > 1 ? 2 : 1, groups * splits * tiles_along(queries, kAttentionQueries),
                kAttentionThreads, attention_forward_shared(width, false),
                4 * (2 * width * (read + groups * queries) + groups * queries));
}

// What the CUDA launchers would do with float32 tensors of these shapes; the same on every
// architecture.
py::dict launch_plan(const std::string& op, const Shapes& shapes, int arch) {
    using namespace pyvitfast;
    if (arch < 80) {
        throw py::value_error("launch_plan: `arch` must be 80 or newer, got " +
                              std::to_string(arch));
    }
    if (op == "linear_cross_attention") {
        int64_t blocks = 0;
        int64_t shared = 0;
        int64_t least = 0;
        int64_t splits = 1;
        for (const auto& [tokens, channels] : shapes) {
            const int64_t heads = std::max<int64_t>(1, channels / 64);
            const auto images = static_cast<int64_t>(shapes.size());
            const int64_t split = cross_attention_cuda_split(images, tokens);
            splits = std::max<int64_t>(1, (tokens + split - 1) / split);
            blocks += splits;
            shared = 4 * cross_attention_shared(channels, heads);
            least += 4 * (tokens * channels + 2 * heads * channels + channels);
        }
        return plan(splits > 1 ? 7 : 6, blocks, kCrossAttentionThreads, shared, least);
    }
    if (op == "semantic_pool_attention") {
        constexpr int64_t kQueries = 16;
        const auto images = static_cast<int64_t>(shapes.size());
        int64_t blocks = 0;
        int64_t splits = 1;
        int64_t shared = 0;
        int64_t values = 0;
        for (const auto& [tokens, channels] : shapes) {
            const int64_t rows = kQueries * std::max<int64_t>(1, channels / 64);
            const int64_t split = pool_cuda_split(images, rows, tokens);
            splits = (tokens + split - 1) / split;
            blocks += splits * tiles_along(rows, kPoolTile);
            shared = 4 * pool_shared_values(channels);
            values += (tokens + 2 * kQueries) * channels;
        }
        values += 4 * shapes[0].second * shapes[0].second;
        return plan(splits > 1 ? 8 : 7, blocks, kPoolThreads, shared, 4 * values);
    }
    if (op == "few_query_attention" || op == "window_gather_attention") {
        return attention_plan(op, shapes);
    }
    if (op == "kron_grow" || op == "tensor_ring_grow") {
        return growth_plan(op, shapes);
    }
    if (op == "two_head_loss") {
        int64_t blocks = 0;
        int64_t logits = 0;
        for (const auto& [rows, classes] : shapes) {
            blocks += two_head_loss_blocks(rows, classes);
            logits += 2 * rows * classes;
        }
        return plan(2, blocks, kTwoHeadThreads, 0, 4 * logits);
    }
    if (op == "adaptive_window_pool") {
        constexpr int64_t kBins = 16;
        int64_t sums = 0;
        int64_t values = 0;
        for (const auto& [side, channels] : shapes) {
            sums += kBins * channels;
            values += (side * side + kBins) * channels;
        }
        const int64_t each = kWindowPoolThreads * kWindowPoolVector;
        return plan(1, (sums + each - 1) / each, kWindowPoolThreads, 0, 4 * values);
    }
    int64_t blocks = 0;
    int64_t elements = 0;
    int64_t edges = 0;
    int64_t norm_blocks = 0;
    int64_t perturb_blocks = 0;
    int64_t update_blocks = 0;
    int64_t quantize_blocks = 0;
    for (const auto& [rows, cols] : shapes) {
        elements += rows * cols;
        edges += rows + cols;
        norm_blocks += sqnorm_blocks(rows * cols);
        perturb_blocks += perturb_tiles(rows * cols, 0);
        update_blocks += update_tiles(rows * cols, 0);
        quantize_blocks += quantize_tiles(rows * cols);
        if (op == "saliency_rowcol") {
            blocks += std::max<int64_t>(saliency_row_tiles(rows) * saliency_col_tiles(cols), 1);
        } else if (op == "structured_zero_") {
            blocks += zero_row_tiles(rows) * zero_col_tiles(cols);
        } else if (op == "structured_gather") {
            blocks += gather_row_tiles(rows) * gather_col_tiles(cols);
        } else {
            blocks += commit_blocks(rows * cols);
        }
    }
    if (op == "scaled_sqnorm") {
        return plan(launches(shapes.size(), kMaxSqnormTensors), norm_blocks, kSqnormThreads, 4,
                    4 * elements);
    }
    if (op == "spsa_perturb") {
        return plan(launches(shapes.size(), kMaxPerturbTensors), perturb_blocks, kPerturbThreads, 4,
                    16 * elements);
    }
    if (op == "spsa_update_") {
        return plan(launches(shapes.size(), kMaxUpdateTensors), update_blocks, kUpdateThreads, 8,
                    8 * elements);
    }
    if (op == "fake_quantize") {
        return plan(launches(shapes.size(), kMaxQuantizeTensors), quantize_blocks, kQuantizeThreads,
                    0, 8 * elements);
    }
    if (op == "saliency_rowcol") {
        const int64_t shared = kSaliencyCudaThreads / 32 * kSaliencyCudaTileRows * 4 + 4;
        return plan(launches(shapes.size(), kMaxSaliencyMatrices), blocks, kSaliencyCudaThreads,
                    shared, 8 * elements + 4 * edges);
    }
    if (op == "structured_zero_") {
        return plan(launches(shapes.size(), kMaxZeroTensors), blocks, kZeroThreads, 0,
                    4 * elements);
    }
    if (op == "structured_gather") {
        return plan(launches(shapes.size(), kMaxGatherTensors), blocks, kGatherThreads, 0,
                    8 * elements);
    }
    if (op != "saliency_commit_") {
        throw py::value_error("launch_plan: unknown op '" + op + "'");
    }
    return plan(2, blocks, kCommitThreads, 0, 12 * elements);
}

double fma_loop(int64_t iterations) {
    using namespace pyvitfast;
    if (iterations < 0) {
        throw py::value_error("fma_loop: `iterations` must be 0 or more, got " +
                              std::to_string(iterations));
    }
    const FmaLoop& loop = PVF_CPU_KERNELS_OF(fma_loop);
    {
        const py::gil_scoped_release others_may_run;
        loop.run(iterations);
    }
    return static_cast<double>(iterations) * static_cast<double>(loop.flops);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "What was built and what this processor can run.";
    m.def(
        "build_info", [] { return py::module_::import("json").attr("loads")(kBuildInfo); },
        "Versions, compiler, architectures and libraries of this build, as in _build_info.json.");
    m.def(
        "cpu_capability",
        [] { return pyvitfast::cpu_capability_name(pyvitfast::cpu_capability()); },
        "The instruction set the CPU kernels run with: baseline, avx2 or avx512.");
    m.def("supported_cpu_capabilities", [] {
        std::vector<std::string> names;
        for (const auto capability : pyvitfast::supported_cpu_capabilities()) {
            names.emplace_back(pyvitfast::cpu_capability_name(capability));
        }
        return names;
    });
    m.def("fma_loop", &fma_loop, py::arg("iterations"),
          "Runs float32 multiply-adds that never leave the registers on this thread, without the "
          "GIL, and returns how many operations that were: the arithmetic limit of benchmarks.");
    m.def(
        "launch_plan", &launch_plan, py::arg("op"), py::arg("shapes"), py::arg("arch") = 80,
        "Launches, blocks, threads, static shared bytes and least bytes moved of a CUDA op on "
        "float32 "
        "matrices of these (rows, cols). zero_ and gather: with every entry dead, or kept. "
        "semantic_pool_attention: one (tokens, channels) an image, 16 queries, heads 64 wide; "
        "blocks and "
        "shared memory are those of the kernel that reads the tokens. "
        "adaptive_window_pool: an image each, (side of the grid, channels), averaged to 4 by 4. "
        "two_head_loss: (rows, classes) of the logits, the forward; blocks of the first kernel. "
        "commit_: the "
        "shapes are (units, 1). linear_cross_attention: one (tokens, channels) an image, heads "
        "64 wide; "
        "blocks, bytes and dynamic shared memory are those of the kernel that reads the tokens. "
        "scaled_sqnorm, spsa_perturb, spsa_update_, fake_quantize: one scale a tensor, one "
        "direction, float32 levels, forward only. kron_grow: (T, T), (L1, L2), (O1, I1), (O2, I2), "
        "shared factors; tensor_ring_grow: (L1, B1), (O1, I1), (L2, B2), (O2, I2), (R1, R2), (R3, "
        "R4); blocks are those of the last product. few_query_attention: (groups, queries), (keys, "
        "channels), a group being a head of an entry; window_gather_attention: the same and "
        "(tokens, "
        "1) of the grid; the forward, with dynamic shared memory.");
}
