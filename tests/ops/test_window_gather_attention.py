from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from pyvitfast import ops, reference
from tests.ops.emulator import Emulator
from tests.ops.table import EMULATED, BadCall, OpTable, Sample, widened

INFINITY = float("inf")
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 0.0}


def call(windows, queries, grid, geometry, valid=None, before=0, batch=1, heads=2, width=8, **options):
    """Keys and values as the halves of a fused projection of the grid; one number for both axes."""
    dtype = options.pop("dtype", torch.float32)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64).to(dtype)  # noqa: E731
    kv = draw(batch, *grid, 2, heads, width)
    pairs = [(part, part) if isinstance(part, int) else part for part in geometry]
    args = (draw(batch, *windows, queries, heads, width), kv[:, :, :, 0], kv[:, :, :, 1], *pairs)
    kwargs = {} if valid is None else {"valid_hw": valid}
    if before:
        pair = draw(2, batch, *windows, before, heads, width)
        kwargs |= {"k_before": pair[0], "v_before": pair[1]}
    return args, kwargs | options


def sample(*shape, **options):
    return lambda dtype: call(*shape, dtype=dtype, **options)


def bound(args, kwargs, expected, dtype):
    # As in few_query_attention: sums of D products and of as many values as there are keys.
    unit = 1e-13 if dtype == torch.float64 else 4e-6
    largest = lambda e: e.abs().max() if e.numel() else torch.zeros((), dtype=torch.float64)  # noqa: E731
    return [e.abs() * ROUNDING[dtype] + (largest(e) + 1) * unit for e in expected]


CLS, STGM1, STGM2, RECOVER = (10, 4, 0), (14, 7, -3), (21, 7, -7), (27, 3, -12)
NAMES = ("q", "k", "v", "key_window", "key_stride", "key_offset")


def bad(error, match, **changes):
    def make():
        args, kwargs = call((2, 3), 4, (5, 7), (3, 2, -1), before=2)
        named = dict(zip(NAMES, args, strict=True)) | kwargs
        for name, change in changes.items():
            named[name] = change(named.get(name)) if callable(change) else change
        return tuple(named.pop(n) for n in NAMES), named

    return BadCall("_".join(changes) + "_" + match.split()[-1].strip("\\[].,`"), error, match, make)


TABLE = OpTable(
    op="window_gather_attention",
    samples=[
        Sample("with_all", sample((2, 3), 3, (6, 9), (4, 3, -1), valid=(6, 8), before=2)),
        Sample("classification", sample((2, 2), 9, (14, 14), CLS, before=9, width=16)),
        Sample("first_of_detection", sample((2, 3), 9, (14, 21), STGM1, valid=(13, 20), before=9)),
        Sample("second_of_detection", sample((3, 2), 9, (21, 14), STGM2, heads=1)),
        Sample("recover", sample((3, 4), 5, (9, 12), RECOVER, width=20)),
        Sample("unequal_axes", sample((2, 3), 2, (5, 9), ((3, 2), (2, 4), (-2, 1)), batch=2)),
        Sample("one_window", sample((1, 1), 5, (6, 7), ((6, 7), 1, 0))),
        Sample("windows_without_keys", sample((2, 3), 2, (4, 4), (3, 4, 0), valid=(3, 4))),
        Sample("nothing_valid", sample((1, 2), 2, (4, 4), (3, 2, 0), valid=(0, 0), before=3)),
        Sample("no_queries", sample((2, 2), 0, (4, 4), (3, 2, 0), before=1)),
        Sample("no_grid", sample((2, 2), 3, (0, 4), (3, 2, 0), before=2)),
        Sample("no_entries", sample((2, 2), 2, (4, 4), (3, 2, 0), batch=0)),
        Sample("own_scale", sample((2, 2), 2, (4, 4), (3, 2, 0), scale=0.3)),
    ],
    bad_calls=[
        bad(TypeError, "`q` must be a tensor, got list", q=[1.0]),
        bad(TypeError, "`k` must have dtype .*, got int64", k=lambda t: t.long()),
        bad(ValueError, r"`q` must have shape \[B, windows down.*got \[2, 3, 4, 2, 8\]", q=lambda t: t[0]),
        bad(
            ValueError, r"`k` must have shape \[B, height.*got \[1, 5, 7, 1, 8\]", k=lambda t: t[:, :, :, :1]
        ),
        bad(ValueError, r"`v` must have shape that of `k`.*got \[1, 4, 7, 2, 8\]", v=lambda t: t[:, 1:]),
        bad(ValueError, "`k_before` and `v_before` go together", k_before=None),
        bad(ValueError, "`k_before` must have shape that of `q` but", k_before=lambda t: t[:, :1]),
        bad(ValueError, "`v_before` must have shape that of `k_before`", v_before=lambda t: t[:, :, :, 1:]),
        bad(TypeError, "`key_window` must be two whole numbers, got 3", key_window=3),
        bad(TypeError, "`key_stride` must be two whole numbers", key_stride=(1.5, 1)),
        bad(ValueError, "`key_window` must be at least 1", key_window=(0, 2)),
        bad(ValueError, "`key_stride` must be at least 1", key_stride=(1, 0)),
        bad(ValueError, "`valid_hw` must be at least 0", valid_hw=(-1, 2)),
        bad(ValueError, r"`valid_hw` must not pass the grid of \(5, 7\), got \(5, 8\)", valid_hw=(5, 8)),
        bad(TypeError, "`v` must have the dtype of `q`, float32, got float16", v=lambda t: t.half()),
        bad(ValueError, r"`k` must be on the device of `q` \(cpu\), got meta", k=lambda t: t.to("meta")),
    ],
    bound=bound,
    inputs=lambda args, kwargs: [*args[:3], *(kwargs[n] for n in ("k_before", "v_before") if n in kwargs)],
    gradient_slack=8.0,  # as in few_query_attention
)


def exact(args, kwargs):
    wide_args, wide_kwargs = widened((args, kwargs))
    return reference.window_gather_attention(*wide_args, **wide_kwargs)


def unfolded(args, kwargs):
    """Windows cut out by indices, one softmax with a mask."""
    q, k, v, window, stride, offset = args
    down, across, width = q.shape[1], q.shape[2], q.shape[5]
    valid = kwargs.get("valid_hw") or k.shape[1:3]
    lines, columns = (
        torch.arange(count)[:, None] * stride[i] + offset[i] + torch.arange(window[i])
        for i, count in enumerate((down, across))
    )
    inside = [(at >= 0) & (at < valid[i]) for i, at in enumerate((lines, columns))]
    mask = (inside[0][:, None, :, None] & inside[1][None, :, None, :]).flatten(2)  # [down, across, keys]
    at = [lines.clamp(0, k.shape[1] - 1), columns.clamp(0, k.shape[2] - 1)]
    cut = lambda t: t[:, at[0][:, None, :, None], at[1][None, :, None, :]].flatten(3, 4)  # noqa: E731
    keys, values = cut(k), cut(v)
    if "k_before" in kwargs:
        keys, values = torch.cat([kwargs["k_before"], keys], 3), torch.cat([kwargs["v_before"], values], 3)
        own = torch.ones(down, across, kwargs["k_before"].shape[3], dtype=torch.bool)
        mask = torch.cat([own, mask], 2)
    scores = torch.einsum("bxymhd,bxynhd->bxyhmn", q, keys) * width**-0.5
    weights = scores.masked_fill(~mask[None, :, :, None, None], -INFINITY).softmax(-1)
    return torch.einsum("bxyhmn,bxynhd->bxymhd", weights, values)


@pytest.mark.parametrize("before", [0, 9])
@pytest.mark.parametrize(("geometry", "queries"), [(CLS, 9), (STGM1, 9), (STGM2, 9), (RECOVER, 49)])
def test_equals_unfolding_with_a_mask(geometry, queries, before):
    stride = geometry[1]
    windows = (2, 3) if EMULATED else (4, 5)
    grid = (windows[0] * stride + 6, windows[1] * stride + 6)
    args, kwargs = call(
        windows, queries, grid, geometry, before=before, valid=(grid[0] - 2, grid[1] - 1), heads=3, width=32
    )
    want = unfolded(*widened((args, kwargs)))
    assert (ops.window_gather_attention(*args, **kwargs) - want).abs().max() < 1e-6 * 5


def test_one_window_over_the_map_is_global_attention():
    """At 224 pixels windows of 21 and 27 cover maps of 14 x 14 and 6 x 6."""
    for windows, grid, geometry in (((2, 2), (14, 14), STGM2), ((2, 2), (6, 6), RECOVER)):
        args, kwargs = call(windows, 9, grid, geometry, dtype=torch.float64)
        q, k, v = args[:3]
        flat = [t.flatten(1, 2).transpose(1, 2) for t in (k, v)]
        want, _ = ops.few_query_attention(q.flatten(1, 3).transpose(1, 2), *flat)
        got = ops.window_gather_attention(*args, **kwargs)
        torch.testing.assert_close(got.flatten(1, 3).transpose(1, 2), want, rtol=0, atol=1e-14)


def test_hand_worked_windows():
    """k = (0, ln 2, ln 4), v = (1, 2, 3); windows of two keys, the last one clipped to a single key."""
    one = torch.ones(1, 1, 2, 1, 1, 1, dtype=torch.float64)
    k = torch.tensor([0.0, math.log(2), math.log(4)], dtype=torch.float64).view(1, 1, 3, 1, 1)
    v = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).view(1, 1, 3, 1, 1).requires_grad_()
    out = ops.window_gather_attention(one, k, v, (1, 2), (1, 2), (0, 0), scale=1.0)
    want, slope = (torch.tensor(t, dtype=torch.float64) for t in ([5 / 3, 3.0], [1 / 3, 2 / 3, 1.0]))
    torch.testing.assert_close(out.flatten(), want, rtol=0, atol=1e-14)
    out.sum().backward()
    torch.testing.assert_close(v.grad.flatten(), slope, rtol=0, atol=1e-14)


def test_without_windows_keys_have_gradients_of_zero():
    args, kwargs = call((0, 2), 3, (4, 4), (3, 2, 0))
    out, *slopes = gradients(ops.window_gather_attention, args, kwargs)
    assert out.shape == args[0].shape
    assert all(slope.shape == t.shape and not slope.any() for slope, t in zip(slopes, args))


def test_windows_without_keys_give_zeros():
    args, kwargs = call((2, 3), 2, (4, 4), (3, 4, 0), valid=(3, 4))
    out, *slopes = gradients(ops.window_gather_attention, args, kwargs)
    assert out[:, 0, 0].all()
    assert not out[:, 1].any()
    assert all(slope.isfinite().all() for slope in slopes)


def test_padding_is_never_read_and_has_no_gradient():
    args, kwargs = call((2, 3), 3, (6, 9), (4, 3, -1), valid=(5, 7))
    want = ops.window_gather_attention(*args, **kwargs)
    kv = [t.clone() for t in args[1:3]]
    for t in kv:
        t[:, 5:] = float("nan")
        t[:, :, 7:] = float("nan")
        t.requires_grad_()
    out = ops.window_gather_attention(args[0], *kv, *args[3:], **kwargs)
    assert torch.equal(out, want)
    out.sum().backward()
    for t in kv:
        assert not t.grad[:, 5:].any()
        assert not t.grad[:, :, 7:].any()
        assert t.grad[:, :5, :7].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), INFINITY, -INFINITY])
@pytest.mark.parametrize("which", [1, 2])
def test_non_finite_keys_spoil_the_windows_that_read_them(value, which):
    args, kwargs = call((3, 4), 3, (9, 12), (4, 3, 0))
    args[which][0, 4, 5, 1, 3] = value
    out, want = (
        ops.window_gather_attention(*args, **kwargs),
        reference.window_gather_attention(*args, **kwargs),
    )
    assert torch.equal(out.isnan(), want.isnan())
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5, equal_nan=True)


def gradients(function, args, kwargs):
    leaves = [t.detach().clone().requires_grad_() for t in args[:3]]
    named = {n: t.detach().clone().requires_grad_() if torch.is_tensor(t) else t for n, t in kwargs.items()}
    out = function(*leaves, *args[3:], **named)
    inputs = leaves + [t for t in named.values() if torch.is_tensor(t)]
    return out, *torch.autograd.grad(out.double().square().sum(), inputs, materialize_grads=True)


@settings(max_examples=40, deadline=None)
@given(
    windows=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    grid=st.tuples(st.sampled_from((1, 4, 9)), st.sampled_from((1, 5, 12))),
    window=st.tuples(st.sampled_from((1, 3, 8, 20)), st.sampled_from((1, 2, 7, 20))),
    stride=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    offset=st.tuples(st.integers(-9, 3), st.integers(-9, 3)),
    cut=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    before=st.sampled_from((0, 1, 9)),
    queries=st.sampled_from((1, 2, 9, 17)),
    width=st.sampled_from((1, 5, 16, 33)),
)
def test_any_geometry_with_gradients(windows, grid, window, stride, offset, cut, before, queries, width):
    torch.manual_seed(0)
    valid = tuple(max(0, g - c) for g, c in zip(grid, cut, strict=True))
    args, kwargs = call(
        windows, queries, grid, (window, stride, offset), valid=valid, before=before, width=width, batch=2
    )
    wide = widened((args, kwargs))
    want = gradients(reference.window_gather_attention, *wide)
    # With a single key slopes of scores cancel, so errors are relative to what was summed: any gradient.
    largest = max(e.abs().max() for e in want if e.numel())
    for got, expected in zip(gradients(ops.window_gather_attention, args, kwargs), want, strict=True):
        assert ((got - expected).abs() <= 1e-5 * (largest + 0.1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tolerances_of_unit_normal_inputs(dtype):
    args, kwargs = call((2, 3), 9, (14, 21), STGM1, before=9, heads=3, width=32, dtype=dtype)
    got = gradients(ops.window_gather_attention, args, kwargs)
    want = gradients(reference.window_gather_attention, *widened((args, kwargs)))
    most = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert (got[0] - want[0]).abs().max() <= most
    for slope, exact_slope in zip(got[1:], want[1:], strict=True):
        error = (slope.double() - exact_slope).abs().max() / exact_slope.abs().max()
        assert error <= (5e-5 if dtype == torch.float32 else most)


def test_a_larger_grid_costs_the_forward_its_lines_only():
    """Memory: nothing of the size of the unfolded windows; here those would be 81 times the grid."""
    if EMULATED:
        pytest.skip("sizes are large for the emulator")
    args, kwargs = call((8, 12), 9, (24, 36), RECOVER, heads=3, width=32)
    with torch.profiler.profile(profile_memory=True) as profiled:
        ops.window_gather_attention(*args, **kwargs)
    made = sum(e.self_cpu_memory_usage for e in profiled.key_averages() if e.self_cpu_memory_usage > 0)
    assert made <= 1.2 * args[0].nbytes


def test_flops_count_the_keys_that_are_read():
    args, kwargs = call((2, 3), 9, (14, 21), STGM1, valid=(13, 20), before=4, heads=2, width=8)
    with FlopCounterMode(display=False) as counter:
        ops.window_gather_attention(*args, **kwargs)
    lines, columns = 11 + 9, 11 + 14 + 9
    assert counter.get_total_flops() == 4 * 2 * 9 * 8 * (lines * columns + 6 * 4)


def test_each_window_is_read_where_it_lies(counting):
    args, kwargs = call((2, 3), 9, (14, 21), STGM1, heads=1, width=32)
    ops.window_gather_attention(*args, **kwargs)
    moved = sum(c["bytes_moved"] for n, c in counting.counters().items() if "attention_forward" in n)
    keys = (11 + 10) * (11 + 14 + 10)
    # Each of three splits of a window reads its queries and leaves sums, a peak and a total.
    assert moved <= 1.05 * 4 * (2 * keys * 32 + 3 * 6 * 9 * (2 * 32 + 2))


@pytest.mark.skipif(not EMULATED, reason="belongs to the emulated backend")
@pytest.mark.parametrize("order", ["reverse", "random"])
def test_no_race_and_no_order_of_threads_that_shows(order):
    args, kwargs = call((2, 2), 9, (9, 9), (6, 3, -1), before=3, width=16)
    want = gradients(ops.window_gather_attention, args, kwargs)
    emulator = Emulator()
    emulator.configure("ORDER", order)
    emulator.configure("RACECHECK", "1")
    try:
        got = gradients(ops.window_gather_attention, args, kwargs)
    finally:
        emulator.configure("ORDER", "")
        emulator.configure("RACECHECK", "")
    for one, other in zip(want, got, strict=True):
        assert torch.equal(one, other)
