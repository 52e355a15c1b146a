from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from pyvitfast import ops, reference
from tests.ops.emulator import Emulator
from tests.ops.table import EMULATED, BadCall, OpTable, Sample, widened

INFINITY = float("inf")
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 0.0}


def call(batch, heads, queries, keys, width, before=0, bias=None, dtype=torch.float32, scale=None):
    """Keys and values as the halves of a fused projection, queries as a projection leaves them."""
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    q = draw(batch, queries, heads, width).to(dtype).transpose(1, 2)
    kv = draw(batch, keys, 2, heads, width).to(dtype)
    args = [q, kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2)]
    kwargs = {}
    if bias is not None:
        whole = (batch, heads, queries, before + keys)
        kwargs["bias"] = draw(*(size if kept else 1 for size, kept in zip(whole, bias))).to(dtype)
    if before:
        pair = draw(2, batch, heads, before, width).to(dtype)
        kwargs |= {"k_before": pair[0], "v_before": pair[1]}
    if scale is not None:
        kwargs["scale"] = scale
    return tuple(args), kwargs


def sample(*shape, **options):
    return lambda dtype: call(*shape, dtype=dtype, **options)


def bound(args, kwargs, expected, dtype):
    # Scores are sums of D products and the result of N, of relative error 2^-24 a step; 16-bit results are
    # rounded once, lse never.
    unit = 1e-13 if dtype == torch.float64 else 4e-6
    limits = []
    for index, e in enumerate(expected):
        finite = e[e.isfinite()]
        largest = finite.abs().max() if finite.numel() else torch.zeros((), dtype=torch.float64)
        rounding = ROUNDING[dtype] if index == 0 else 0.0
        limits.append(e.abs() * rounding + (largest + 1) * unit)
    return limits


def masked(dtype):
    """The first query may attend to nothing, the second to one key, the others to some."""
    args, kwargs = call(2, 2, 5, 70, 16, dtype=dtype)
    bias = torch.zeros(5, 70, dtype=dtype)
    bias[0] = -INFINITY
    bias[1, 1:] = -INFINITY
    bias[2:, ::3] = -INFINITY
    return args, kwargs | {"bias": bias}


def bad(error, match, **changes):
    def make():
        args, kwargs = call(2, 3, 4, 5, 8, before=2)
        named = dict(zip("qkv", args, strict=True)) | kwargs
        for name, change in changes.items():
            named[name] = change(named.get(name)) if callable(change) else change
        return tuple(named.pop(n) for n in "qkv"), named

    return BadCall("_".join(changes) + "_" + match.split()[-1].strip("\\[].,"), error, match, make)


TABLE = OpTable(
    op="few_query_attention",
    samples=[
        Sample("with_all", sample(2, 2, 5, 17, 16, before=3, bias=(1, 1, 1, 1))),
        Sample("one_of_each", sample(1, 1, 1, 1, 1)),
        Sample("aligned", sample(2, 3, 16, 64, 32)),
        Sample("several_splits", sample(1, 1, 3, 300, 16, before=2)),
        Sample("odd", sample(2, 3, 7, 33, 20, bias=(0, 1, 0, 1))),
        Sample("many_queries", sample(1, 1, 130, 9, 8, bias=(0, 0, 1, 0))),
        Sample("wide", sample(1, 2, 3, 10, 80)),
        Sample("own_scale", sample(2, 1, 4, 9, 8, scale=0.7)),
        Sample("no_keys_but_before", sample(1, 2, 3, 0, 8, before=2)),
        Sample("no_queries", sample(2, 2, 0, 4, 8)),
        Sample("no_entries", sample(0, 2, 3, 4, 8)),
    ],
    bad_calls=[
        bad(TypeError, "`q` must be a tensor, got list", q=[1.0]),
        bad(TypeError, "`bias` must be a tensor, got float", bias=1.0),
        bad(TypeError, "`k` must have dtype .*, got int64", k=lambda t: t.long()),
        bad(ValueError, r"`q` must have shape \[B, H, M, D\].*got \[3, 4, 8\]", q=lambda t: t[0]),
        bad(ValueError, r"`k` must have shape \[B, H, N, D\].*got \[1, 3, 5, 8\]", k=lambda t: t[:1]),
        bad(ValueError, r"`k_before` must have shape \[B, H, S, D\].*7\]", k_before=lambda t: t[..., 1:]),
        bad(ValueError, r"`v` must have shape that of `k`.*got \[2, 3, 4, 8\]", v=lambda t: t[:, :, 1:]),
        bad(ValueError, r"`v_before` must have shape that of `k_before`", v_before=lambda t: t[:, :, 1:]),
        bad(ValueError, "`k_before` and `v_before` go together", v_before=None),
        bad(ValueError, r"`bias` must broadcast to .*\[2, 3, 4, 7\], got \[5\]", bias=torch.zeros(5)),
        bad(ValueError, r"`bias` must broadcast to .*got \[1, 1, 1, 1, 7\]", bias=torch.zeros(1, 1, 1, 1, 7)),
        bad(TypeError, "`bias` must be float64 where `q` is", bias=torch.zeros(7, dtype=torch.float64)),
        bad(TypeError, "`v` must have the dtype of `q`, float32, got bfloat16", v=lambda t: t.bfloat16()),
        bad(TypeError, "`scale` must be a number, got str", scale="1"),
        bad(ValueError, r"`k` must be on the device of `q` \(cpu\), got meta", k=lambda t: t.to("meta")),
    ],
    bound=bound,
    inputs=lambda args, kwargs: [*args, *(t for t in kwargs.values() if isinstance(t, torch.Tensor))],
    # delta is made of results that are rounded to 16 bits; sums over keys, queries and entries.
    gradient_slack=8.0,
)


def exact(args, kwargs):
    wide_args, wide_kwargs = widened((args, kwargs))
    return reference.few_query_attention(*wide_args, **wide_kwargs)


def row(*values):
    return torch.tensor(values, dtype=torch.float64).view(1, 1, -1, 1)


def test_hand_worked_example():
    """q = 1, k = (0, ln 2, ln 4), v = (1, 2, 3): weights (1, 2, 4) / 7."""
    q, v = row(1.0).requires_grad_(), row(1.0, 2.0, 3.0).requires_grad_()
    k = row(0.0, math.log(2), math.log(4)).requires_grad_()
    o, lse = ops.few_query_attention(q, k, v, scale=1.0)
    close = lambda got, want: torch.testing.assert_close(got, row(*want), rtol=0, atol=1e-14)  # noqa: E731
    close(o, [17 / 7])
    assert abs(lse.item() - math.log(7)) < 1e-14
    o.sum().backward()
    close(v.grad, [1 / 7, 2 / 7, 4 / 7])
    close(k.grad, [-10 / 49, -6 / 49, 16 / 49])
    close(q.grad, [26 * math.log(2) / 49])


def test_hand_worked_split():
    """Splitting {1, 2} | {3}: keys before and keys behind meet in one softmax."""
    k, v = row(0.0, math.log(2), math.log(4)), row(1.0, 2.0, 3.0)
    first = {"k_before": k[:, :, :2], "v_before": v[:, :, :2]}
    o, lse = ops.few_query_attention(row(1.0), k[:, :, 2:], v[:, :, 2:], scale=1.0, **first)
    assert abs(o.item() - 17 / 7) < 1e-14
    assert abs(lse.item() - math.log(7)) < 1e-14


def test_keys_before_are_a_concatenation():
    args, kwargs = call(2, 3, 16, 100, 32, before=16, dtype=torch.float64)
    (q, k, v), keys = args, (kwargs["k_before"], kwargs["v_before"])
    o, lse = ops.few_query_attention(q, k, v, **kwargs)
    whole = [torch.cat([a, b], 2) for a, b in zip(keys, (k, v), strict=True)]
    want, want_lse = ops.few_query_attention(q, *whole)
    torch.testing.assert_close(o, want, rtol=0, atol=1e-14)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-14)


def test_equal_keys_give_the_mean_of_the_values():
    (q, k, v), _ = call(2, 3, 16, 50, 32, dtype=torch.float64)
    o, _ = ops.few_query_attention(q, k[:, :, :1].expand_as(k), v)
    torch.testing.assert_close(o, v.mean(2, keepdim=True).expand_as(o), rtol=0, atol=1e-14)


def test_order_of_the_keys_does_not_matter_and_that_of_the_queries_carries_over():
    (q, k, v), _ = call(2, 3, 16, 50, 32, dtype=torch.float64)
    keys, queries = torch.randperm(50), torch.randperm(16)
    o, lse = ops.few_query_attention(q, k, v)
    other, other_lse = ops.few_query_attention(q[:, :, queries], k[:, :, keys], v[:, :, keys])
    torch.testing.assert_close(other, o[:, :, queries], rtol=0, atol=1e-14)
    torch.testing.assert_close(other_lse, lse[:, :, queries], rtol=0, atol=1e-14)


def test_a_vector_added_to_all_keys_changes_lse_only():
    (q, k, v), _ = call(2, 3, 16, 50, 32, dtype=torch.float64)
    shift = torch.randn(3, 1, 32, dtype=torch.float64)
    o, lse = ops.few_query_attention(q, k, v)
    other, other_lse = ops.few_query_attention(q, k + shift, v)
    torch.testing.assert_close(other, o, rtol=0, atol=1e-13)
    torch.testing.assert_close(other_lse, lse + (q * shift).sum(3) * 32**-0.5, rtol=0, atol=1e-12)


def test_merged_heads_are_a_view():
    (q, k, v), _ = call(2, 3, 16, 50, 32)
    o, _ = ops.few_query_attention(q, k, v)
    merged = o.transpose(1, 2).reshape(2, 16, 96)
    assert merged.data_ptr() == o.data_ptr()
    assert merged.is_contiguous()


def test_agrees_with_the_built_in():
    (q, k, v), _ = call(2, 3, 36, 196, 64)
    want = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(ops.few_query_attention(q, k, v)[0], want, rtol=0, atol=1e-5)


def gradients(function, args, kwargs):
    leaves = [t.detach().clone().requires_grad_() for t in args]
    named = {n: t.detach().clone().requires_grad_() for n, t in kwargs.items()}
    o, lse = function(*leaves, **named)
    total = o.double().square().sum() + lse[lse.isfinite()].double().sum()
    return o, lse, *torch.autograd.grad(total, leaves + list(named.values()))


def test_without_keys():
    args, kwargs = call(2, 2, 3, 0, 8)
    o, lse, *slopes = gradients(ops.few_query_attention, args, kwargs)
    assert not o.any()
    assert (lse == -INFINITY).all()
    assert not slopes[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_query_that_may_attend_to_nothing(dtype):
    args, kwargs = masked(dtype)
    o, lse, d_q, d_k, d_v, d_bias = gradients(ops.few_query_attention, args, kwargs)
    assert torch.equal(o[:, :, 0], torch.zeros_like(o[:, :, 0]))
    assert (lse[:, :, 0] == -INFINITY).all()
    assert torch.equal(o[:, :, 1], args[2][:, :, 0])
    assert all(t.isfinite().all() for t in (d_q, d_k, d_v, d_bias))
    assert not d_q[:, :, 0].any()
    assert not d_bias[0].any()
    want, want_lse = exact(args, kwargs)
    limit, lse_limit = bound(args, kwargs, [want, want_lse], dtype)
    assert ((o.double() - want).abs() <= limit).all()
    assert ((lse.double() - want_lse).nan_to_num(0).abs() <= lse_limit.nan_to_num(0, 0, 0)).all()


@pytest.mark.parametrize("value", [float("nan"), INFINITY, -INFINITY])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("keys", [20, 400])
def test_non_finite_values_spread_as_in_the_reference(value, which, keys):
    args, kwargs = call(2, 2, 5, keys, 16)
    args[which][1, 1, 3, 5] = value
    got, want = ops.few_query_attention(*args, **kwargs), reference.few_query_attention(*args, **kwargs)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_large_scores_need_their_peak():
    args, kwargs = call(2, 2, 16, 300, 32, scale=30.0)
    o, lse = ops.few_query_attention(*args, **kwargs)
    want, want_lse = exact(args, kwargs)
    assert (o - want).abs().max() < 1e-3
    assert ((lse - want_lse) / want_lse).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tolerances_of_unit_normal_inputs(dtype):
    args, kwargs = call(2, 3, 16, 196, 64, before=16, bias=(0, 1, 1, 1), dtype=dtype)
    wide_args, wide_kwargs = widened((args, kwargs))
    o, lse, *slopes = gradients(ops.few_query_attention, args, kwargs)
    want, want_lse, *want_slopes = gradients(reference.few_query_attention, wide_args, wide_kwargs)
    most = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert (o - want).abs().max() <= most
    assert (lse - want_lse).abs().max() <= 1e-5
    for slope, exact_slope in zip(slopes, want_slopes, strict=True):
        error = (slope.double() - exact_slope).abs().max() / exact_slope.abs().max()
        assert error <= (5e-5 if dtype == torch.float32 else most)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.sampled_from((0, 1, 3)),
    heads=st.sampled_from((1, 2, 3)),
    queries=st.sampled_from((0, 1, 2, 9, 15, 16, 17, 49, 64, 65, 128, 129)),
    keys=st.sampled_from((0, 1, 2, 31, 32, 33, 64, 65, 127, 129, 257)),
    width=st.sampled_from((1, 3, 16, 24, 32, 48, 64, 80, 96, 128)),
    before=st.sampled_from((0, 1, 5)),
    bias=st.sampled_from((None, (0, 0, 0, 1), (1, 0, 1, 0), (1, 1, 1, 1))),
    step=st.booleans(),
    dtype=st.sampled_from(TABLE.dtypes),
)
def test_any_shape_and_stride(batch, heads, queries, keys, width, before, bias, step, dtype):
    torch.manual_seed(0)
    args, kwargs = call(batch, heads, queries, keys, width, before, bias, dtype)
    if step:
        args = tuple(torch.stack([t, t], -1).flatten(-2)[..., ::2] for t in args)
    want = exact(args, kwargs)
    for got, expected, limit in zip(
        ops.few_query_attention(*args, **kwargs), want, bound(args, kwargs, want, dtype), strict=True
    ):
        finite = expected.isfinite()
        assert torch.equal(got[~finite].double(), expected[~finite])
        assert ((got.double() - expected).abs()[finite] <= limit[finite]).all()


@settings(max_examples=25, deadline=None)
@given(
    queries=st.sampled_from((1, 9, 16, 17, 65)),
    keys=st.sampled_from((1, 31, 33, 129, 300)),
    width=st.sampled_from((1, 24, 32, 64)),
    before=st.sampled_from((0, 1, 5, 40)),
    bias=st.sampled_from((None, (0, 0, 0, 1), (1, 1, 1, 1))),
)
def test_gradients_of_any_shape(queries, keys, width, before, bias):
    torch.manual_seed(0)
    args, kwargs = call(2, 2, queries, keys, width, before, bias)
    wide = widened((args, kwargs))
    want = gradients(reference.few_query_attention, *wide)
    # With a single key slopes of scores cancel, so errors are relative to what was summed: any gradient.
    largest = max(e.abs().max() for e in want if e.numel())
    for got, expected in zip(gradients(ops.few_query_attention, args, kwargs), want, strict=True):
        assert ((got - expected).abs() <= 1e-5 * (largest + 0.1)).all()


@pytest.mark.skipif(EMULATED, reason="the CUDA kernels have a limit")
def test_wide_heads():
    args, kwargs = call(1, 1, 5, 40, 200, dtype=torch.float32)
    torch.testing.assert_close(
        ops.few_query_attention(*args)[0].double(), exact(args, kwargs)[0], rtol=0, atol=1e-5
    )


def test_autocast_brings_several_dtypes_to_its_own():
    (q, k, v), _ = call(1, 2, 3, 10, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, lse = ops.few_query_attention(q, k.bfloat16(), v.bfloat16())
    assert o.dtype == torch.bfloat16
    assert lse.dtype == torch.float32


def test_flops_are_counted():
    args, kwargs = call(2, 3, 16, 50, 8, before=6)
    with FlopCounterMode(display=False) as counter:
        ops.few_query_attention(*args, **kwargs)
    assert counter.get_total_flops() == 4 * 2 * 3 * 16 * 56 * 8


def test_views_that_no_vector_load_can_read():
    for dtype in (torch.float32, torch.bfloat16):
        (q, k, v), _ = call(1, 2, 5, 40, 32, dtype=dtype)
        odd = [torch.zeros(*t.shape[:3], 33, dtype=dtype)[..., 1:].copy_(t) for t in (q, k, v)]
        assert torch.equal(ops.few_query_attention(*odd)[0], ops.few_query_attention(q, k, v)[0])


def of_kernel(counters, name):
    return [counts for kernel, counts in counters.items() if name in kernel]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_moved(counting, dtype):
    """Sixteen queries: each key and value is read once."""
    args, kwargs = call(44, 6, 16, 196, 64, dtype=dtype)
    ops.few_query_attention(*args, **kwargs)
    (forward,) = of_kernel(counting.counters(), "attention_forward")
    least = 44 * 6 * ((2 * 196 + 2 * 16) * 64 * dtype.itemsize + 16 * 4)
    assert forward["bytes_moved"] / least <= 1.05


def test_launches_and_splits(counting):
    args, kwargs = call(1, 2, 16, 700, 64)
    gradients(ops.few_query_attention, args, kwargs)
    launches = {name: counts["launches"] for name, counts in counting.counters().items()}
    # Forward, combine; delta, keys, queries, and the sum of their splits.
    assert sum(launches.values()) == 6
    assert len(of_kernel(counting.counters(), "combine")) == 1


def test_shared_memory_is_read_without_conflicts(counting):
    for width in (24, 32, 64, 96):
        args, kwargs = call(1, 2, 16, 70, width)
        gradients(ops.few_query_attention, args, kwargs)
    for name, kernel in counting.counters().items():
        loads = kernel["shared_load"]
        assert loads["wavefronts"] <= 1.01 * loads["least_wavefronts"], name


@pytest.mark.skipif(not EMULATED, reason="belongs to the emulated backend")
@pytest.mark.parametrize("order", ["reverse", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_race_and_no_order_of_threads_that_shows(dtype, order):
    args, kwargs = call(1, 2, 20, 150, 32, before=3, bias=(1, 1, 1, 1), dtype=dtype)
    want = gradients(ops.few_query_attention, args, kwargs)
    emulator = Emulator()
    emulator.configure("ORDER", order)
    emulator.configure("RACECHECK", "1")
    try:
        got = gradients(ops.few_query_attention, args, kwargs)
    finally:
        emulator.configure("ORDER", "")
        emulator.configure("RACECHECK", "")
    for one, other in zip(want, got, strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(not EMULATED, reason="the CPU has no limit")
def test_the_widest_heads_of_the_cuda_kernels():
    for dtype in (torch.float32, torch.float64):
        args, kwargs = call(1, 1, 3, 40, 128, dtype=dtype)
        gradients(ops.few_query_attention, args, kwargs)
        args, kwargs = call(1, 1, 3, 4, 129, dtype=dtype)
        with pytest.raises(RuntimeError, match="must not be wider than 128 channels"):
            ops.few_query_attention(*args, **kwargs)
