"""The portable headers in plain host code: 16-bit conversions, Philox, no weak symbols."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest

SOURCE = Path(__file__).with_name("portable_functions.cpp")


@pytest.fixture(scope="session")
def library(compile_cxx, tmp_path_factory):
    path = tmp_path_factory.mktemp("portable") / "portable.so"
    compile_cxx("-O3", "-shared", "-fPIC", SOURCE, "-o", path)
    return ctypes.CDLL(str(path))


def pointer(array):
    return ctypes.c_void_p(array.ctypes.data)


def apply(function, x, out_dtype):
    x = np.ascontiguousarray(x)
    out = np.empty(x.shape, out_dtype)
    function(pointer(x), pointer(out), ctypes.c_size_t(x.size))
    return out


def all_patterns():
    return np.arange(65536, dtype=np.uint16)


def assert_same(actual_bits, expected_bits, actual_nan, expected_nan):
    np.testing.assert_array_equal(actual_nan, expected_nan)
    np.testing.assert_array_equal(actual_bits[~expected_nan], expected_bits[~expected_nan])


def test_half_to_float(library):
    actual = apply(library.half_to_float, all_patterns(), np.float32)
    expected = all_patterns().view(np.float16).astype(np.float32)
    assert_same(actual.view(np.uint32), expected.view(np.uint32), np.isnan(actual), np.isnan(expected))


def test_bfloat16_to_float(library):
    torch = pytest.importorskip("torch")
    actual = apply(library.bfloat16_to_float, all_patterns(), np.float32)
    expected = torch.from_numpy(all_patterns().view(np.int16)).view(torch.bfloat16).float().numpy()
    assert_same(actual.view(np.uint32), expected.view(np.uint32), np.isnan(actual), np.isnan(expected))


def rounding_cases(widen):
    """Each 16-bit value, the midpoint to the next one, the floats beside both, and random bits."""
    values = widen(all_patterns())
    with np.errstate(over="ignore", invalid="ignore"):
        following = np.roll(values, -1)
        middle = ((values.astype(np.float64) + following) / 2).astype(np.float32)
        points = np.concatenate([values, middle])
        up = np.nextafter(points, np.float32(np.inf))
        down = np.nextafter(points, np.float32(-np.inf))
    generator = np.random.default_rng(0)
    random = generator.integers(0, 2**32, 4_000_000, dtype=np.uint32).view(np.float32)
    limits = np.array([65504, 65519.996, 65520, 65536, 3.4028235e38, np.inf, 1e-45], np.float32)
    return np.concatenate([points, up, down, random, limits, -limits]).astype(np.float32)


def test_float_to_half(library):
    x = rounding_cases(lambda p: p.view(np.float16).astype(np.float32))
    actual = apply(library.float_to_half, x, np.uint16).view(np.float16)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(np.float16)
    assert_same(actual.view(np.uint16), expected.view(np.uint16), np.isnan(actual), np.isnan(x))


def test_float_to_bfloat16(library):
    torch = pytest.importorskip("torch")
    x = rounding_cases(lambda p: (p.astype(np.uint32) << 16).view(np.float32))
    actual = apply(library.float_to_bfloat16, x, np.uint16)
    expected = torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
    is_nan = (actual & 0x7FFF) > 0x7F80
    assert_same(actual, expected, is_nan, np.isnan(x))


def test_flushed_subnormals_do_not_change_halves(library):
    torch = pytest.importorskip("torch")
    expected = all_patterns().view(np.float16).astype(np.float32)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        wide = apply(library.half_to_float, all_patterns(), np.float32)
        back = apply(library.float_to_half, wide, np.uint16)
    finally:
        torch.set_flush_denormal(False)
    assert_same(wide.view(np.uint32), expected.view(np.uint32), np.isnan(wide), np.isnan(expected))
    np.testing.assert_array_equal(back[~np.isnan(wide)], all_patterns()[~np.isnan(wide)])


def test_double_is_kept(library):
    x = np.random.default_rng(0).standard_normal(1000)
    np.testing.assert_array_equal(apply(library.keep_double, x, np.float64), x)


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        # Known answers published with Random123 (kat_vectors, philox4x32 with 10 rounds).
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(library, counter, key, expected):
    out = np.empty(4, np.uint32)
    library.philox_words(
        pointer(np.array(counter, np.uint32)), pointer(np.array(key, np.uint32)), pointer(out)
    )
    assert " ".join(f"{word:08x}" for word in out) == expected


def test_philox_layout(library):
    seed, offset, index = 0x0123456789ABCDEF, 0xFEDCBA9876543210, 0x00000001FFFFFFFF
    out = np.empty((2, 4), np.uint32)
    arguments = [ctypes.c_uint64(v) for v in (seed, offset, index)]
    library.philox_indexed(*arguments, pointer(out), ctypes.c_size_t(2))
    for i in range(2):
        words = [v >> s & 0xFFFFFFFF for v in (offset, index + i) for s in (0, 32)]
        expected = np.empty(4, np.uint32)
        library.philox_words(
            pointer(np.array(words, np.uint32)),
            pointer(np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32)),
            pointer(expected),
        )
        np.testing.assert_array_equal(out[i], expected)


def test_uniform_is_in_range(library):
    words = np.array([0, 255, 256, 2**32 - 1], np.uint32)
    uniform = apply(library.uniform_from_words, words, np.float32)
    np.testing.assert_array_equal(uniform, np.float32([2**-24, 2**-24, 2**-23, 1]))
    long_words = np.array([0, 2**32 - 1, 2**64 - 1], np.uint64)
    single, double = np.empty(3, np.float32), np.empty(3)
    library.uniform_from_long_words(pointer(long_words), pointer(single), pointer(double), ctypes.c_size_t(3))
    np.testing.assert_array_equal(single, np.float32([2**-24, 2**-24, 1]))
    assert double[0] == 2.0**-53 and double[2] == 1.0


@pytest.mark.parametrize("optimise", ["-O0", "-O2"])
def test_no_weak_symbols(compile_cxx, tmp_path, optimise):
    """An out-of-line copy could be taken from the object of another instruction set."""
    compile_cxx(optimise, "-c", SOURCE, "-o", tmp_path / "portable.o")
    done = subprocess.run(
        ["nm", "-C", str(tmp_path / "portable.o")], capture_output=True, text=True, check=True
    )
    symbols = [line for line in done.stdout.splitlines() if "pyvitfast" in line]
    assert symbols == []


@pytest.mark.parametrize("target", ["-mavx2", "-mavx512f"])
def test_conversions_are_vectorised(compile_cxx, tmp_path, target):
    done = compile_cxx("-O3", target, "-fopt-info-vec", "-c", SOURCE, "-o", tmp_path / "portable.o")
    lines = SOURCE.read_text().splitlines()
    for function in ["half_to_float", "bfloat16_to_float", "float_to_half", "float_to_bfloat16"]:
        start = next(i for i, line in enumerate(lines) if f"void {function}(" in line)
        loop = f"{SOURCE.name}:{start + 2}:"
        assert any(loop in line and "vectorized" in line for line in done.stderr.splitlines()), (
            f"{function}\n{done.stderr}"
        )
