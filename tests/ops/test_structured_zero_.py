from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvitfast import ops, reference
from tests.ops.table import LAYOUTS, SIZES, BadCall, OpTable, Sample, strided


def masks(shapes, rows=True, cols=True):
    row = [torch.rand(s[0]) > 0.4 if rows else None for s in shapes]
    col = [torch.rand(s[1] if len(s) == 2 else 1) > 0.4 if cols and len(s) <= 2 else None for s in shapes]
    return row, col


def sample(shapes, **kwargs):
    return lambda dtype: (([torch.randn(s).to(dtype) for s in shapes], *masks(shapes, **kwargs)), {})


def shared_mask(dtype):
    alive = torch.rand(6) > 0.5
    return ([torch.randn(6, 3).to(dtype), torch.randn(6).to(dtype)], [alive, alive], [None, None]), {}


def bad(tensors, rows, cols):
    return lambda: ((tensors, rows, cols), {})


ALIVE = torch.tensor([True, False])
TABLE = OpTable(
    op="structured_zero_",
    samples=[
        Sample("both", sample([(5, 7), (33, 65)])),
        Sample("rows_only", sample([(64, 31), (9,)], cols=False)),
        Sample("cols_only", sample([(3, 257)], rows=False)),
        Sample("no_masks", sample([(3, 4)], rows=False, cols=False)),
        Sample("empty", sample([(0, 4), (4, 0), (0,)])),
        Sample("convolution", sample([(8, 3, 2, 2)], cols=False)),
        Sample("shared_mask", shared_mask),
        Sample("tall", sample([(300, 2), (2, 300)])),
    ],
    bad_calls=[
        BadCall("not_a_list", TypeError, "`tensors` must be a list", bad(torch.ones(2), [ALIVE], [None])),
        BadCall("length", ValueError, "`row_alive` must have 1 entries", bad([torch.ones(2)], [], [None])),
        BadCall(
            "mask_dtype",
            TypeError,
            r"`row_alive\[0\]` must have dtype bool, got float32",
            bad([torch.ones(2)], [torch.ones(2)], [None]),
        ),
        BadCall(
            "mask_size",
            ValueError,
            r"`row_alive\[0\]` must have shape \[3\]",
            bad([torch.ones(3, 2)], [ALIVE], [None]),
        ),
        BadCall(
            "col_mask_size",
            ValueError,
            r"`col_alive\[0\]` must have shape \[3\]",
            bad([torch.ones(2, 3)], [None], [ALIVE]),
        ),
        BadCall(
            "col_mask_of_a_convolution",
            ValueError,
            "must have rank 1 or 2 when `col_alive",
            bad([torch.ones(2, 3, 1, 1)], [None], [ALIVE]),
        ),
        BadCall("scalar", ValueError, "must have rank 1 or more", bad([torch.tensor(1.0)], [None], [None])),
        BadCall(
            "no_view",
            ValueError,
            "cannot be viewed as rows in place",
            bad([torch.ones(2, 3, 8)[:, :, ::2].transpose(1, 2)[:, ::3]], [ALIVE], [None]),
        ),
        BadCall(
            "device", ValueError, "must be on the device", bad([torch.ones(2)], [ALIVE.to("meta")], [None])
        ),
    ],
    bound=lambda args, kwargs, expected, dtype: [torch.zeros_like(t, dtype=torch.float64) for t in expected],
    mutated=lambda args: args[0],
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_nan_and_inf_in_dead_entries_go(dtype):
    w = torch.full((3, 4), float("nan"), dtype=dtype)
    w[1, 2] = float("inf")
    w[0, :2] = 5.0
    rows, cols = torch.tensor([True, False, False]), torch.tensor([True, True, False, False])
    ops.structured_zero_([w], [rows], [cols])
    expected = torch.zeros(3, 4, dtype=dtype)
    expected[0, :2] = 5.0
    assert torch.equal(w, expected)
    assert not torch.signbit(w[1:]).any()


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.complex64, torch.complex128],
)
def test_any_dtype(dtype):
    w = torch.ones(5, 6, dtype=dtype)
    rows = torch.tensor([True, False, True, True, False])
    ops.structured_zero_([w], [rows], [None])
    assert w[rows].ne(0).all()
    assert w[~rows].eq(0).all()


def test_channels_last_convolution_is_written_in_place():
    w = torch.ones(4, 3, 2, 2).to(memory_format=torch.channels_last)
    alive = torch.tensor([True, False, True, False])
    ops.structured_zero_([w], [alive], [None])
    assert w.sum(dim=(1, 2, 3)).tolist() == [12.0, 0.0, 12.0, 0.0]


def test_parameters_that_require_grad_are_written_outside_the_graph():
    w = torch.nn.Parameter(torch.ones(2, 2))
    loss = (w * w).sum()
    ops.structured_zero_([w], [ALIVE], [None])
    assert w.tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert w.requires_grad
    assert w.is_leaf
    assert loss.item() == 4.0


def test_more_tensors_than_one_launch_holds():
    tensors = [torch.ones(2, 3) for _ in range(900)]
    ops.structured_zero_(tensors, [ALIVE] * 900, [None] * 900)
    assert torch.stack(tensors).sum((0, 2)).tolist() == [2700.0, 0.0]


@settings(max_examples=50, deadline=None)
@given(
    rows=st.sampled_from(SIZES),
    cols=st.sampled_from(SIZES),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(TABLE.dtypes),
    which=st.tuples(st.booleans(), st.booleans()),
)
def test_any_shape_and_stride(rows, cols, layout, dtype, which):
    values = torch.randn(rows, cols).to(dtype)
    row, col = masks([(rows, cols)], *which)
    expected = values.clone()
    reference.structured_zero_([expected], row, col)
    w = strided(values, layout)
    ops.structured_zero_([w], row, col)
    assert torch.equal(w, expected)


def test_neighbours_of_a_view_stay():
    whole = torch.ones(6, 9)
    ops.structured_zero_([whole[1:4, 2:7]], [torch.tensor([False] * 3)], [None])
    assert whole.sum().item() == 54 - 15
    assert whole[0].eq(1).all()
    assert whole[:, :2].eq(1).all()
