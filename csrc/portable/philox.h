// Philox4x32-10, the counter-based generator of Salmon et al. (SC 2011): the same bits on CPU, GPU
// and emulator, and random access by index.
#pragma once

#include "portable/vec.h"

namespace pyvitfast {

PVF_HOST_DEVICE Vec<std::uint32_t, 4> philox4x32_10(Vec<std::uint32_t, 4> counter,
                                                    Vec<std::uint32_t, 2> key) {
    PVF_UNROLL
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t product0 = std::uint64_t{0xD2511F53u} * counter[0];
        const std::uint64_t product1 = std::uint64_t{0xCD9E8D57u} * counter[2];
        counter = {{static_cast<std::uint32_t>(product1 >> 32) ^ counter[1] ^ key[0],
                    static_cast<std::uint32_t>(product1),
                    static_cast<std::uint32_t>(product0 >> 32) ^ counter[3] ^ key[1],
                    static_cast<std::uint32_t>(product0)}};
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    return counter;
}

// Four random words for (seed, offset, index). Counter words are offset low, offset high, index
// low, index high and the key is seed low, seed high; `index` is what curand calls the subsequence.
PVF_HOST_DEVICE Vec<std::uint32_t, 4> philox(std::uint64_t seed, std::uint64_t offset,
                                             std::uint64_t index) {
    return philox4x32_10(
        {{static_cast<std::uint32_t>(offset), static_cast<std::uint32_t>(offset >> 32),
          static_cast<std::uint32_t>(index), static_cast<std::uint32_t>(index >> 32)}},
        {{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)}});
}

// Uniform in (0, 1], a multiple of 2^-24 and so exact in float; never 0, so a logarithm is finite.
PVF_HOST_DEVICE float uniform_float(std::uint32_t random) {
    return static_cast<float>((random >> 8) + 1u) * 0x1p-24f;
}
PVF_HOST_DEVICE float uniform_float(std::uint64_t random) {
    return uniform_float(static_cast<std::uint32_t>(random >> 32));
}

// Uniform in (0, 1], a multiple of 2^-53.
PVF_HOST_DEVICE double uniform_double(std::uint64_t random) {
    return static_cast<double>((random >> 11) + 1u) * 0x1p-53;
}

}  // namespace pyvitfast
