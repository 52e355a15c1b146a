// One launch for many tensors: their tiles follow one another in the grid.
#pragma once

#include "portable/device.h"

namespace pyvitfast::device {

// The entry a tile belongs to: the last whose `tile_begin` is not past it.
template <typename Entry>
PVF_DEVICE const Entry& entry_of_tile(const Entry* entries, int count, int64_t tile) {
    int low = 0;
    int high = count - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (entries[middle].tile_begin <= tile) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return entries[low];
}

}  // namespace pyvitfast::device
