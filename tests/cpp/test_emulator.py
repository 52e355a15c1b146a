"""The emulator: right kernels give right results in every order, and each detector fires on a
planted mistake and stays silent on the corrected kernel."""

import ctypes
import json
import os
import re
import subprocess

import pytest

RIGHT, WRONG_RESULT, EMULATOR_ERROR = 0, 1, 2

CORRECT_KERNELS = [
    "block_sums",
    "reduce_kinds",
    "votes",
    "gemm_bfloat16",
    "gemm_half",
    "transpose",
    "random_bits",
    "large_shared",
    "copy_aligned",
    "last_block",
    "reused_buffer",
]

# Case and what the message must say.
DETECTED = {
    "divergent_barrier": r"deadlock, sync_threads is not reached by all threads: "
    r"threads 0-39 wait in sync_threads at emulator_kernels\.cu:\d+; "
    r"threads 40-63 wait in sync_threads at emulator_kernels\.cu:\d+",
    "early_exit_barrier": r"threads 0-49 wait in sync_threads at emulator_kernels\.cu:\d+; "
    r"threads 50-63 have exited",
    "early_exit_shuffle": r"threads 0-19 wait in shuffle_xor at emulator_kernels\.cu:\d+ with mask "
    r"0xffffffff; threads 20-31 have exited",
    "shuffle_outside_mask": r"shuffle reads lane 20, which mask 0x0000ffff does not name",
    "caller_outside_mask": r"mask 0x7fffffff does not name the calling lane 31",
    "shared_overflow_raw": r"a write out of bounds, after the end of buffer \(128 bytes\)",
    "shared_overflow_wrapped": r"emulator_kernels\.cu:\d+, block \(0, 0, 0\), thread \(31, 0, 0\): "
    r"shared load of 4 bytes out of bounds: at byte 128 of buffer, which has 128",
    "shared_underflow": r"a write out of bounds, before the start of shared memory",
    "not_shared": r"shared load of an address that is not in shared memory",
    "misaligned_vector": r"thread \(0, 0, 0\): misaligned global load: .* not a multiple of 16",
    "misaligned_copy": r"misaligned shared store: .* not a multiple of 16",
    "null_pointer": r"global load through a null pointer",
    "no_dynamic_shared": r"uses dynamic shared memory but was launched with none",
    "spin": r"more than 50000000 atomic operations without a barrier",
    "threads": r"the block must have 1 to 1024 threads.*got \(1025, 1, 1\)",
    "threads_product": r"the block must have 1 to 1024 threads.*got \(32, 8, 5\)",
    "block_z": r"the block must .*got \(1, 1, 65\)",
    "grid_x": r"the grid must .*got \(2147483648, 1, 1\)",
    "grid_y": r"the grid must .*got \(1, 65536, 1\)",
    "grid_z": r"the grid must .*got \(1, 1, 65536\)",
    "empty_grid": r"the grid must .*got \(0, 1, 1\)",
    "dynamic_shared": r"dynamic shared memory must be at most 49152 bytes .* got 49153",
    "opt_in": r"dynamic shared memory must be at most 100000 bytes .* got 100001",
    "opt_in_limit": r"allow_dynamic_shared must be given at most 166912 bytes, got 166913",
}


def run(program, case, bug=False, sanitizer="", **settings):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYVITFAST_EMULATOR_")}
    for name, value in settings.items():
        environment["PYVITFAST_EMULATOR_" + name.upper()] = str(value)
    environment["TSAN_OPTIONS"] = "exitcode=66 halt_on_error=1"
    environment["ASAN_OPTIONS"] = "exitcode=67 detect_leaks=0"
    command = [str(program), case] + (["bug"] if bug else [])
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def expect(done, status, message=""):
    assert done.returncode == status, f"exit status {done.returncode}\n{done.stderr}"
    assert re.search(message, done.stderr), done.stderr


@pytest.fixture(scope="session")
def plain(emulator_program):
    return emulator_program("plain")


@pytest.mark.parametrize("copy", ["issue", "wait"])
@pytest.mark.parametrize("order, seed", [("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)])
@pytest.mark.parametrize("case", CORRECT_KERNELS)
def test_correct_kernel(plain, case, order, seed, copy):
    settings = {"order": order, "seed": seed, "async": copy, "racecheck": 1, "count": 1}
    expect(run(plain, case, **settings), RIGHT)


@pytest.mark.parametrize("case", DETECTED)
def test_detector(plain, case):
    for order in ["forward", "reverse", "random"]:
        expect(run(plain, case, bug=True, order=order), EMULATOR_ERROR)
        expect(run(plain, case, order=order, racecheck=1), RIGHT)
    done = run(plain, case, bug=True)
    expect(done, EMULATOR_ERROR, DETECTED[case])
    assert re.search(r"kernel \S*(\(anonymous namespace\)::)?\w+", done.stderr), done.stderr


@pytest.mark.parametrize(
    "case, message",
    [
        ("parameters", r"kernel parameters must be at most 32764 bytes, got 32776"),
        ("static_shared", r"static shared memory must be at most 49152 bytes .* got 65536"),
        ("nested_launch", r"emulator_kernels\.cu:\d+: a kernel called launch"),
        ("exception", r"the kernel threw an exception: thrown on purpose"),
    ],
)
def test_refused(plain, case, message):
    expect(run(plain, case), EMULATOR_ERROR, message)


def test_missing_barrier_gives_wrong_result(plain):
    for order in ["forward", "random"]:
        expect(run(plain, "missing_barrier", bug=True, order=order), WRONG_RESULT)
        expect(run(plain, "missing_warp_barrier", bug=True, order=order), WRONG_RESULT)
    expect(run(plain, "missing_barrier"), RIGHT)
    expect(run(plain, "missing_warp_barrier"), RIGHT)


def test_missing_wait_shows_when_copies_are_late(plain):
    expect(run(plain, "missing_wait", bug=True, **{"async": "wait"}), WRONG_RESULT)
    expect(run(plain, "missing_wait", **{"async": "wait"}), RIGHT)
    # An early copy hides the mistake: this is why both modes exist.
    expect(run(plain, "missing_wait", bug=True, **{"async": "issue"}), RIGHT)


def test_reused_buffer_shows_when_copies_are_early(plain):
    expect(run(plain, "reused_buffer", bug=True, **{"async": "issue"}), WRONG_RESULT)
    expect(run(plain, "reused_buffer", **{"async": "issue"}), RIGHT)
    expect(run(plain, "reused_buffer", bug=True, **{"async": "wait"}), RIGHT)


@pytest.mark.parametrize(
    "case, message",
    [
        (
            "missing_barrier",
            r"race on shared memory: thread \d+ (wrote|read) at emulator_kernels\.cu:\d+, this "
            r"thread (reads|writes) the same address",
        ),
        ("missing_warp_barrier", r"race on shared memory: thread \d+"),
        ("write_after_read", r"race on shared memory: thread \d+"),
        ("reused_buffer", r"race on shared memory: thread \d+"),
        (
            "block_race",
            r"race on global memory: block \d+ wrote at emulator_kernels\.cu:\d+, this block reads",
        ),
        ("mixed_atomic", r"race on global memory: .*only one of the two is atomic"),
        ("last_block", r"race on global memory: block \d+ wrote at .*, this block reads"),
    ],
)
@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_race_check(plain, case, message, order):
    expect(run(plain, case, bug=True, racecheck=1, order=order), EMULATOR_ERROR, message)
    expect(run(plain, case, racecheck=1, order=order), RIGHT)


def thread_order(program, **settings):
    done = run(program, "order", **settings)
    expect(done, RIGHT)
    return [int(word) for word in done.stdout.split()]


def test_order(plain):
    threads = list(range(3 * 64))
    assert thread_order(plain) == threads
    assert thread_order(plain, order="reverse") == threads[::-1]
    first = thread_order(plain, order="random", seed=1)
    assert first == thread_order(plain, order="random", seed=1)
    assert sorted(first) == threads and first != threads
    seeds = [thread_order(plain, order="random", seed=seed) for seed in range(8)]
    assert len({tuple(order) for order in seeds}) == len(seeds)
    assert len({tuple(t // 64 for t in order[::64]) for order in seeds}) > 1


def counters(program, case, bug=False):
    done = run(program, case, bug=bug, count=1)
    expect(done, RIGHT)
    kernels = json.loads(done.stdout)["kernels"]
    assert len(kernels) == 1
    return next(iter(kernels.values()))


def test_sectors(plain):
    aligned = counters(plain, "copy_aligned")
    assert (aligned["launches"], aligned["blocks"], aligned["threads"]) == (1, 2, 256)
    for access in ["global_load", "global_store"]:
        assert aligned[access]["requests"] == 8
        assert aligned[access]["bytes_requested"] == 4096
        assert aligned[access]["sectors"] == aligned[access]["least_sectors"] == 128
    assert aligned["bytes_moved"] == 2 * 4096
    # 512 bytes that start in the middle of a sector touch 17 of them.
    assert counters(plain, "copy_shifted")["global_load"]["sectors"] == 8 * 17
    # Every n-th load of a lane belongs to the n-th request of its warp.
    transposed = counters(plain, "transpose")
    assert transposed["global_load"]["requests"] == 64 * 64 / 32
    assert transposed["bytes_moved"] == 2 * 64 * 64 * 4


def test_wavefronts(plain):
    padded = counters(plain, "transpose")
    assert padded["shared_load"]["wavefronts"] == padded["shared_load"]["requests"] == 128
    conflicting = counters(plain, "transpose", bug=True)
    assert conflicting["shared_load"]["wavefronts"] == 32 * 128
    assert conflicting["shared_store"]["wavefronts"] == 128
    (site,) = [s for s in conflicting["sites"] if s["access"] == "shared_load"]
    assert site["file"].endswith("emulator_kernels.cu") and site["wavefronts"] == 32 * 128
    # The padding serves ldmatrix; a quarter warp of the copies into A spans two rows that overlap.
    gemm = counters(plain, "gemm_bfloat16")
    loads, stores = gemm["shared_load"], gemm["shared_store"]
    assert loads["wavefronts"] == loads["least_wavefronts"] > 0
    assert stores["wavefronts"] == 1.5 * stores["least_wavefronts"]


def test_no_counters_by_default(plain):
    done = run(plain, "block_sums")
    assert done.stdout == ""


def test_library_in_python(emulator_library):
    library = ctypes.CDLL(str(emulator_library))
    for function in [
        library.pyvitfast_emulator_configure,
        library.pyvitfast_emulator_counters_json,
        library.run_transpose,
    ]:
        function.restype = ctypes.c_char_p

    def configure(name, value):
        return library.pyvitfast_emulator_configure(name.encode(), value.encode())

    size = 64
    x = (ctypes.c_float * (size * size))(*range(size * size))
    out = (ctypes.c_float * (size * size))()
    assert configure("COUNT", "1") is None
    for _ in range(2):
        assert library.run_transpose(x, out, size) is None
    assert out[1] == size and out[size] == 1
    kernels = json.loads(library.pyvitfast_emulator_counters_json())["kernels"]
    ((name, counters),) = kernels.items()
    # The kernel has internal linkage, so its name is in the full symbol table only.
    assert name == "pyvitfast::testing::(anonymous namespace)::transpose_kernel<false>"
    assert counters["launches"] == 2
    library.pyvitfast_emulator_reset_counters()
    assert json.loads(library.pyvitfast_emulator_counters_json()) == {"kernels": {}}
    assert configure("COUNT", "") is None
    assert library.run_transpose(x, out, size) is None
    assert json.loads(library.pyvitfast_emulator_counters_json()) == {"kernels": {}}

    assert b"global load through a null pointer" in library.run_transpose(None, out, size)
    assert b"emulator setting SEED" in configure("SEED", "-1")
    assert b"there is no such setting" in configure("COLOUR", "")


def test_recovers_after_errors(plain):
    expect(run(plain, "recovery"), RIGHT)


def test_bad_setting_is_named(plain):
    done = run(plain, "block_sums", order="sideways")
    assert done.returncode != 0
    assert 'emulator setting ORDER: "sideways"' in done.stderr


@pytest.mark.parametrize("case", ["block_sums", "gemm_bfloat16", "recovery", "votes"])
def test_portable_fibers(emulator_program, case):
    expect(run(emulator_program("ucontext"), case, order="random"), RIGHT)


def test_speed(plain):
    done = run(plain, "measure")
    expect(done, RIGHT)
    silent, counting = (float(word) for word in done.stdout.split())
    # Far below what an idle machine gives, so that a busy one does not fail; a slow path taken by
    # mistake would still show.
    assert silent > 10, f"{silent} M loads/s"
    assert counting > 1, f"{counting} M loads/s while counting"


@pytest.mark.sanitize
@pytest.mark.parametrize("case", [*CORRECT_KERNELS, "recovery"])
def test_address_sanitizer_is_silent(emulator_program, case):
    expect(run(emulator_program("address"), case, order="random"), RIGHT)


@pytest.mark.sanitize
@pytest.mark.parametrize(
    "case, kind",
    [
        ("global_overflow", "heap-buffer-overflow"),
        ("shared_overflow_raw", "use-after-poison"),
        ("shared_underflow", "use-after-poison"),
    ],
)
def test_address_sanitizer_finds(emulator_program, case, kind):
    program = emulator_program("address")
    done = run(program, case, bug=True)
    expect(done, 67, kind)
    assert re.search(rf"#\d+ .*{case}_kernel.*emulator_kernels\.cu:\d+", done.stderr), done.stderr
    expect(run(program, case), RIGHT)


@pytest.mark.sanitize
@pytest.mark.parametrize("case", ["divergent_barrier", "early_exit_shuffle", "misaligned_vector"])
def test_errors_under_address_sanitizer(emulator_program, case):
    expect(run(emulator_program("address"), case, bug=True), EMULATOR_ERROR, DETECTED[case])


@pytest.mark.sanitize
@pytest.mark.parametrize("copy", ["issue", "wait"])
@pytest.mark.parametrize("case", CORRECT_KERNELS)
def test_thread_sanitizer_is_silent(emulator_program, case, copy):
    expect(run(emulator_program("thread"), case, **{"async": copy}), RIGHT)


@pytest.mark.sanitize
@pytest.mark.parametrize("case", ["missing_barrier", "missing_warp_barrier", "reused_buffer", "block_race"])
def test_thread_sanitizer_finds(emulator_program, case):
    program = emulator_program("thread")
    done = run(program, case, bug=True)
    expect(done, 66, "data race")
    assert len(re.findall(r"emulator_kernels\.cu:\d+", done.stderr)) >= 2, done.stderr
    expect(run(program, case), RIGHT)
