#include "ops/fake_quantize/fake_quantize.h"

#include "scaled_tensor.h"

namespace pyvitfast {

#if PVF_CPU_KERNELS
PVF_DECLARE_CPU_KERNELS(FakeQuantizeCpu, fake_quantize_cpu)
#else
const char* fake_quantize_cuda(const FakeQuantizeParams& params, bool wide, void* stream);
const char* fake_quantize_backward_cuda(const FakeQuantizeParams& params, bool wide, void* stream);
#endif

namespace {

constexpr const char* kName = "fake_quantize";

struct Inputs {
    TensorList weights;
    TensorList scales;
    std::vector<QuantizeTensor> entries;
    QuantizeOptions options{};
    bool wide = false;
};

Inputs describe(const TensorList& weights, const TensorList& scales, int64_t bits, int64_t grid,
                int64_t mask, int64_t group_size, bool scale_gradient) {
    STD_TORCH_CHECK(weights.size() == scales.size() && !weights.empty(), kName,
                    ": one scale tensor a weight, and at least one");
    STD_TORCH_CHECK(mask >= 0 && mask <= 5, kName, ": mask is out of range");
    Inputs in;
    in.weights = contiguous_all(weights);
    in.scales = contiguous_all(scales);
    in.options.levels = levels_of(grid_of(kName, grid, bits), static_cast<int>(bits));
    in.options.mask = static_cast<Mask>(mask);
    in.options.scale_gradient = scale_gradient ? 1 : 0;
    for (size_t i = 0; i < in.weights.size(); ++i) {
        const Tensor& weight = in.weights[i];
        QuantizeTensor entry{};
        entry.weight = weight.data_ptr();
        entry.weight_type = float_type(kName, weight);
        entry.numel = weight.numel();
        const bool wide = entry.weight_type == FloatType::kFloat64;
        STD_TORCH_CHECK(i == 0 || wide == in.wide, kName,
                        ": float64 cannot be mixed with other dtypes in one call");
        in.wide = wide;
        entry.layout = scale_layout(kName, weight, in.scales[i], group_size,
                                    wide ? DType::Double : DType::Float);
        in.entries.push_back(entry);
    }
    return in;
}

Tensor empty_as(const Tensor& tensor, std::optional<DType> dtype = {}) {
    const auto sizes = tensor.sizes();
    return empty(tensor, {sizes.begin(), sizes.end()}, dtype);
}

void check_other(const Inputs& in, QuantizeTensor& entry, const Tensor& other) {
    entry.other_type = float_type(kName, other);
    STD_TORCH_CHECK((entry.other_type == FloatType::kFloat64) == in.wide, kName,
                    ": float64 goes with float64");
}

TensorList fake_quantize(TensorList weights, TensorList scales, int64_t bits, int64_t grid,
                         int64_t mask, int64_t group_size, bool scale_gradient,
                         std::optional<DType> dtype) {
    Inputs in = describe(weights, scales, bits, grid, mask, group_size, scale_gradient);
    TensorList out;
    for (size_t i = 0; i < in.entries.size(); ++i) {
        out.push_back(empty_as(in.weights[i], dtype));
        in.entries[i].out = out.back().data_ptr();
        check_other(in, in.entries[i], out.back());
    }
#if PVF_CPU_KERNELS
    const auto& kernels = PVF_CPU_KERNELS_OF(fake_quantize_cpu);
    std::vector<int64_t> sizes;
    for (const auto& entry : in.entries) {
        sizes.push_back(entry.numel);
    }
    parallel_parts(sizes, kQuantizePart, 2, [&](size_t i, int64_t, int64_t begin, int64_t end) {
        kernels.part(in.entries[i], in.options, begin, end);
    });
#else
    LaunchScope scope(out[0]);
    FakeQuantizeParams params{};
    params.options = in.options;
    launch_in_tables(
        kName, in.entries, kMaxQuantizeTensors, params,
        [](const QuantizeTensor& entry) { return quantize_tiles(entry.numel); },
        [&](const FakeQuantizeParams& p, size_t) {
            return fake_quantize_cuda(p, in.wide, scope.stream());
        });
#endif
    return out;
}

TensorList fake_quantize_backward(TensorList grads, TensorList weights, TensorList scales,
                                  int64_t bits, int64_t grid, int64_t mask, int64_t group_size,
                                  bool scale_gradient) {
    Inputs in = describe(weights, scales, bits, grid, mask, group_size, scale_gradient);
    STD_TORCH_CHECK(grads.size() == weights.size(),
                    "fake_quantize_backward: one gradient a weight");
    const TensorList upstream = contiguous_all(grads);
    TensorList out;
    int64_t sums = 0;
    for (size_t i = 0; i < in.entries.size(); ++i) {
        QuantizeTensor& entry = in.entries[i];
        STD_TORCH_CHECK(upstream[i].numel() == entry.numel, "fake_quantize_backward: `grads[", i,
                        "]` must have the shape of `weights[", i, "]`");
        check_other(in, entry, upstream[i]);
        entry.upstream = upstream[i].data_ptr();
        out.push_back(empty_as(in.weights[i]));
        entry.out = out.back().data_ptr();
        entry.sums_begin = sums;
        sums += quantize_chunks(entry);
    }
    for (size_t i = 0; i < in.entries.size(); ++i) {
        QuantizeTensor& entry = in.entries[i];
        const auto sizes = in.scales[i].sizes();
        const std::vector<int64_t> shape{sizes.begin(), sizes.end()};
        // Without elements no chunk writes the sum.
        out.push_back(entry.numel == 0 ? zeros(in.scales[i], shape) : empty_as(in.scales[i]));
        entry.scale_grad = out.back().data_ptr();
    }
    const Tensor workspace = empty(out[0], {sums}, DType::Double);
    auto* partial = static_cast<double*>(workspace.data_ptr());
#if PVF_CPU_KERNELS
    const auto& kernels = PVF_CPU_KERNELS_OF(fake_quantize_cpu);
    std::vector<int64_t> parts;
    std::vector<int64_t> segments;
    std::vector<int64_t> each;
    for (const auto& entry : in.entries) {
        const int64_t chunks = quantize_chunks(entry);
        each.push_back(std::max<int64_t>(
            1, kQuantizePart * std::max<int64_t>(chunks, 1) / std::max<int64_t>(entry.numel, 1)));
        parts.push_back((chunks + each.back() - 1) / each.back());
        segments.push_back(entry.numel == 0 ? 0 : segment_count(entry.layout, entry.numel));
    }
    parallel_parts(parts, 1, 2, [&](size_t i, int64_t part, int64_t, int64_t) {
        const auto& entry = in.entries[i];
        const int64_t end = std::min(quantize_chunks(entry), (part + 1) * each[i]);
        for (int64_t chunk = part * each[i]; chunk < end; ++chunk) {
            partial[entry.sums_begin + chunk] = kernels.chunk(entry, in.options, chunk);
        }
    });
    parallel_parts(segments, 256, 4, [&](size_t i, int64_t, int64_t begin, int64_t end) {
        for (int64_t segment = begin; segment < end; ++segment) {
            kernels.scale(in.entries[i], in.options, segment, partial + in.entries[i].sums_begin);
        }
    });
#else
    LaunchScope scope(out[0]);
    const Tensor tickets = zeros(out[0], {static_cast<int64_t>(in.entries.size())}, DType::Int);
    FakeQuantizeParams params{};
    params.options = in.options;
    params.sums = partial;
    launch_in_tables(
        kName, in.entries, kMaxQuantizeTensors, params,
        [](const QuantizeTensor& entry) { return quantize_backward_tiles(entry); },
        [&](FakeQuantizeParams p, size_t first) {
            p.tickets = static_cast<int32_t*>(tickets.data_ptr()) + first;
            return fake_quantize_backward_cuda(p, in.wide, scope.stream());
        });
#endif
    return out;
}

}  // namespace
}  // namespace pyvitfast

#if PVF_DEFINES_SCHEMAS
STABLE_TORCH_LIBRARY_FRAGMENT(pyvitfast, m) {
    m.def(
        "fake_quantize(Tensor[] weights, Tensor[] scales, int bits, int grid, int mask, int "
        "group_size, bool scale_gradient, ScalarType? dtype) -> Tensor[]");
    m.def(
        "fake_quantize_backward(Tensor[] grads, Tensor[] weights, Tensor[] scales, int bits, int "
        "grid, int mask, int group_size, bool scale_gradient) -> Tensor[]");
}
#endif

PVF_IMPL(m) {
    m.impl("fake_quantize", TORCH_BOX(&pyvitfast::fake_quantize));
    m.impl("fake_quantize_backward", TORCH_BOX(&pyvitfast::fake_quantize_backward));
}
