#pragma once

// Noise for the CPU kernels: many Philox blocks at once, so that the compiler can vectorise.

#include "cpu_quantizer.h"
#include "portable/spsa_noise.h"

namespace pyvitfast::PVF_CPU_CAPABILITY {

// Elements that a CPU kernel handles at once, with room for a start inside a Philox block.
constexpr int kSpsaBlock = 512;
constexpr int kSpsaNoise = kSpsaBlock + 256;

constexpr int kPhiloxBlocks = 32;

#if defined(__AVX2__)

// 32-bit words side by side. The compiler would multiply them as 64-bit words, at twice the price.
#if defined(__AVX512F__)
using PhiloxWords = __m512i;
PVF_INLINE PhiloxWords all_words(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
PVF_INLINE PhiloxWords load_philox(const uint32_t* from) { return _mm512_loadu_si512(from); }
PVF_INLINE void store_philox(uint32_t* to, PhiloxWords x) { _mm512_storeu_si512(to, x); }
PVF_INLINE PhiloxWords xor_of(PhiloxWords a, PhiloxWords b, PhiloxWords c) {
    return _mm512_ternarylogic_epi32(a, b, c, 0x96);
}
PVF_INLINE void multiply(PhiloxWords x, PhiloxWords factor, PhiloxWords& high, PhiloxWords& low) {
    const __m512i even = _mm512_mul_epu32(x, factor);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), factor);
    high = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
    low = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
}
#else
using PhiloxWords = __m256i;
PVF_INLINE PhiloxWords all_words(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
PVF_INLINE PhiloxWords load_philox(const uint32_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
PVF_INLINE void store_philox(uint32_t* to, PhiloxWords x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x);
}
PVF_INLINE PhiloxWords xor_of(PhiloxWords a, PhiloxWords b, PhiloxWords c) {
    return _mm256_xor_si256(_mm256_xor_si256(a, b), c);
}
PVF_INLINE void multiply(PhiloxWords x, PhiloxWords factor, PhiloxWords& high, PhiloxWords& low) {
    const __m256i even = _mm256_mul_epu32(x, factor);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), factor);
    high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}
#endif

// As spsa::words for kPhiloxBlocks blocks from `first` on.
PVF_INLINE void philox_blocks(uint64_t seed, uint64_t first, uint32_t tensor, uint32_t direction,
                              uint32_t (&w0)[kPhiloxBlocks], uint32_t (&w1)[kPhiloxBlocks],
                              uint32_t (&w2)[kPhiloxBlocks], uint32_t (&w3)[kPhiloxBlocks]) {
    constexpr int kLength = sizeof(PhiloxWords) / 4;
    constexpr int kTwo = 2;  // independent chains, to hide the latency of multiplications
    for (int i = 0; i < kPhiloxBlocks; ++i) {
        const uint64_t block = first + static_cast<uint64_t>(i);
        w0[i] = static_cast<uint32_t>(block);
        w1[i] = static_cast<uint32_t>(block >> 32);
    }
    const PhiloxWords factor0 = all_words(0xD2511F53u);
    const PhiloxWords factor1 = all_words(0xCD9E8D57u);
    for (int at = 0; at < kPhiloxBlocks; at += kTwo * kLength) {
        PhiloxWords c0[kTwo];
        PhiloxWords c1[kTwo];
        PhiloxWords c2[kTwo];
        PhiloxWords c3[kTwo];
#pragma GCC unroll 2
        for (int v = 0; v < kTwo; ++v) {
            c0[v] = load_philox(w0 + at + v * kLength);
            c1[v] = load_philox(w1 + at + v * kLength);
            c2[v] = all_words(tensor);
            c3[v] = all_words(direction);
        }
        uint32_t key0 = static_cast<uint32_t>(seed);
        uint32_t key1 = static_cast<uint32_t>(seed >> 32);
        for (int round = 0; round < 10; ++round) {
            const PhiloxWords k0 = all_words(key0);
            const PhiloxWords k1 = all_words(key1);
#pragma GCC unroll 2
            for (int v = 0; v < kTwo; ++v) {
                PhiloxWords high0;
                PhiloxWords low0;
                PhiloxWords high1;
                PhiloxWords low1;
                multiply(c0[v], factor0, high0, low0);
                multiply(c2[v], factor1, high1, low1);
                c0[v] = xor_of(high1, c1[v], k0);
                c1[v] = low1;
                c2[v] = xor_of(high0, c3[v], k1);
                c3[v] = low0;
            }
            key0 += 0x9E3779B9u;
            key1 += 0xBB67AE85u;
        }
#pragma GCC unroll 2
        for (int v = 0; v < kTwo; ++v) {
            store_philox(w0 + at + v * kLength, c0[v]);
            store_philox(w1 + at + v * kLength, c1[v]);
            store_philox(w2 + at + v * kLength, c2[v]);
            store_philox(w3 + at + v * kLength, c3[v]);
        }
    }
}

#else

PVF_INLINE void philox_blocks(uint64_t seed, uint64_t first, uint32_t tensor, uint32_t direction,
                              uint32_t (&w0)[kPhiloxBlocks], uint32_t (&w1)[kPhiloxBlocks],
                              uint32_t (&w2)[kPhiloxBlocks], uint32_t (&w3)[kPhiloxBlocks]) {
    for (int i = 0; i < kPhiloxBlocks; ++i) {
        const auto w = spsa::words(seed, first + static_cast<uint64_t>(i), tensor, direction);
        w0[i] = w[0];
        w1[i] = w[1];
        w2[i] = w[2];
        w3[i] = w[3];
    }
}

#endif

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
    constexpr int kBlocks = kPhiloxBlocks;
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
