// Array versions of the functions that CPU kernels take from the portable headers.
#include "portable/philox.h"
#include "portable/vec.h"

using pyvitfast::BFloat16;
using pyvitfast::from_float;
using pyvitfast::Half;
using pyvitfast::to_float;
using pyvitfast::Vec;

extern "C" {

void half_to_float(const Half* x, float* out, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) {
        out[i] = to_float(x[i]);
    }
}

void bfloat16_to_float(const BFloat16* x, float* out, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) {
        out[i] = to_float(x[i]);
    }
}

void float_to_half(const float* x, Half* out, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) {
        out[i] = from_float<Half>(x[i]);
    }
}

void float_to_bfloat16(const float* x, BFloat16* out, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) {
        out[i] = from_float<BFloat16>(x[i]);
    }
}

void keep_double(const double* x, double* out, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) {
        out[i] = from_float<double>(to_float(x[i]));
    }
}

void philox_words(const std::uint32_t* counter, const std::uint32_t* key, std::uint32_t* out) {
    const auto words = pyvitfast::philox4x32_10({{counter[0], counter[1], counter[2], counter[3]}},
                                                {{key[0], key[1]}});
    for (int i = 0; i < 4; ++i) {
        out[i] = words[i];
    }
}

void philox_indexed(std::uint64_t seed, std::uint64_t offset, std::uint64_t first,
                    std::uint32_t* out, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) {
        const auto words = pyvitfast::philox(seed, offset, first + i);
        for (int j = 0; j < 4; ++j) {
            out[4 * i + static_cast<std::size_t>(j)] = words[j];
        }
    }
}

void uniform_from_words(const std::uint32_t* x, float* out, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) {
        out[i] = pyvitfast::uniform_float(x[i]);
    }
}

void uniform_from_long_words(const std::uint64_t* x, float* out, double* out_double,
                             std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) {
        out[i] = pyvitfast::uniform_float(x[i]);
        out_double[i] = pyvitfast::uniform_double(x[i]);
    }
}

}  // extern "C"
