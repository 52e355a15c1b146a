#include <stdexcept>

#include "emulator_kernels.h"
#include "portable/intrinsics.h"
#include "portable/philox.h"
#include "portable/reduce.h"

namespace pyvitfast::testing {

namespace {

using namespace pyvitfast::device;

void check(LaunchStatus status) {
    if (status != kLaunchOk) {
        throw std::runtime_error(launch_error_string(status));
    }
}

template <bool Value>
struct Flag {
    static constexpr bool value = Value;
};

// Calls f with the flag as a compile-time constant.
template <typename F>
void with_flag(bool flag, F f) {
    flag ? f(Flag<true>{}) : f(Flag<false>{});
}

struct BlockSumsParams {
    const float* x;
    double* out;
    std::int64_t n;
};

PVF_KERNEL PVF_LAUNCH_BOUNDS(1024, 1) block_sums_kernel(const __grid_constant__ BlockSumsParams p) {
    double sum = 0;
    const std::int64_t step = std::int64_t{grid_dim().x} * block_dim().x;
    for (std::int64_t i = std::int64_t{block_idx().x} * block_dim().x + thread_idx().x; i < p.n;
         i += step) {
        sum += load(p.x + i);
    }
    sum = block_sum(sum);
    if (thread_idx().x == 0) {
        store(p.out + block_idx().x, sum);
    }
}

PVF_KERNEL PVF_LAUNCH_BOUNDS(1024, 1)
    reduce_kinds_kernel(const float* x, float* sum, float* max, std::int32_t* count) {
    const float value = load(x + thread_idx().x);
    const float total = block_sum(value);
    const float largest = block_max(value, -__builtin_huge_valf());
    const std::int32_t positive = block_sum(std::int32_t{value > 0});
    store(sum + thread_idx().x, total);
    store(max + thread_idx().x, largest);
    store(count + thread_idx().x, positive);
}

PVF_KERNEL PVF_LAUNCH_BOUNDS(32, 1) votes_kernel(std::uint32_t* out) {
    const unsigned lane = lane_id();
    const unsigned odd = ballot(lane % 2 == 1);
    const bool some = any(lane == 5);
    const bool none = any(lane == 32);
    const bool every = all(lane < 32);
    const bool not_every = all(lane < 31);
    const unsigned below = shuffle_down(lane, 3);
    const unsigned seventh = shuffle(lane * 10, 7);
    const std::uint64_t wide = shuffle_xor(std::uint64_t{lane} << 40, 1);
    const Half half = shuffle_xor(Half{static_cast<std::uint16_t>(lane)}, 2);
    std::uint32_t* row = out + lane * 8;
    store(row, odd);
    store(row + 1, some + 2u * none + 4u * every + 8u * not_every);
    store(row + 2, below);
    store(row + 3, seventh);
    store(row + 4, static_cast<std::uint32_t>(wide >> 40));
    store(row + 5, std::uint32_t{half.bits});
}

// 64 x 64 of C for each block of 4 warps; A is [m, k], B is [k, n], all sizes multiples of the
// tile.
constexpr int kTile = 64;
constexpr int kStep = 32;
constexpr int kPitchA = kStep + 8;  // rows 80 and 144 bytes apart: 8 rows of ldmatrix hit 32 banks
constexpr int kPitchB = kTile + 8;

template <typename T>
struct GemmParams {
    const T* a;
    const T* b;
    float* c;
    int n, k;
};

template <typename T>
PVF_DEVICE void start_tile_copy(const GemmParams<T>& p, T* a_tile, T* b_tile, int k0) {
    const int thread = static_cast<int>(thread_idx().x);
    const int row0 = static_cast<int>(block_idx().y) * kTile;
    const int column0 = static_cast<int>(block_idx().x) * kTile;
    for (int i = thread; i < kTile * kStep / 8; i += 128) {
        const int row = i / (kStep / 8), column = i % (kStep / 8) * 8;
        cp_async_16(a_tile + row * kPitchA + column,
                    p.a + std::int64_t{row0 + row} * p.k + k0 + column);
    }
    for (int i = thread; i < kStep * kTile / 8; i += 128) {
        const int row = i / (kTile / 8), column = i % (kTile / 8) * 8;
        cp_async_16(b_tile + row * kPitchB + column,
                    p.b + std::int64_t{k0 + row} * p.n + column0 + column);
    }
    cp_async_commit();
}

template <typename T>
PVF_KERNEL PVF_LAUNCH_BOUNDS(128, 2) gemm_kernel(const __grid_constant__ GemmParams<T> p) {
    PVF_SHARED(T, a_tiles, 2 * kTile * kPitchA);
    PVF_SHARED(T, b_tiles, 2 * kStep * kPitchB);
    const int lane = static_cast<int>(lane_id());
    const int warp = static_cast<int>(warp_id());
    const int warp_row = warp / 2 * 32, warp_column = warp % 2 * 32;
    float c[2][4][4] = {};
    const int steps = p.k / kStep;
    start_tile_copy(p, &a_tiles[0], &b_tiles[0], 0);
    for (int step = 0; step < steps; ++step) {
        const int next = (step + 1) % 2;
        if (step + 1 < steps) {
            start_tile_copy(p, &a_tiles[next * kTile * kPitchA], &b_tiles[next * kStep * kPitchB],
                            (step + 1) * kStep);
            cp_async_wait<1>();
        } else {
            cp_async_wait<0>();
        }
        sync_threads();
        const T* a_tile = &a_tiles[step % 2 * kTile * kPitchA];
        const T* b_tile = &b_tiles[step % 2 * kStep * kPitchB];
        PVF_UNROLL
        for (int k0 = 0; k0 < kStep; k0 += 16) {
            std::uint32_t a[2][4], b[2][4];
            PVF_UNROLL
            for (int i = 0; i < 2; ++i) {
                ldmatrix_x4(
                    a[i], a_tile + (warp_row + i * 16 + lane % 16) * kPitchA + k0 + lane / 16 * 8);
                ldmatrix_x4_trans(b[i], b_tile + (k0 + lane % 16) * kPitchB + warp_column + i * 16 +
                                            lane / 16 * 8);
            }
            PVF_UNROLL
            for (int i = 0; i < 2; ++i) {
                PVF_UNROLL
                for (int j = 0; j < 4; ++j) {
                    mma_m16n8k16<T>(c[i][j], a[i], {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]});
                }
            }
        }
        sync_threads();  // the next step overwrites this buffer
    }
    const int row0 = static_cast<int>(block_idx().y) * kTile + warp_row + lane / 4;
    const int column0 = static_cast<int>(block_idx().x) * kTile + warp_column + lane % 4 * 2;
    PVF_UNROLL
    for (int i = 0; i < 2; ++i) {
        PVF_UNROLL
        for (int j = 0; j < 4; ++j) {
            PVF_UNROLL
            for (int half = 0; half < 2; ++half) {
                const std::int64_t row = row0 + i * 16 + half * 8;
                store_vec(p.c + row * p.n + column0 + j * 8,
                          Vec<float, 2>{{c[i][j][half * 2], c[i][j][half * 2 + 1]}});
            }
        }
    }
}

// The bug is a pitch of 32 words: a column of the tile lies in one bank.
template <bool Bug>
PVF_KERNEL PVF_LAUNCH_BOUNDS(256, 2) transpose_kernel(const float* x, float* out, int size) {
    constexpr int pitch = Bug ? 32 : 33;
    PVF_SHARED(float, tile, 32 * pitch);
    const int tx = static_cast<int>(thread_idx().x), ty = static_cast<int>(thread_idx().y);
    const int x0 = static_cast<int>(block_idx().x) * 32, y0 = static_cast<int>(block_idx().y) * 32;
    for (int row = ty; row < 32; row += 8) {
        store_shared(&tile[row * pitch + tx], load(x + std::int64_t{y0 + row} * size + x0 + tx));
    }
    sync_threads();
    for (int row = ty; row < 32; row += 8) {
        store(out + std::int64_t{x0 + row} * size + y0 + tx, load_shared(&tile[tx * pitch + row]));
    }
}

PVF_KERNEL PVF_LAUNCH_BOUNDS(64, 1) random_bits_kernel(std::uint32_t* out, unsigned count,
                                                       std::uint64_t seed, std::uint64_t offset) {
    const unsigned i = block_idx().x * block_dim().x + thread_idx().x;
    if (i < count) {
        store_vec(out + 4 * std::size_t{i}, philox(seed, offset, i));
    }
}

PVF_KERNEL PVF_LAUNCH_BOUNDS(128, 1)
    copy_large_shared_kernel(const float* x, float* out, int count) {
    PVF_DYNAMIC_SHARED(float, buffer);
    const int thread = static_cast<int>(thread_idx().x);
    for (int i = thread * 4; i < count; i += 128 * 4) {
        store_shared_vec(buffer + i, load_vec_streaming<4>(x + i));
    }
    sync_threads();
    for (int i = thread; i < count; i += 128) {
        store(out + i, load_shared(buffer + count - 1 - i));
    }
}

PVF_KERNEL PVF_LAUNCH_BOUNDS(128, 1)
    copy_vectors_kernel(const float* x, float* out, unsigned count) {
    const unsigned i = (block_idx().x * block_dim().x + thread_idx().x) * 4;
    if (i < count) {
        store_vec(out + i, load_vec<4>(x + i));
    }
}

// Each block publishes its sum; the last one to arrive adds them. The bug is the missing fence.
template <bool Bug>
PVF_KERNEL PVF_LAUNCH_BOUNDS(64, 1)
    total_kernel(const float* x, float* partial, std::uint32_t* counter, float* out) {
    PVF_SHARED(std::uint32_t, is_last, 1);
    const float sum = block_sum(load(x + block_idx().x * block_dim().x + thread_idx().x));
    if (thread_idx().x == 0) {
        store(partial + block_idx().x, sum);
        if (!Bug) {
            thread_fence();
        }
        store_shared(&is_last[0], atomic_add(counter, 1u) == grid_dim().x - 1);
    }
    sync_threads();
    if (load_shared(&is_last[0]) != 0 && thread_idx().x == 0) {
        float total = 0;
        for (unsigned i = 0; i < grid_dim().x; ++i) {
            total += load(partial + i);
        }
        store(out, total);
    }
}

PVF_KERNEL PVF_LAUNCH_BOUNDS(256, 1)
    record_order_kernel(std::uint32_t* counter, std::uint32_t* out) {
    const std::uint32_t position = atomic_add(counter, 1u);
    store(out + position, block_idx().x * block_dim().x + thread_idx().x);
}

template <bool Bug>
PVF_KERNEL PVF_LAUNCH_BOUNDS(64, 1) divergent_barrier_kernel(float* out) {
    if (Bug && thread_idx().x < 40) {
        sync_threads();
    } else {
        sync_threads();
    }
    store(out + thread_idx().x, 1.0f);
}

template <bool Bug>
PVF_KERNEL PVF_LAUNCH_BOUNDS(64, 1) early_exit_barrier_kernel(float* out) {
    if (Bug && thread_idx().x >= 50) {
        return;
    }
    sync_threads();
    store(out + thread_idx().x, 1.0f);
}

template <bool Bug>
PVF_KERNEL PVF_LAUNCH_BOUNDS(32, 1) early_exit_shuffle_kernel(float* out) {
    const float value = static_cast<float>(lane_id());
    if (Bug && lane_id() >= 20) {
        return;
    }
    store(out + lane_id(), shuffle_xor(value, 1));
}

template <bool Bug>
PVF_KERNEL PVF_LAUNCH_BOUNDS(32, 1) shuffle_outside_mask_kernel(float* out) {
    const unsigned lane = lane_id();
    if (lane < 16) {
        store(out + lane, shuffle(static_cast<float>(lane), Bug ? 20 : 12, 0x0000ffffu));
    }
}

template <bool Bug>
PVF_KERNEL PVF_LAUNCH_BOUNDS(32, 1) caller_outside_mask_kernel(float* out) {
    sync_warp(Bug ? 0x7fffffffu : 0xffffffffu);
    store(out + lane_id(), 1.0f);
}

template <bool Bug>
PVF_KERNEL PVF_LAUNCH_BOUNDS(64, 1) missing_barrier_kernel(float* out) {
    PVF_SHARED(float, buffer, 64);
    const unsigned thread = thread_idx().x;
    store_shared(&buffer[thread], static_cast<float>(thread));
    if (!Bug) {
        sync_threads();
    }
    store(out + thread, load_shared(&buffer[63 - thread]));
}

template <bool Bug>
PVF_KERNEL PVF_LAUNCH_BOUNDS(64, 1) missing_warp_barrier_kernel(float* out) {
    PVF_SHARED(float, buffer, 64);
    const unsigned thread = thread_idx().x;
    store_shared(&buffer[thread], static_cast<float>(thread));
    if (!Bug) {
        sync_warp();
    }
    store(out + thread, load_shared(&buffer[thread ^ 31]));
}

template <bool Bug>
PVF_KERNEL PVF_LAUNCH_BOUNDS(32, 1) missing_wait_kernel(const float* x, float* out) {
    PVF_SHARED(float, buffer, 128);
    const unsigned lane = lane_id();
    cp_async_16(&buffer[lane * 4], x + lane * 4);
    cp_async_commit();
    if (!Bug) {
        cp_async_wait<0>();
    }
    sync_threads();
    for (unsigned i = lane; i < 128; i += 32) {
        store(out + i, load_shared(&buffer[127 - i]));
    }
}

// Each tile of 256 is reversed by way of a buffer. The bug: the copy of the next tile but one
// starts while other warps still read the buffer it goes to.
template <bool Bug>
PVF_KERNEL PVF_LAUNCH_BOUNDS(64, 1) reused_buffer_kernel(const float* x, float* out, int tiles) {
    PVF_SHARED(float, buffer, 2 * 256);
    const int thread = static_cast<int>(thread_idx().x);
    for (int tile = 0; tile < 2; ++tile) {
        cp_async_16(&buffer[tile * 256 + thread * 4], x + tile * 256 + thread * 4, tile < tiles);
        cp_async_commit();
    }
    for (int tile = 0; tile < tiles; ++tile) {
        cp_async_wait<1>();
        sync_threads();
        for (int i = thread; i < 256; i += 64) {
            store(out + tile * 256 + i, load_shared(&buffer[tile % 2 * 256 + 255 - i]));
        }
        if (!Bug) {
            sync_threads();
        }
        if (tile + 2 < tiles) {
            cp_async_16(&buffer[tile % 2 * 256 + thread * 4], x + (tile + 2) * 256 + thread * 4);
        }
        cp_async_commit();
    }
    cp_async_wait<0>();
}

template <bool Bug>
PVF_KERNEL PVF_LAUNCH_BOUNDS(32, 1) block_race_kernel(std::uint32_t* out) {
    if (thread_idx().x == 0) {
        if (Bug) {
            store(out, load(out) + 1);
        } else {
            atomic_add(out, 1u);
        }
    }
}

template <bool Bug>
PVF_KERNEL PVF_LAUNCH_BOUNDS(32, 1) mixed_atomic_kernel(std::uint32_t* out) {
    if (thread_idx().x == 0) {
        if (Bug && block_idx().x == 1) {
            store(out, 7u);
        } else {
            atomic_max(out, block_idx().x);
        }
    }
}

template <bool Bug>
PVF_KERNEL PVF_LAUNCH_BOUNDS(32, 1) shared_overflow_raw_kernel(float* out) {
    PVF_SHARED(float, buffer, 32);
    const unsigned lane = lane_id();
    // The index is not a constant, so that no compiler sees the mistake before the kernel runs.
    buffer[lane + (Bug && lane == 31 ? grid_dim().x : 0u)] = 1.0f;
    sync_threads();
    store(out + lane, lane == 31 ? 1.0f : buffer[lane]);
}

template <bool Bug>
PVF_KERNEL PVF_LAUNCH_BOUNDS(32, 1) shared_overflow_wrapped_kernel(float* out) {
    PVF_SHARED(float, buffer, 32);
    const unsigned lane = lane_id();
    store_shared(&buffer[lane], 1.0f);
    sync_threads();
    store(out + lane, load_shared(&buffer[Bug ? lane + 1 : lane]));
}

template <bool Bug>
PVF_KERNEL PVF_LAUNCH_BOUNDS(32, 1) shared_underflow_kernel(float* out) {
    PVF_DYNAMIC_SHARED(float, buffer);
    const int lane = static_cast<int>(lane_id());
    buffer[Bug ? lane - 1 : lane] = 1.0f;
    sync_threads();
    store(out + lane, lane == 31 ? 1.0f : buffer[lane]);
}

template <bool Bug>
PVF_KERNEL PVF_LAUNCH_BOUNDS(32, 1) not_shared_kernel(const float* x, float* out) {
    PVF_SHARED(float, buffer, 32);
    const unsigned lane = lane_id();
    store_shared(&buffer[lane], 1.0f);
    store(out + lane, load_shared(Bug ? x + lane : &buffer[lane]));
}

template <bool Bug>
PVF_KERNEL PVF_LAUNCH_BOUNDS(32, 1)
    global_overflow_kernel(const float* x, float* out, unsigned count) {
    const unsigned i = block_idx().x * block_dim().x + thread_idx().x;
    if (Bug ? i <= count : i < count) {
        store(out + i, load(x + i));
    }
}

template <bool Bug>
PVF_KERNEL PVF_LAUNCH_BOUNDS(8, 1) misaligned_vector_kernel(const float* x, float* out) {
    const unsigned i = thread_idx().x * 4;
    store_vec(out + i, load_vec<4>(x + i + (Bug ? 1 : 0)));
}

// The bug is a block that waits for one that need not run beside it.
template <bool Bug>
PVF_KERNEL PVF_LAUNCH_BOUNDS(32, 1) spin_kernel(std::uint32_t* flags) {
    if (thread_idx().x == 0) {
        atomic_add(flags + block_idx().x, 1u);
        while (Bug && atomic_add(flags + 1 - block_idx().x, 0u) == 0) {
        }
    }
}

// One thread reads what another reads too and then writes.
template <bool Bug>
PVF_KERNEL PVF_LAUNCH_BOUNDS(64, 1) write_after_read_kernel(float* out) {
    PVF_SHARED(float, value, 1);
    if (thread_idx().x == 0) {
        store_shared(&value[0], 1.0f);
    }
    sync_threads();
    const float read = load_shared(&value[0]);
    if (!Bug) {
        sync_threads();
    }
    if (thread_idx().x == 0) {
        store_shared(&value[0], 2.0f);
    }
    store(out + thread_idx().x, read);
}

PVF_KERNEL PVF_LAUNCH_BOUNDS(32, 1) copy_kernel(const float* x, float* out) {
    store(out + thread_idx().x, load(x + thread_idx().x));
}

template <bool Bug>
PVF_KERNEL PVF_LAUNCH_BOUNDS(8, 1) misaligned_copy_kernel(const float* x, float* out) {
    PVF_SHARED(float, buffer, 36);
    const unsigned i = thread_idx().x * 4;
    cp_async_16(&buffer[i + (Bug ? 2 : 0)], x + i);
    cp_async_commit();
    cp_async_wait<0>();
    sync_threads();
    store_vec(out + i, load_shared_vec<4>(&buffer[i]));
}

PVF_KERNEL PVF_LAUNCH_BOUNDS(32, 1) use_dynamic_shared_kernel(float* out) {
    PVF_DYNAMIC_SHARED(float, buffer);
    store_shared(buffer + thread_idx().x, 1.0f);
    store(out + thread_idx().x, load_shared(buffer + thread_idx().x));
}

PVF_KERNEL PVF_LAUNCH_BOUNDS(1024, 1) fill_kernel(float* out) {
    const Index block = block_idx();
    if (linear_thread_id() == 0 && block.x == 0 && block.y == 0 && block.z == 0) {
        store(out, 1.0f);
    }
}

PVF_KERNEL PVF_LAUNCH_BOUNDS(32, 1) opted_in_kernel(float* out) {
    PVF_DYNAMIC_SHARED(float, buffer);
    store_shared(buffer + thread_idx().x, 1.0f);
    store(out + thread_idx().x, load_shared(buffer + thread_idx().x));
}

#if defined(PYVITFAST_EMULATED)
struct OversizeParams {
    char bytes[32768];
};
PVF_KERNEL oversize_parameters_kernel(const __grid_constant__ OversizeParams, float* out) {
    store(out, 1.0f);
}

PVF_KERNEL oversize_static_shared_kernel(float* out) {
    PVF_SHARED(float, first, 8192);
    PVF_SHARED(float, second, 8192);
    store_shared(&first[0], 1.0f);
    store_shared(&second[0], load_shared(&first[0]));
    store(out, load_shared(&second[0]));
}

PVF_KERNEL launching_kernel_kernel(float* out) {
    launch(fill_kernel, Dim3(1), Dim3(1), 0, nullptr, out);
}

PVF_KERNEL throwing_kernel_kernel(float* out) {
    if (thread_idx().x == 3) {
        throw std::out_of_range("thrown on purpose");
    }
    sync_threads();
    store(out + thread_idx().x, 1.0f);
}
#endif

}  // namespace

void block_sums(const float* x, double* out, unsigned blocks, unsigned threads, std::int64_t n) {
    check(launch(block_sums_kernel, Dim3(blocks), Dim3(threads), 0, nullptr,
                 BlockSumsParams{x, out, n}));
}

void reduce_kinds(const float* x, float* sum, float* max, std::int32_t* count, unsigned threads) {
    check(launch(reduce_kinds_kernel, Dim3(1), Dim3(threads), 0, nullptr, x, sum, max, count));
}

void votes(std::uint32_t* out) { check(launch(votes_kernel, Dim3(1), Dim3(32), 0, nullptr, out)); }

template <typename T>
void gemm(const T* a, const T* b, float* c, int m, int n, int k) {
    const Dim3 grid(static_cast<unsigned>(n / kTile), static_cast<unsigned>(m / kTile));
    check(launch(gemm_kernel<T>, grid, Dim3(128), 0, nullptr, GemmParams<T>{a, b, c, n, k}));
}
template void gemm(const BFloat16*, const BFloat16*, float*, int, int, int);
template void gemm(const Half*, const Half*, float*, int, int, int);

void transpose(const float* x, float* out, int size, bool bug) {
    const Dim3 grid(static_cast<unsigned>(size / 32), static_cast<unsigned>(size / 32));
    with_flag(bug, [&](auto flag) {
        check(launch(transpose_kernel<decltype(flag)::value>, grid, Dim3(32, 8), 0, nullptr, x, out,
                     size));
    });
}

void random_bits(std::uint32_t* out, unsigned count, std::uint64_t seed, std::uint64_t offset) {
    check(launch(random_bits_kernel, Dim3((count + 63) / 64), Dim3(64), 0, nullptr, out, count,
                 seed, offset));
}

void copy_large_shared(const float* x, float* out, int count) {
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(float);
    check(allow_dynamic_shared(copy_large_shared_kernel, bytes));
    check(launch(copy_large_shared_kernel, Dim3(1), Dim3(128), bytes, nullptr, x, out, count));
}

void copy_vectors(const float* x, float* out, unsigned count) {
    check(launch(copy_vectors_kernel, Dim3((count + 511) / 512), Dim3(128), 0, nullptr, x, out,
                 count));
}

void total_by_last_block(const float* x, float* partial, std::uint32_t* counter, float* out,
                         unsigned blocks, bool bug) {
    check(memset_async(counter, 0, sizeof(*counter), nullptr));
    with_flag(bug, [&](auto flag) {
        check(launch(total_kernel<decltype(flag)::value>, Dim3(blocks), Dim3(64), 0, nullptr, x,
                     partial, counter, out));
    });
}

void record_order(std::uint32_t* counter, std::uint32_t* out, unsigned blocks, unsigned threads) {
    check(launch(record_order_kernel, Dim3(blocks), Dim3(threads), 0, nullptr, counter, out));
}

#define DEFINE_BUG_LAUNCHER(name, blocks, threads, shared)                                  \
    void name(float* out, bool bug) {                                                       \
        with_flag(bug, [&](auto flag) {                                                     \
            check(launch(name##_kernel<decltype(flag)::value>, Dim3(blocks), Dim3(threads), \
                         shared, nullptr, out));                                            \
        });                                                                                 \
    }
DEFINE_BUG_LAUNCHER(divergent_barrier, 1, 64, 0)
DEFINE_BUG_LAUNCHER(early_exit_barrier, 1, 64, 0)
DEFINE_BUG_LAUNCHER(early_exit_shuffle, 1, 32, 0)
DEFINE_BUG_LAUNCHER(shuffle_outside_mask, 1, 32, 0)
DEFINE_BUG_LAUNCHER(caller_outside_mask, 1, 32, 0)
DEFINE_BUG_LAUNCHER(missing_barrier, 1, 64, 0)
DEFINE_BUG_LAUNCHER(missing_warp_barrier, 1, 64, 0)
DEFINE_BUG_LAUNCHER(write_after_read, 1, 64, 0)
DEFINE_BUG_LAUNCHER(shared_overflow_raw, 1, 32, 0)
DEFINE_BUG_LAUNCHER(shared_overflow_wrapped, 1, 32, 0)
DEFINE_BUG_LAUNCHER(shared_underflow, 1, 32, 128)

#define DEFINE_BUG_LAUNCHER_WITH_INPUT(name, threads)                                              \
    void name(const float* x, float* out, bool bug) {                                              \
        with_flag(bug, [&](auto flag) {                                                            \
            check(launch(name##_kernel<decltype(flag)::value>, Dim3(1), Dim3(threads), 0, nullptr, \
                         x, out));                                                                 \
        });                                                                                        \
    }
DEFINE_BUG_LAUNCHER_WITH_INPUT(missing_wait, 32)
DEFINE_BUG_LAUNCHER_WITH_INPUT(not_shared, 32)
DEFINE_BUG_LAUNCHER_WITH_INPUT(misaligned_vector, 8)
DEFINE_BUG_LAUNCHER_WITH_INPUT(misaligned_copy, 8)

void reused_buffer(const float* x, float* out, int tiles, bool bug) {
    with_flag(bug, [&](auto flag) {
        check(launch(reused_buffer_kernel<decltype(flag)::value>, Dim3(1), Dim3(64), 0, nullptr, x,
                     out, tiles));
    });
}

void block_race(std::uint32_t* out, bool bug) {
    with_flag(bug, [&](auto flag) {
        check(launch(block_race_kernel<decltype(flag)::value>, Dim3(4), Dim3(32), 0, nullptr, out));
    });
}

void spin(std::uint32_t* flags, bool bug) {
    with_flag(bug, [&](auto flag) {
        check(launch(spin_kernel<decltype(flag)::value>, Dim3(2), Dim3(32), 0, nullptr, flags));
    });
}

void mixed_atomic(std::uint32_t* out, bool bug) {
    with_flag(bug, [&](auto flag) {
        check(
            launch(mixed_atomic_kernel<decltype(flag)::value>, Dim3(4), Dim3(32), 0, nullptr, out));
    });
}

void global_overflow(const float* x, float* out, unsigned count, bool bug) {
    with_flag(bug, [&](auto flag) {
        check(launch(global_overflow_kernel<decltype(flag)::value>, Dim3((count + 31) / 32),
                     Dim3(32), 0, nullptr, x, out, count));
    });
}

void null_pointer(const float* x, float* out) {
    check(launch(copy_kernel, Dim3(1), Dim3(32), 0, nullptr, x, out));
}

void no_dynamic_shared(float* out, bool bug) {
    check(launch(use_dynamic_shared_kernel, Dim3(1), Dim3(32), bug ? 0 : 128, nullptr, out));
}

void launch_size(float* out, Dim3 grid, Dim3 block, std::size_t shared) {
    check(launch(fill_kernel, grid, block, shared, nullptr, out));
}

void opt_in(float* out, std::size_t allowed, std::size_t shared) {
    check(allow_dynamic_shared(opted_in_kernel, allowed));
    check(launch(opted_in_kernel, Dim3(1), Dim3(32), shared, nullptr, out));
}

#if defined(PYVITFAST_EMULATED)
void oversize_parameters(float* out) {
    check(launch(oversize_parameters_kernel, Dim3(1), Dim3(1), 0, nullptr, OversizeParams{}, out));
}
void oversize_static_shared(float* out) {
    check(launch(oversize_static_shared_kernel, Dim3(1), Dim3(1), 0, nullptr, out));
}
void launching_kernel(float* out) {
    check(launch(launching_kernel_kernel, Dim3(1), Dim3(1), 0, nullptr, out));
}
void throwing_kernel(float* out) {
    check(launch(throwing_kernel_kernel, Dim3(1), Dim3(64), 0, nullptr, out));
}
#endif

}  // namespace pyvitfast::testing
