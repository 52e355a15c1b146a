#pragma once

#include "ops/structured_zero_/structured_zero__math.h"
#include "portable/platform.h"

namespace pyvitfast::gather {

// Entry `at` of an index that may be absent (identity), int32 or int64.
PVF_HOST_DEVICE int64_t index_at(const void* index, bool wide, int64_t at) {
    if (index == nullptr) {
        return at;
    }
    return wide ? static_cast<const int64_t*>(index)[at]
                : static_cast<int64_t>(static_cast<const int32_t*>(index)[at]);
}

// First position in a sorted index whose value is not below `value`.
PVF_HOST_DEVICE int64_t lower_bound(const int64_t* sorted, int64_t size, int64_t value) {
    int64_t low = 0;
    int64_t high = size;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (sorted[middle] < value) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

struct Span {
    int64_t begin;
    int64_t end;
};

// Output positions that read input position `value`; without an index that is itself.
PVF_HOST_DEVICE Span readers(const void* sorted, int64_t size, int64_t value) {
    if (sorted == nullptr) {
        return {value, value + 1};
    }
    const int64_t* index = static_cast<const int64_t*>(sorted);
    return {lower_bound(index, size, value), lower_bound(index, size, value + 1)};
}

PVF_HOST_DEVICE int64_t position(const int64_t* order, int64_t at) {
    return order == nullptr ? at : order[at];
}

template <typename A>
PVF_HOST_DEVICE A scale_at(const void* scale, int64_t at) {
    return scale == nullptr ? A(1) : static_cast<const A*>(scale)[at];
}

}  // namespace pyvitfast::gather
