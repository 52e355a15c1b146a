from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvitfast import ops, reference
from tests.ops.quantizer import scale_like
from tests.ops.table import LAYOUTS, SIZES, BadCall, OpTable, Sample, strided


def sample(shapes, granularity="tensor", group=0):
    def make(dtype):
        grads = [torch.randn(s).to(dtype) for s in shapes]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return (grads, [scale_like(g, granularity, group).to(wide) for g in grads]), {"group_size": group}

    return make


def bad(grads, scales, **kwargs):
    return lambda: ((grads, scales), kwargs)


ONE = torch.ones(())
TABLE = OpTable(
    op="scaled_sqnorm",
    samples=[
        Sample("hand", lambda dtype: (([torch.tensor([3.0, 0, -4, 0])], [torch.tensor(0.25)]), {})),
        Sample("chunks", sample([(1023,), (1024,), (1025,), (3, 700)])),
        Sample("rows", sample([(5, 33), (64, 128)], "channel")),
        Sample("groups", sample([(5, 33), (6, 4, 3, 3)], "group", 7)),
        Sample("empty", sample([(0, 4), (3,), (0,)])),
    ],
    bad_calls=[
        BadCall("not_a_list", TypeError, "`grads` must be a list", bad(torch.ones(2), [ONE])),
        BadCall("length", ValueError, "`scales` must have 1 entries, got 0", bad([torch.ones(2)], [])),
        BadCall("count", ValueError, "must have 1 entry, or 2", bad([torch.ones(2, 3)], [torch.ones(3)])),
        BadCall("scale_dtype", TypeError, "must have dtype float32", bad([torch.ones(2)], [ONE.double()])),
        BadCall("integer", TypeError, "must have dtype", bad([torch.ones(2, dtype=torch.int64)], [ONE])),
        BadCall(
            "group", ValueError, "`group_size` must be at least 0", bad([torch.ones(2)], [ONE], group_size=-1)
        ),
        BadCall("device", ValueError, "must be on the device", bad([torch.ones(2)], [ONE.to("meta")])),
    ],
    # Two roundings of relative error 2^-24 in a product, doubled by the square.
    bound=lambda args, kwargs, expected, dtype: [
        expected[0] * (1e-14 if dtype == torch.float64 else 4 * 2.0**-24)
    ],
)


def test_more_tensors_than_one_launch_holds_and_any_grouping_of_chunks():
    grads = [torch.randn(7) for _ in range(900)]
    scales = [torch.rand(()) for _ in grads]
    expected = reference.scaled_sqnorm(grads, scales)
    torch.testing.assert_close(ops.scaled_sqnorm(grads, scales), expected, rtol=1e-14, atol=0)


def test_more_chunks_than_one_level_of_the_tree():
    grad = torch.randn(1100 * 1024 + 5)
    value = ops.scaled_sqnorm([grad], [ONE])
    torch.testing.assert_close(value, grad.double().square().sum(), rtol=1e-13, atol=0)


def test_empty_list_is_zero():
    assert ops.scaled_sqnorm([], []).item() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_reach_the_sum(value):
    grad = torch.ones(3000)
    grad[2500] = value
    assert not ops.scaled_sqnorm([grad], [ONE]).isfinite()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from(SIZES),
    cols=st.sampled_from(SIZES),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(TABLE.dtypes),
    granularity=st.sampled_from(["tensor", "channel", "group"]),
)
def test_any_shape_and_stride(rows, cols, layout, dtype, granularity):
    grad = torch.randn(rows, cols).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale = scale_like(grad, granularity, 5).to(wide)
    expected = reference.scaled_sqnorm([grad.double()], [scale.double()], group_size=5)
    value = ops.scaled_sqnorm([strided(grad, layout)], [scale], group_size=5)
    torch.testing.assert_close(value, expected, rtol=4 * 2.0**-24, atol=0)


def test_bytes_moved_and_launches(counting):
    grads = [torch.randn(384, 384), torch.randn(1536, 96)]
    ops.scaled_sqnorm(grads, [torch.rand(384), ONE])
    (kernel,) = counting.counters().values()
    assert kernel["bytes_moved"] / (4 * sum(g.numel() for g in grads)) <= 1.1
    assert kernel["launches"] == 1
