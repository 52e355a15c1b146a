// Runs one case: emulator_cases NAME [bug]. Exit status 0: right result; 1: wrong result;
// 2: EmulatorError, its message on standard error; 3: no such case. Counters go to standard output.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "emulator_kernels.h"
#include "portable/philox.h"

namespace {

using namespace pyvitfast;
using namespace pyvitfast::testing;
using device::Dim3;

std::vector<float> ramp(std::size_t n) {
    std::vector<float> x(n);
    std::iota(x.begin(), x.end(), 1.0f);
    return x;
}

std::vector<float> reversed(std::vector<float> x, std::size_t tile) {
    for (std::size_t i = 0; i < x.size(); i += tile) {
        std::reverse(x.begin() + static_cast<std::ptrdiff_t>(i),
                     x.begin() + static_cast<std::ptrdiff_t>(i + tile));
    }
    return x;
}

bool all_ones(const std::vector<float>& x) {
    return std::all_of(x.begin(), x.end(), [](float v) { return v == 1.0f; });
}

template <typename T>
bool check_gemm() {
    constexpr int m = 128, n = 64, k = 160;
    std::mt19937 generator(1);
    std::normal_distribution<float> normal;
    auto draw = [&](std::size_t count) {
        std::vector<T> x(count);
        for (T& v : x) {
            v = from_float<T>(normal(generator));
        }
        return x;
    };
    const auto a = draw(m * k), b = draw(k * n);
    std::vector<float> c(m * n);
    gemm(a.data(), b.data(), c.data(), m, n, k);
    for (int i = 0; i < m; ++i) {
        for (int j = 0; j < n; ++j) {
            double expected = 0, scale = 0;
            for (int l = 0; l < k; ++l) {
                const double product = double{to_float(a[i * k + l])} * to_float(b[l * n + j]);
                expected += product;
                scale += std::abs(product);
            }
            // A float sum of k terms errs by at most k rounding errors of the sum of magnitudes.
            if (!(std::abs(c[i * n + j] - expected) <= k * 0x1p-24 * scale)) {
                std::fprintf(stderr, "c[%d][%d] = %g, expected %g\n", i, j, c[i * n + j], expected);
                return false;
            }
        }
    }
    return true;
}

bool check_block_sums() {
    constexpr std::int64_t n = 10007;
    const auto x = ramp(n);
    std::vector<double> out(3);
    block_sums(x.data(), out.data(), 3, 96, n);
    return out[0] + out[1] + out[2] == n * (n + 1) / 2.0;
}

bool check_reduce_kinds() {
    for (const unsigned threads : {32u, 64u, 512u, 1024u}) {
        std::vector<float> x = ramp(threads), sum(threads), max(threads);
        std::vector<std::int32_t> count(threads);
        x[3] = -2.0f;
        reduce_kinds(x.data(), sum.data(), max.data(), count.data(), threads);
        const float expected = std::accumulate(x.begin(), x.end(), 0.0f);
        for (unsigned i = 0; i < threads; ++i) {
            if (sum[i] != expected || max[i] != static_cast<float>(threads) ||
                count[i] != static_cast<std::int32_t>(threads) - 1) {
                return false;
            }
        }
        x[7] = NAN;
        reduce_kinds(x.data(), sum.data(), max.data(), count.data(), threads);
        if (!std::isnan(max[0]) || !std::isnan(max[threads - 1])) {
            return false;
        }
    }
    return true;
}

bool check_votes() {
    std::vector<std::uint32_t> out(32 * 8);
    votes(out.data());
    for (std::uint32_t lane = 0; lane < 32; ++lane) {
        const std::uint32_t* row = &out[lane * 8];
        const std::uint32_t below = lane + 3 < 32 ? lane + 3 : lane;
        if (row[0] != 0xaaaaaaaau || row[1] != 5 || row[2] != below || row[3] != 70 ||
            row[4] != (lane ^ 1) || row[5] != (lane ^ 2)) {
            return false;
        }
    }
    return true;
}

bool check_transpose(bool bug) {
    constexpr std::size_t size = 64;
    // On a sector boundary, so that the counters are those of aligned tensors.
    std::vector<float> storage(2 * size * size + 16);
    float* x = storage.data();
    while (reinterpret_cast<std::uintptr_t>(x) % 32 != 0) {
        ++x;
    }
    float* out = x + size * size;
    std::iota(x, x + size * size, 0.0f);
    transpose(x, out, size, bug);
    for (std::size_t i = 0; i < size * size; ++i) {
        if (out[i] != x[i % size * size + i / size]) {
            return false;
        }
    }
    return true;
}

bool check_random_bits() {
    constexpr unsigned count = 100;
    std::vector<std::uint32_t> out(4 * count);
    random_bits(out.data(), count, 0x123456789abcdefu, 0xfedcba987654321u);
    for (unsigned i = 0; i < count; ++i) {
        const auto expected = philox(0x123456789abcdefu, 0xfedcba987654321u, i);
        if (std::memcmp(&out[4 * i], &expected, sizeof(expected)) != 0) {
            return false;
        }
    }
    return true;
}

bool check_large_shared() {
    const auto x = ramp(24000);  // 96,000 bytes
    std::vector<float> out(x.size());
    copy_large_shared(x.data(), out.data(), static_cast<int>(x.size()));
    return out == reversed(x, x.size());
}

// Copies from an address `shift` floats past a sector boundary.
bool check_copy_vectors(std::size_t shift) {
    constexpr std::size_t count = 1024;
    std::vector<float> storage(2 * count + 32, 1.0f);
    float* x = storage.data();
    while (reinterpret_cast<std::uintptr_t>(x) % 32 != 0) {
        ++x;
    }
    float* out = x + count + 8;
    std::fill(out, out + count, 0.0f);
    copy_vectors(x + shift, out, count);
    return std::all_of(out, out + count, [](float v) { return v == 1.0f; });
}

bool check_last_block(bool bug) {
    const auto x = ramp(64 * 5);
    std::vector<float> partial(5);
    float out = 0;
    std::uint32_t counter = 0;
    total_by_last_block(x.data(), partial.data(), &counter, &out, 5, bug);
    return out == 320.0f * 321.0f / 2.0f;
}

// Prints the order in which threads ran.
bool print_order() {
    std::vector<std::uint32_t> out(3 * 64);
    std::uint32_t counter = 0;
    record_order(&counter, out.data(), 3, 64);
    for (const std::uint32_t thread : out) {
        std::printf("%u ", thread);
    }
    return true;
}

bool check_reused_buffer(bool bug) {
    const auto x = ramp(256 * 6);
    std::vector<float> out(x.size());
    reused_buffer(x.data(), out.data(), 6, bug);
    return out == reversed(x, 256);
}

bool check_early_exit_shuffle(bool bug) {
    std::vector<float> out(32);
    early_exit_shuffle(out.data(), bug);
    return out[0] == 1.0f && out[31] == 30.0f;
}

bool check_global_overflow(bool bug) {
    std::vector<float> x(70, 1.0f), out(70);
    global_overflow(x.data(), out.data(), 70, bug);
    return all_ones(out);
}

// After an error the next launch works.
bool check_recovery() {
    std::vector<float> out(128);
    for (int i = 0; i < 20; ++i) {
        try {
            divergent_barrier(out.data(), true);
            return false;
        } catch (const EmulatorError&) {
        }
    }
    return check_block_sums() && check_gemm<BFloat16>();
}

// Prints the wrapped loads per second of a plain sum and of one with counting.
bool measure() {
    constexpr std::int64_t n = 4'000'000;
    const std::vector<float> x(n, 1.0f);
    double out[4];
    for (const char* count : {"0", "1"}) {
        emulator_configure("COUNT", count);
        const auto start = std::chrono::steady_clock::now();
        block_sums(x.data(), out, 4, 256, n);
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        std::printf("%.1f\n", static_cast<double>(n) / 1e6 / seconds.count());
    }
    return out[0] + out[1] + out[2] + out[3] == n;
}

std::map<std::string, std::function<bool(bool)>> cases() {
    std::map<std::string, std::function<bool(bool)>> table;
    table["block_sums"] = [](bool) { return check_block_sums(); };
    table["reduce_kinds"] = [](bool) { return check_reduce_kinds(); };
    table["votes"] = [](bool) { return check_votes(); };
    table["gemm_bfloat16"] = [](bool) { return check_gemm<BFloat16>(); };
    table["gemm_half"] = [](bool) { return check_gemm<Half>(); };
    table["transpose"] = check_transpose;
    table["random_bits"] = [](bool) { return check_random_bits(); };
    table["large_shared"] = [](bool) { return check_large_shared(); };
    table["copy_aligned"] = [](bool) { return check_copy_vectors(0); };
    table["copy_shifted"] = [](bool) { return check_copy_vectors(4); };
    table["last_block"] = check_last_block;
    table["order"] = [](bool) { return print_order(); };
    table["recovery"] = [](bool) { return check_recovery(); };
    table["measure"] = [](bool) { return measure(); };
    table["early_exit_shuffle"] = check_early_exit_shuffle;
    table["reused_buffer"] = check_reused_buffer;
    table["global_overflow"] = check_global_overflow;

    auto ones = [](void (*run)(float*, bool), std::size_t count) {
        return [=](bool bug) {
            std::vector<float> out(count);
            run(out.data(), bug);
            return all_ones(out);
        };
    };
    table["divergent_barrier"] = ones(divergent_barrier, 64);
    table["early_exit_barrier"] = ones(early_exit_barrier, 64);
    table["write_after_read"] = ones(write_after_read, 64);
    table["caller_outside_mask"] = ones(caller_outside_mask, 32);
    table["shared_overflow_raw"] = ones(shared_overflow_raw, 32);
    table["shared_overflow_wrapped"] = ones(shared_overflow_wrapped, 32);
    table["shared_underflow"] = ones(shared_underflow, 32);
    table["no_dynamic_shared"] = ones(no_dynamic_shared, 32);
    table["shuffle_outside_mask"] = [](bool bug) {
        std::vector<float> out(16);
        shuffle_outside_mask(out.data(), bug);
        return out[0] == 12.0f && out[15] == 12.0f;
    };
    table["missing_barrier"] = [](bool bug) {
        std::vector<float> out(64);
        missing_barrier(out.data(), bug);
        return out[0] == 63.0f && out[40] == 23.0f && out[63] == 0.0f;
    };
    table["missing_warp_barrier"] = [](bool bug) {
        std::vector<float> out(64);
        missing_warp_barrier(out.data(), bug);
        return out[0] == 31.0f && out[31] == 0.0f && out[63] == 32.0f;
    };

    auto with_input = [](void (*run)(const float*, float*, bool), std::size_t count,
                         std::vector<float> (*expected)(std::vector<float>)) {
        return [=](bool bug) {
            alignas(16) float x[160];
            alignas(16) float out[160];
            const auto values = ramp(count);
            std::copy(values.begin(), values.end(), x);
            run(x, out, bug);
            return std::vector<float>(out, out + count) == expected(values);
        };
    };
    auto same = [](std::vector<float> x) { return x; };
    table["missing_wait"] =
        with_input(missing_wait, 128, [](std::vector<float> x) { return reversed(x, 128); });
    table["misaligned_vector"] = with_input(misaligned_vector, 32, same);
    table["misaligned_copy"] = with_input(misaligned_copy, 32, same);
    table["not_shared"] = with_input(
        not_shared, 32, [](std::vector<float> x) { return std::vector<float>(x.size(), 1.0f); });

    table["block_race"] = [](bool bug) {
        std::uint32_t out = 0;
        block_race(&out, bug);
        return out == 4;
    };
    table["spin"] = [](bool bug) {
        std::uint32_t flags[2] = {};
        spin(flags, bug);
        return flags[0] == 1 && flags[1] == 1;
    };
    table["mixed_atomic"] = [](bool bug) {
        std::uint32_t out = 0;
        mixed_atomic(&out, bug);
        return bug || out == 3;
    };

    auto launch_case = [](Dim3 good_grid, Dim3 good_block, std::size_t good_shared, Dim3 grid,
                          Dim3 block, std::size_t shared) {
        return [=](bool bug) {
            float out = 0;
            bug ? launch_size(&out, grid, block, shared)
                : launch_size(&out, good_grid, good_block, good_shared);
            return out == 1.0f;
        };
    };
    table["threads"] = launch_case(1, 1024, 0, 1, 1025, 0);
    table["threads_product"] = launch_case(1, {32, 8, 4}, 0, 1, {32, 8, 5}, 0);
    table["block_z"] = launch_case(1, {1, 1, 64}, 0, 1, {1, 1, 65}, 0);
    table["grid_x"] = launch_case(70000, 1, 0, 0x80000000u, 1, 0);
    table["grid_y"] = launch_case({1, 65535}, 1, 0, {1, 65536}, 1, 0);
    table["grid_z"] = launch_case({1, 1, 65535}, 1, 0, {1, 1, 65536}, 1, 0);
    table["empty_grid"] = launch_case(1, 1, 0, 0, 1, 0);
    table["dynamic_shared"] = launch_case(1, 1, 49152, 1, 1, 49153);
    table["null_pointer"] = [](bool bug) {
        std::vector<float> x(32, 1.0f), out(32);
        null_pointer(bug ? nullptr : x.data(), out.data());
        return all_ones(out);
    };
    table["opt_in"] = [](bool bug) {
        std::vector<float> out(32);
        opt_in(out.data(), 100000, bug ? 100001 : 100000);
        return all_ones(out);
    };
    table["opt_in_limit"] = [](bool bug) {
        std::vector<float> out(32);
        opt_in(out.data(), bug ? 166913 : 166912, 128);
        return all_ones(out);
    };
    table["parameters"] = [](bool) {
        float out = 0;
        oversize_parameters(&out);
        return out == 1.0f;
    };
    table["static_shared"] = [](bool) {
        float out = 0;
        oversize_static_shared(&out);
        return out == 1.0f;
    };
    table["nested_launch"] = [](bool) {
        float out = 0;
        launching_kernel(&out);
        return true;
    };
    table["exception"] = [](bool) {
        std::vector<float> out(64);
        throwing_kernel(out.data());
        return true;
    };
    return table;
}

}  // namespace

int main(int argc, char** argv) {
    const auto table = cases();
    const auto found = argc > 1 ? table.find(argv[1]) : table.end();
    if (found == table.end()) {
        std::fprintf(stderr, "no such case\n");
        return 3;
    }
    try {
        const bool right = found->second(argc > 2 && std::string(argv[2]) == "bug");
        const char* count = std::getenv("PYVITFAST_EMULATOR_COUNT");
        if (count != nullptr && std::string(count) == "1") {
            std::printf("%s\n", emulator_counters_json().c_str());
        }
        return right ? 0 : 1;
    } catch (const EmulatorError& e) {
        std::fprintf(stderr, "%s\n", e.what());
        return 2;
    }
}
