#pragma once

// What the adaptors of the quantisation ops share: scales, options by code, and the split of work.

#include <algorithm>
#include <vector>

#include "adaptor.h"
#include "portable/quantizer.h"

namespace pyvitfast {

// The scales of a tensor of `numel` elements, read as [O, I]; `scale` is contiguous and outlives
// it.
inline ScaleLayout scale_layout(const char* op, const Tensor& tensor, const Tensor& scale,
                                int64_t group_size, DType dtype) {
    STD_TORCH_CHECK(scale.scalar_type() == dtype, op, ": scales must be ",
                    dtype == DType::Double ? "float64" : "float32", " here");
    const int64_t numel = tensor.numel();
    const int64_t rows = tensor.dim() == 0 ? 1 : tensor.size(0);
    const int64_t count = scale.numel();
    ScaleLayout layout{scale.data_ptr(), numel, numel, 0};
    if (count == 1 || numel == 0) {
        return layout;
    }
    layout.cols = numel / rows;
    layout.groups = count / rows;
    layout.group = layout.groups == 1 ? layout.cols : group_size;
    const bool fits = count == rows * layout.groups && layout.group > 0 &&
                      layout.groups == (layout.cols + layout.group - 1) / layout.group;
    STD_TORCH_CHECK(fits, op, ": a tensor of ", rows, " rows of ", layout.cols,
                    " takes 1 scale, one a row, or one for each `group_size` columns, got ", count,
                    " with group size ", group_size);
    return layout;
}

inline Grid grid_of(const char* op, int64_t grid, int64_t bits) {
    STD_TORCH_CHECK(grid >= 0 && grid <= 2 && bits >= 1 && bits <= 8, op,
                    ": grid and bits are out of range");
    return static_cast<Grid>(grid);
}

inline TensorList contiguous_all(const TensorList& tensors) {
    TensorList out;
    for (const Tensor& tensor : tensors) {
        out.push_back(torch::stable::contiguous(tensor));
    }
    return out;
}

#if PVF_CPU_KERNELS

// Parts of at most `most` elements of tensors of these sizes shared out over torch's threads:
// f(tensor, part, begin, end), at least `grain` parts a thread. Where a part ends does not depend
// on the number of threads.
template <typename F>
void parallel_parts(const std::vector<int64_t>& sizes, int64_t most, int64_t grain, const F& f) {
    std::vector<int64_t> first{0};
    for (const int64_t size : sizes) {
        first.push_back(first.back() + (size + most - 1) / most);
    }
    torch::stable::parallel_for(0, first.back(), grain, [&](int64_t begin, int64_t end) {
        size_t i = static_cast<size_t>(std::upper_bound(first.begin(), first.end(), begin) -
                                       first.begin()) -
                   1;
        for (int64_t at = begin; at < end; ++at) {
            while (at >= first[i + 1]) {
                ++i;
            }
            const int64_t part = at - first[i];
            f(i, part, part * most, std::min(sizes[i], (part + 1) * most));
        }
    });
}

#else

// Splits entries over as many launches as the parameter table needs: one, for any common model.
// `tiles` says how many blocks an entry takes; launch(params, first entry).
template <typename Params, typename Entry, typename Tiles, typename F>
void launch_in_tables(const char* op, const std::vector<Entry>& entries, size_t most, Params params,
                      const Tiles& tiles, const F& launch) {
    for (size_t first = 0; first < entries.size(); first += most) {
        const size_t last = std::min(first + most, entries.size());
        params.count = static_cast<int32_t>(last - first);
        params.tiles = 0;
        for (size_t i = first; i < last; ++i) {
            auto& entry = params.entries[i - first];
            entry = entries[i];
            entry.tile_begin = params.tiles;
            params.tiles += tiles(entry);
        }
        if (params.tiles > 0) {
            check_grid(op, params.tiles);
            check_launch(op, launch(params, first));
        }
    }
}

#endif

}  // namespace pyvitfast
