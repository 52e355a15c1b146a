"""What the CUDA kernels of linear_cross_attention promise beyond the common checks, on the emulator."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyvitfast import ops, reference
from tests.ops.emulator import Emulator
from tests.ops.table import EMULATED, widened
from tests.ops.test_linear_cross_attention import call, distance, of_kernel

pytestmark = pytest.mark.skipif(not EMULATED, reason="belongs to the emulated backend")
ROOT = Path(__file__).resolve().parents[2]
NARROW = [torch.float32, torch.bfloat16, torch.float16]


def with_gradients(function, args, kwargs, size=1.0, dtype=None):
    """Result and gradients of all float inputs, for a slope rounded to ``dtype``, by default the inputs'."""
    leaves = [a.detach().clone().requires_grad_() for a in args]
    named = {k: v.detach().clone().requires_grad_() if torch.is_tensor(v) else v for k, v in kwargs.items()}
    out = function(*leaves, **named)
    torch.manual_seed(3)
    slope = (torch.randn(out.shape) * size).to(dtype or args[0].dtype)
    inputs = leaves + [v for v in named.values() if torch.is_tensor(v)]
    return [out, *torch.autograd.grad(out, inputs, slope.to(out.dtype))]


def exact_and_ours(args, kwargs, size=1.0):
    wide = widened((args, kwargs))
    want = with_gradients(reference.linear_cross_attention, *wide, size, args[0].dtype)
    return want, with_gradients(ops.linear_cross_attention, args, kwargs, size)


# 48 channels take the matrix units in 16 bits, 35 the other kernel.
@pytest.mark.parametrize("order", ["reverse", "random"])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(("channels", "heads"), [(48, 3), (35, 5)])
def test_no_race_and_no_order_of_threads_that_shows(channels, heads, dtype, order):
    args, kwargs = call(2, 70, channels, heads, dtype=dtype)
    want = with_gradients(ops.linear_cross_attention, args, kwargs)
    emulator = Emulator()
    emulator.configure("ORDER", order)
    emulator.configure("RACECHECK", "1")
    try:
        got = with_gradients(ops.linear_cross_attention, args, kwargs)
    finally:
        emulator.configure("ORDER", "")
        emulator.configure("RACECHECK", "")
    for one, other in zip(want, got, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("tokens", [0, 1, 2, 15, 16, 31, 32, 63, 64, 65, 200])
@pytest.mark.parametrize("norm", [False, True])
def test_any_number_of_tokens(tokens, norm):
    """Through the op itself: the Python function takes another way where folding does not pay."""
    args, kwargs = call(2, tokens, 32, 4, norm=norm)
    inputs = [a.detach().requires_grad_() for a in args]
    inputs += [kwargs.get(n) for n in ("q_bias", "k_bias", "v_bias", "proj_bias", "norm_weight", "norm_bias")]
    out, _ = torch.ops.pyvitfast.linear_cross_attention(*inputs, 4, 1e-6, 8**-0.5, True)
    got = [out, *torch.autograd.grad(out.sum(), inputs[:6])]
    wide_args, wide_kwargs = widened((args, kwargs))
    wide = [a.requires_grad_() for a in wide_args]
    expected = reference.linear_cross_attention(*wide, **wide_kwargs)
    want = [expected, *torch.autograd.grad(expected.sum(), wide)]
    for one, other in zip(got, want, strict=True):
        largest = other.abs().max() if other.numel() else torch.zeros(())
        assert ((one - other).abs() <= 4e-6 * largest + 1e-7).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "width"), [(1, 32), (3, 32), (7, 16), (12, 8), (16, 4), (17, 16)])
def test_gradients_in_sixteen_bits_are_no_worse_than_in_eager(heads, width, dtype):
    args, kwargs = call(2, 50, heads * width, heads, dtype=dtype)
    want, ours = exact_and_ours(args, kwargs)
    eager = with_gradients(reference.linear_cross_attention, args, kwargs)
    for one, other, exact in zip(ours, eager, want, strict=True):
        if exact.abs().max() > 1e-9:  # else the gradient of the key bias, which is zero
            assert distance(one, exact) <= distance(other, exact)


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_norm_the_only_error_is_the_rounding_of_the_results(dtype, size):
    """16-bit factors come as two halves, brought near one first: float16 has few small numbers."""
    torch.manual_seed(0)
    args, kwargs = call(2, 50, 64, 4, dtype=dtype, norm=False)
    want, ours = exact_and_ours(args, kwargs, size)
    for one, exact in zip(ours, want, strict=True):
        if exact.abs().max() > 1e-9:
            assert distance(one, exact) <= 1.02 * distance(exact.to(dtype), exact)


def test_a_token_that_is_no_number_spoils_the_gradients_of_its_image_only():
    for dtype in NARROW:
        args, kwargs = call(3, 70, 32, 4, dtype=dtype)
        args[1][1, 66, 5] = float("nan")
        _, d_query, d_tokens = with_gradients(ops.linear_cross_attention, args, kwargs)[:3]
        for gradient in (d_query, d_tokens.flatten(1)):
            assert gradient.isfinite().all(1).tolist() == [True, False, True]
        assert d_tokens[1].isnan().all()


def test_views_that_no_vector_load_can_read():
    for dtype in NARROW:
        args, kwargs = call(2, 40, 32, 4, dtype=dtype)
        odd = torch.zeros(2, 40, 33, dtype=dtype)[:, :, 1:].copy_(args[1])
        want, ours = exact_and_ours(args, kwargs)
        leaves = [a.detach().requires_grad_() for a in (args[0], odd, *args[2:])]
        assert leaves[1].data_ptr() % 16 != 0
        assert leaves[1].stride(1) == 33
        out = ops.linear_cross_attention(*leaves, **kwargs)
        torch.manual_seed(3)
        (slopes,) = torch.autograd.grad(out, leaves[1:2], torch.randn(out.shape).to(dtype))
        # Other loads share a row out to other lanes, so the last bits of its mean may differ.
        assert distance(out, want[0]) <= 1.1 * distance(ours[0], want[0]) + 1e-7
        assert distance(slopes, want[2]) <= 1.1 * distance(ours[2], want[2]) + 1e-7


def test_bytes_of_a_call_that_keeps_its_scores(counting):
    batch, tokens, channels, heads = 66, 196, 192, 3
    args, kwargs = call(batch, tokens, channels, heads, dtype=torch.bfloat16)
    ops.linear_cross_attention(args[0].requires_grad_(), *args[1:], **kwargs)
    moved = of_kernel(counting.counters(), "attend_mma_kernel")["bytes_moved"]
    least = batch * (2 * tokens * channels + 4 * (2 * heads * channels + channels + heads * (1 + tokens)))
    assert moved / least <= 1.15


def test_bytes_of_the_backward_in_sixteen_bits(counting):
    batch, tokens, channels, heads = 66, 100, 192, 3
    args, kwargs = call(batch, tokens, channels, heads, dtype=torch.bfloat16, norm=False, bias=False)
    out = ops.linear_cross_attention(*[a.detach().requires_grad_() for a in args], **kwargs)
    counting.reset_counters()
    out.sum().backward()
    moved = of_kernel(counting.counters(), "attend_backward_mma")["bytes_moved"]
    vectors = 4 * heads * channels + 2 * channels + heads * (1 + tokens)
    assert moved / (batch * (2 * 2 * tokens * channels + 4 * vectors)) <= 1.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bank_conflicts_in_either_direction(counting, dtype):
    args, kwargs = call(1, 60, 384, 6, dtype=dtype)
    with_gradients(ops.linear_cross_attention, args, kwargs)
    for name, kernel in counting.counters().items():
        if "attend" in name:
            # In float32 the dot products of two rows are stored sixteen floats apart.
            excess = 1.05 if dtype == torch.float32 else 1.0
            for access in ("shared_load", "shared_store"):
                assert kernel[access]["wavefronts"] <= excess * kernel[access]["least_wavefronts"], name


@pytest.mark.parametrize(
    ("channels", "heads", "units"), [(768, 12, True), (384, 6, True), (448, 7, True), (56, 7, False)]
)
def test_matrix_units_are_used_where_channels_come_in_sixteens(counting, channels, heads, units):
    args, kwargs = call(1, 17, channels, heads, dtype=torch.bfloat16)
    with_gradients(ops.linear_cross_attention, args, kwargs)
    names = [name for name in counting.counters() if "attend" in name]
    assert [("mma" in name) for name in names] == [units] * 2


@pytest.mark.parametrize(
    ("channels", "heads", "dtype"),
    [(768, 12, torch.float32), (108, 108, torch.float32), (384, 12, torch.float64)],
)
def test_the_widest_shapes_run(channels, heads, dtype):
    most = 20_800 if dtype == torch.float64 else 41_600
    assert 0.97 * most <= channels * (16 + 3 * heads) + 36 * heads <= most
    with_gradients(ops.linear_cross_attention, *call(1, 3, channels, heads, dtype=dtype, bias=False))


def test_wider_shapes_are_refused():
    args, kwargs = call(1, 17, 192, 64, bias=False)
    with pytest.raises(RuntimeError, match="must not exceed 41,600"):
        ops.linear_cross_attention(*args, **kwargs)


@pytest.mark.slow
def test_compiled_kernels_have_matrix_instructions_and_do_not_spill(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    report = tmp_path / "report.json"
    source = ROOT / "csrc/ops/linear_cross_attention/linear_cross_attention_cuda.cu"
    tool = [sys.executable, ROOT / "tools/gpu_static.py", source, "--arch", "90", "--json", report]
    subprocess.run(tool, check=True, capture_output=True)
    counted = {k["name"]: k["instructions"] for k in json.loads(report.read_text())}
    if None in counted.values():
        pytest.skip("no cuobjdump")
    for name, instructions in counted.items():
        assert (instructions["HMMA"] > 0) == ("mma" in name), name
        assert (instructions["LDSM"] > 0) == ("mma" in name), name
