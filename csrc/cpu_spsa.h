#pragma once

// Noise for the CPU kernels: many Philox blocks at once, so that the compiler can vectorise.

#include "cpu_quantizer.h"
#include "portable/spsa_noise.h"

namespace pyvitfast::PVF_CPU_CAPABILITY {

// Elements that a CPU kernel handles at once, with room for a start inside a Philox block.
constexpr int kSpsaBlock = 512;
constexpr int kSpsaNoise = kSpsaBlock + 256;

template <int kBlocks>
PVF_INLINE void philox_blocks(uint64_t seed, uint64_t first, uint32_t tensor, uint32_t direction,
                              uint32_t (&c0)[kBlocks], uint32_t (&c1)[kBlocks],
                              uint32_t (&c2)[kBlocks], uint32_t (&c3)[kBlocks]) {
    for (int i = 0; i < kBlocks; ++i) {
        const auto w = spsa::words(seed, first + static_cast<uint64_t>(i), tensor, direction);
        c0[i] = w[0];
        c1[i] = w[1];
        c2[i] = w[2];
        c3[i] = w[3];
    }
}

// Noise of at least `count` elements from element `start` on, into out[0..]. The result points to
// that of `start`.
PVF_INLINE const float* draw(Noise kind, uint64_t seed, int64_t start, int64_t count,
                             uint32_t tensor, uint32_t direction, float (&out)[kSpsaNoise]) {
    if (kind == Noise::kRademacher) {
        const int64_t base = start / 128 * 128;
        for (int64_t at = base; at < start + count; at += 128) {
            const auto w = spsa::words(seed, static_cast<uint64_t>(at) >> 7, tensor, direction);
            for (int j = 0; j < 128; ++j) {
                out[at - base + j] = spsa::rademacher(w[j >> 5], static_cast<uint32_t>(j & 31));
            }
        }
        return out + (start - base);
    }
    const int64_t base = start / 4 * 4;
    constexpr int kBlocks = 32;
    for (int64_t at = base; at < start + count; at += 4 * kBlocks) {
        uint32_t w0[kBlocks];
        uint32_t w1[kBlocks];
        uint32_t w2[kBlocks];
        uint32_t w3[kBlocks];
        philox_blocks(seed, static_cast<uint64_t>(at) >> 2, tensor, direction, w0, w1, w2, w3);
        float* to = out + (at - base);
        const auto each = [&](const auto& value) {
            for (int i = 0; i < kBlocks; ++i) {
                to[4 * i] = value(w0[i]);
                to[4 * i + 1] = value(w1[i]);
                to[4 * i + 2] = value(w2[i]);
                to[4 * i + 3] = value(w3[i]);
            }
        };
        if (kind == Noise::kUniform) {
            each([](uint32_t w) { return spsa::uniform(w); });
        } else if (kind == Noise::kTriangular) {
            each([](uint32_t w) { return spsa::triangular(w); });
        } else if (kind == Noise::kLogistic) {
            each([](uint32_t w) { return spsa::logistic(w); });
        } else {
            for (int i = 0; i < kBlocks; ++i) {
                const auto a = spsa::normal(w0[i], w1[i]);
                const auto b = spsa::normal(w2[i], w3[i]);
                to[4 * i] = a.cosine;
                to[4 * i + 1] = a.sine;
                to[4 * i + 2] = b.cosine;
                to[4 * i + 3] = b.sine;
            }
        }
    }
    return out + (start - base);
}

}  // namespace pyvitfast::PVF_CPU_CAPABILITY
