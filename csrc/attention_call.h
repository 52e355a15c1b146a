#pragma once

// What the adaptors of the attention ops share: tensors described as rows, and the passes of the
// forward and the backward on either backend.

#include "adaptor.h"
#include "attention.h"

namespace pyvitfast {

// One call: parameters filled in by the adaptor, and the kernels.
class AttentionCall {
   public:
#if PVF_CPU_KERNELS
    using Kernels = AttentionCpu;
#else
    using Kernels = AttentionCuda;
#endif

    // `parts`: the CPU backward leaves d_q in a part a tile of keys, for which one window is
    // needed.
    AttentionCall(const char* op, const Tensor& like, const Kernels& kernels, bool parts)
        : op_(op), like_(like), kernels_(kernels), parts_(parts) {
        params.type = float_type(op, like);
        wide_ = params.type == FloatType::kFloat64;
    }

    AttentionParams params{};

    DType sum_type() const { return wide_ ? DType::Double : DType::Float; }

    // The channels of a row must be neighbours; else one copy, which lives as long as the call.
    Tensor dense(const Tensor& tensor, const char* name) {
        STD_TORCH_CHECK(tensor.scalar_type() == like_.scalar_type(), op_, ": `", name,
                        "` must have the dtype of `q`");
        STD_TORCH_CHECK(tensor.is_cpu() == like_.is_cpu() &&
                            tensor.get_device_index() == like_.get_device_index(),
                        op_, ": `", name, "` must be on the device of `q`");
        const int64_t last = tensor.dim() - 1;
        if (tensor.size(last) <= 1 || tensor.stride(last) == 1) {
            return tensor;
        }
        held_.push_back(torch::stable::contiguous(tensor));
        return held_.back();
    }

    void check_shape(const Tensor& tensor, const std::vector<int64_t>& shape,
                     const char* name) const {
        bool same = tensor.dim() == static_cast<int64_t>(shape.size());
        for (size_t i = 0; same && i < shape.size(); ++i) {
            same = tensor.size(static_cast<int64_t>(i)) == shape[i];
        }
        STD_TORCH_CHECK(same, op_, ": `", name, "` has the wrong shape");
    }

    Tensor sums(const std::vector<int64_t>& shape) const { return empty(like_, shape, sum_type()); }

    // Everything that depends on the sizes alone; these must be set.
    void plan([[maybe_unused]] bool backward) {
        auto& p = params;
        STD_TORCH_CHECK(p.width > 0, op_, ": heads must have channels");
        const int64_t groups = attention_groups(p);
        const int64_t keys = most_keys(p);
#if PVF_CPU_KERNELS
        if (backward) {
            // A band of lines as tall as the windows are apart: taller bands would share out less,
            // in lower ones each window is read more often.
            p.tile_lines = std::clamp<int64_t>(p.stride[0], 1, std::max<int64_t>(p.grid[0], 1));
            p.tile_columns = p.grid[0] == 1 ? 256 : std::max<int64_t>(p.grid[1], 1);
            p.splits = tiles_along(p.grid[1], p.tile_columns) + (p.before > 0 ? 1 : 0);
            return;
        }
        constexpr int64_t kTasks = 32;
        constexpr int64_t kLeastKeys = 128;
        p.splits = std::clamp<int64_t>(tiles_along(kTasks, std::max<int64_t>(groups, 1)), 1,
                                       std::max<int64_t>(keys / kLeastKeys, 1));
#else
        STD_TORCH_CHECK(p.width <= kAttentionMostWidth, op_, ": heads must not be wider than ",
                        kAttentionMostWidth, " channels on CUDA, got ", p.width);
        p.splits = attention_cuda_splits(groups, p.queries, keys);
#endif
        p.keys_per_split = std::max<int64_t>(tiles_along(keys, p.splits), 1);
        p.splits = std::max<int64_t>(tiles_along(keys, p.keys_per_split), 1);
    }

    void forward() {
        auto& p = params;
        plan(false);
        const int64_t groups = attention_groups(p);
        if (groups * p.queries == 0) {
            return;
        }
        const int64_t rows = groups * p.splits * p.queries;
        const Tensor partial = sums({p.splits > 1 ? rows * (p.width + 2) : 0});
        p.partial = partial.data_ptr();
        p.partial_peak = static_cast<char*>(p.partial) + rows * p.width * (wide_ ? 8 : 4);
        p.partial_total = static_cast<char*>(p.partial_peak) + rows * (wide_ ? 8 : 4);
#if PVF_CPU_KERNELS
        const int64_t work = 2 * groups * p.queries * most_keys(p) * p.width;
        each(groups * p.splits, work, kernels_.forward);
        if (p.splits > 1) {
            each(groups, rows * p.width, kernels_.combine);
        }
#else
        launch(kernels_.forward, groups * p.splits * tiles_along(p.queries, kAttentionQueries));
#endif
    }

    void backward() {
        auto& p = params;
        plan(true);
        const int64_t groups = attention_groups(p);
        const Tensor delta = sums({groups * p.queries});
        p.delta = delta.data_ptr();
        const bool partial_needed = PVF_CPU_KERNELS ? parts_ : p.splits > 1;
        const Tensor partial = sums({partial_needed ? groups * p.splits * p.queries * p.width : 0});
        p.partial = partial.data_ptr();
#if PVF_CPU_KERNELS
        const int64_t work = 2 * groups * p.queries * most_keys(p) * p.width;
        each(groups, groups * p.queries * p.width, kernels_.prepare);
        each(attention_grid_tiles(p) + (p.before > 0 ? groups : 0), 3 * work, kernels_.key_slopes);
        each(groups, parts_ ? groups * p.splits * p.queries * p.width : 2 * work,
             kernels_.query_slopes);
#else
        const int64_t tiles = p.grid[0] * tiles_along(p.grid[1], kAttentionKeysBackward);
        launch(kernels_.backward,
               std::max({groups * p.splits * tiles_along(p.queries, kAttentionQueries),
                         p.batch * p.heads * tiles,
                         groups * tiles_along(p.before, kAttentionKeysBackward)}));
#endif
    }

   private:
#if PVF_CPU_KERNELS
    // Shares out the tasks, unless all of them together take less time than waking a thread.
    void each(int64_t tasks, int64_t work,
              void (*f)(const AttentionParams&, int64_t begin, int64_t end)) const {
        constexpr int64_t kWorth = 1 << 18;
        const int64_t grain = std::max<int64_t>(1, tasks * kWorth / std::max<int64_t>(work, 1) / 2);
        if (tasks > 0) {
            torch::stable::parallel_for(0, tasks, grain,
                                        [&](int64_t begin, int64_t end) { f(params, begin, end); });
        }
    }
#else
    void launch(const char* (*f)(const AttentionParams&, void* stream), int64_t blocks) const {
        if (blocks > 0) {
            check_grid(op_, blocks);
            const LaunchScope scope(like_);
            check_launch(op_, f(params, scope.stream()));
        }
    }
#endif

    const char* op_;
    Tensor like_;
    const Kernels& kernels_;
    bool parts_;
    bool wide_ = false;
    TensorList held_;
};

}  // namespace pyvitfast
