from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from pyvitfast import ops, reference
from pyvitfast.ops.adaptive_window_pool import widest_bin
from tests.ops.table import EMULATED, BadCall, OpTable, Sample, strided


def scores(x, size, count=1):
    shape = (x.shape[0], size[0] * size[1], widest_bin(x.shape[1], size[0]), widest_bin(x.shape[2], size[1]))
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return tuple(torch.randn(shape).to(wide) for _ in range(count))


def sample(shape, size, mode, maps=0):
    def make(dtype):
        x = torch.randn(shape).to(dtype)
        # Scores in the dtype of the tokens, as a network under autocast gives them.
        return (x, size, mode, *(t.to(dtype) for t in scores(x, size, maps))), {}

    return make


def bound(args, kwargs, expected, dtype):
    # Sums of a few cells in float32, rounded to the dtype.
    unit = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    return [unit * (1 + want.abs()) for want in expected]


def bad(**changes):
    def make():
        call = {
            "x": torch.ones(2, 7, 7, 3),
            "size": (3, 3),
            "mode": "learned",
            "intra": torch.ones(2, 9, 3, 3),
        }
        return (), {**call, **changes}

    return make


TABLE = OpTable(
    op="adaptive_window_pool",
    samples=[
        Sample("avg", sample((2, 7, 9, 5), (3, 4), "avg")),
        Sample("avg_vectors", sample((1, 14, 14, 8), (4, 4), "avg")),
        Sample("max", sample((2, 7, 9, 5), (3, 4), "max")),
        Sample("max_vectors", sample((1, 6, 6, 132), (3, 3), "max")),
        Sample("learned", sample((2, 7, 9, 5), (3, 4), "learned", 1)),
        Sample("learned_twice", sample((2, 8, 6, 4), (3, 3), "learned", 2)),
        Sample("one_bin", sample((1, 9, 8, 3), (1, 1), "learned", 1)),
        Sample("more_bins_than_cells", sample((2, 2, 1, 4), (3, 2), "max")),
        Sample("empty_batch", sample((0, 4, 4, 3), (2, 2), "learned", 1)),
    ],
    bad_calls=[
        BadCall("rank", ValueError, r"`x` must have shape \[B, H, W, C\]", bad(x=torch.ones(2, 7, 3))),
        BadCall("integer", TypeError, "must have dtype", bad(x=torch.ones(2, 7, 7, 3).int())),
        BadCall("size", ValueError, "`size` must be two whole numbers", bad(size=(0, 3))),
        BadCall("three", ValueError, "`size` must be two whole numbers", bad(size=(3, 3, 3))),
        BadCall("mode", ValueError, "`mode` must be one of avg, max, learned", bad(mode="median")),
        BadCall("without", ValueError, "needs `intra`", bad(intra=None)),
        BadCall("surplus", ValueError, "go with mode 'learned'", bad(mode="avg")),
        BadCall(
            "cells", ValueError, r"`intra` must have shape \[2, 9, 3, 3\]", bad(intra=torch.ones(2, 9, 3, 2))
        ),
        BadCall(
            "inter", ValueError, r"`inter` must have shape \[2, 9, 3, 3\]", bad(inter=torch.ones(9, 3, 3))
        ),
        BadCall("wide", TypeError, "float64 beside a float64", bad(intra=torch.ones(2, 9, 3, 3).double())),
        BadCall("grid", ValueError, "at least one row", bad(x=torch.ones(2, 0, 7, 3))),
    ],
    bound=bound,
    inputs=lambda args, kwargs: [t for t in args if isinstance(t, torch.Tensor)],
)


def test_map_of_sevens_by_hand():
    grid = (7 * torch.arange(7.0)[:, None] + torch.arange(7.0)).view(1, 7, 7, 1)
    avg = torch.tensor([[8.0, 10, 12], [22, 24, 26], [36, 38, 40]])
    greatest = torch.tensor([[16.0, 18, 20], [30, 32, 34], [44, 46, 48]])
    torch.testing.assert_close(ops.adaptive_window_pool(grid, (3, 3)).view(3, 3), avg)
    assert torch.equal(ops.adaptive_window_pool(grid, (3, 3), "max").view(3, 3), greatest)


def test_map_of_fourteens_by_hand():
    grid = (14 * torch.arange(14.0)[:, None] + torch.arange(14.0)).view(1, 14, 14, 1)
    avg = ops.adaptive_window_pool(grid, (4, 4)).flatten()
    greatest = ops.adaptive_window_pool(grid, (4, 4), "max").flatten()
    torch.testing.assert_close(avg[:5], torch.tensor([22.5, 25.5, 29.5, 32.5, 64.5]))
    assert greatest[:4].tolist() == [45, 48, 52, 55]
    assert greatest[-1] == 195


def test_equal_maxima_by_hand():
    grid = torch.zeros(1, 7, 7, 1)
    grid[0, 2, 2] = 1
    grid.requires_grad_()
    out = ops.adaptive_window_pool(grid, (3, 3), "max")
    assert out.view(3, 3).tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    out.sum().backward()
    expected = torch.zeros(7, 7)
    expected[2, 2] = 4
    for place in ((0, 4), (2, 4), (4, 0), (4, 2), (4, 4)):
        expected[place] = 1
    assert torch.equal(grid.grad.view(7, 7), expected)


def test_learned_window_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 2, 2, 1)
    zero = torch.zeros(1, 1, 2, 2)
    between = torch.tensor([0.0, 2.0, 0.0, 0.0]).view(1, 1, 2, 2)
    between[between > 0] = torch.tensor(2.0).log()
    between.requires_grad_()
    assert ops.adaptive_window_pool(x, (1, 1), "learned", zero).item() == pytest.approx(2.5)
    out = ops.adaptive_window_pool(x, (1, 1), "learned", zero, between)
    assert out.item() == pytest.approx(12 / 5)
    out.sum().backward()
    torch.testing.assert_close(between.grad.flatten(), torch.tensor([-0.28, -0.16, 0.12, 0.32]))


def test_constant_scores_are_the_average():
    x = torch.randn(2, 14, 10, 6)
    within, between = scores(x, (4, 3), 2)
    same = ops.adaptive_window_pool(x, (4, 3), "learned", torch.full_like(within, 3.0))
    torch.testing.assert_close(same, ops.adaptive_window_pool(x, (4, 3)), rtol=1e-5, atol=1e-6)
    opposite = ops.adaptive_window_pool(x, (4, 3), "learned", between, -between)
    torch.testing.assert_close(opposite, ops.adaptive_window_pool(x, (4, 3)), rtol=1e-5, atol=1e-6)


def test_scores_outside_a_narrow_bin_do_not_matter():
    x = torch.randn(1, 5, 5, 4)
    (within,) = scores(x, (2, 3))
    other = within.clone()
    # 5 cells in 3 bins: [0, 2), [1, 4), [3, 5).
    other[:, [0, 2, 3, 5], :, 2] = float("nan")
    within.requires_grad_()
    other.requires_grad_()
    expected = ops.adaptive_window_pool(x, (2, 3), "learned", within)
    got = ops.adaptive_window_pool(x, (2, 3), "learned", other)
    assert torch.equal(got, expected)
    got.square().sum().backward()
    assert torch.count_nonzero(other.grad[:, [0, 2, 3, 5], :, 2]) == 0


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_pooling(mode, dtype):
    x = torch.randn(3, 14, 11, 20).to(dtype).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    pool = F.adaptive_avg_pool2d if mode == "avg" else F.adaptive_max_pool2d
    got = ops.adaptive_window_pool(x, (5, 4), mode)
    want = pool(twin.permute(0, 3, 1, 2), (5, 4)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(got)
    got.backward(upstream)
    want.backward(upstream)
    if dtype == torch.float32:  # torch rounds the parts of 16-bit gradients
        torch.testing.assert_close(x.grad, twin.grad)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("mode", ["avg", "max", "learned"])
def test_nan_and_infinity_spread_as_in_the_reference(mode, value):
    x = torch.randn(2, 6, 6, 5)
    x[0, 2, 3, 1] = value
    args = scores(x, (3, 2)) if mode == "learned" else ()
    got, want = (
        f(x, (3, 2), mode, *args) for f in (ops.adaptive_window_pool, reference.adaptive_window_pool)
    )
    torch.testing.assert_close(got, want, equal_nan=True)


def test_minus_infinity_everywhere_has_its_gradient_in_the_first_cell():
    x = torch.full((1, 4, 4, 1), -torch.inf, requires_grad=True)
    out = ops.adaptive_window_pool(x, (2, 2), "max")
    assert torch.equal(out, torch.full((1, 4, 1), -torch.inf))
    out.backward(torch.ones_like(out))
    assert x.grad.view(4, 4).nonzero().tolist() == [[0, 0], [0, 2], [2, 0], [2, 2]]


def test_a_view_of_a_sequence_is_not_copied():
    sequence = torch.randn(2, 1 + 12, 8, requires_grad=True)
    grid = sequence[:, 1:].unflatten(1, (3, 4))
    out = ops.adaptive_window_pool(grid, (2, 2), "max")
    out.sum().backward()
    assert torch.count_nonzero(sequence.grad[:, 0]) == 0
    torch.testing.assert_close(out, ops.adaptive_window_pool(grid.detach().contiguous(), (2, 2), "max"))


@settings(max_examples=10 if EMULATED else 60, deadline=None)
@given(st.data())
def test_fuzz(data):
    shape = tuple(data.draw(st.integers(1, n)) for n in (3, 16, 16, 70))
    size = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    mode = data.draw(st.sampled_from(["avg", "max", "learned"]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    x = strided(torch.randn(shape).to(dtype), data.draw(st.sampled_from(["plain", "step", "offset"])))
    maps = scores(x, size, data.draw(st.integers(1, 2))) if mode == "learned" else ()
    leaves = [t.detach().requires_grad_() for t in (x, *maps)]
    twins = [t.detach().double().requires_grad_() for t in (x, *maps)]
    got = ops.adaptive_window_pool(leaves[0], size, mode, *leaves[1:])
    want = reference.adaptive_window_pool(twins[0], size, mode, *twins[1:])
    unit = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=unit, atol=unit)
    upstream = torch.randn_like(got)
    slopes = torch.autograd.grad(got, leaves, upstream)
    for slope, expected in zip(slopes, torch.autograd.grad(want, twins, upstream.double()), strict=True):
        limit = 20 * unit * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(slope.double(), expected, rtol=0, atol=limit)


def test_no_channels():
    x = torch.zeros(2, 4, 4, 0, requires_grad=True)
    for mode in ("avg", "max"):
        out = ops.adaptive_window_pool(x, (2, 2), mode)
        assert out.shape == (2, 4, 0)
        assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape
    (within,) = scores(x, (2, 2))
    within.requires_grad_()
    ops.adaptive_window_pool(x, (2, 2), "learned", within).sum().backward()
    assert torch.count_nonzero(within.grad) == 0


def test_second_derivatives_are_refused():
    x = torch.randn(1, 4, 4, 2, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(
        ops.adaptive_window_pool(x.square(), (2, 2)).square().sum(), x, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="second derivatives"):
        slope.sum().backward()


def test_bytes_of_the_kernels(counting):
    """A grid of 14 by 14 in 4 by 4 overlapping bins reads (16/14)^2 of it, through caches once."""
    x = torch.randn(2, 14, 14, 64, requires_grad=True)
    out = ops.adaptive_window_pool(x, (4, 4), "avg")
    moved = [k["bytes_moved"] for k in counting.counters().values()]
    assert sum(moved) <= 1.1 * 4 * 2 * 64 * (16 * 16 + 16)
    counting.reset_counters()
    out.backward(torch.ones_like(out))
    moved = [k["bytes_moved"] for k in counting.counters().values()]
    assert sum(moved) <= 1.1 * 4 * 2 * 64 * (16 * 16 + 14 * 14)
