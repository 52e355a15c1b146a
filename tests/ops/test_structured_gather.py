from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvitfast import ops, reference
from tests.ops.table import LAYOUTS, SIZES, BadCall, OpTable, Sample, strided


def kept(size, dtype=torch.int64, share=0.6):
    return torch.arange(size)[torch.rand(size) < share].to(dtype)


def sample(shapes, rows=True, cols=True, index_dtype=torch.int64, scale=False):
    def make(dtype):
        tensors = [torch.randn(s).to(dtype) for s in shapes]
        row = [kept(s[0], index_dtype) if rows else None for s in shapes]
        col = [kept(s[1], index_dtype) if cols and len(s) == 2 else None for s in shapes]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        kwargs = {}
        if scale:
            kwargs["row_scale"] = [
                torch.rand(s[0] if r is None else len(r)).to(wide) for s, r in zip(shapes, row, strict=True)
            ]
            kwargs["col_scale"] = [
                torch.rand(s[1] if c is None else len(c)).to(wide) if len(s) == 2 else None
                for s, c in zip(shapes, col, strict=True)
            ]
        return (tensors, row, col), kwargs

    return make


def repeats(dtype):
    w = torch.randn(4, 3).to(dtype)
    return ([w], [torch.tensor([3, 0, 0, 1])], [torch.tensor([2, 2, 0])]), {}


def bound(args, kwargs, expected, dtype):
    if not kwargs:
        return [torch.zeros_like(t, dtype=torch.float64) for t in expected]
    unit = {torch.float32: 3e-7, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 1e-15}[
        dtype
    ]
    return [t.abs().double() * unit + 3e-8 for t in expected]


def bad(tensors, rows, cols, **kwargs):
    return lambda: ((tensors, rows, cols), kwargs)


W = torch.ones(3, 4)
I2 = torch.tensor([0, 2])
TABLE = OpTable(
    op="structured_gather",
    samples=[
        Sample("both", sample([(5, 7), (33, 65)])),
        Sample("int32", sample([(65, 40)], index_dtype=torch.int32)),
        Sample("rows_only", sample([(64, 31), (9,)], cols=False)),
        Sample("cols_only", sample([(3, 257)], rows=False)),
        Sample("everything", sample([(3, 4), (5,)], rows=False, cols=False)),
        Sample("empty", sample([(0, 4), (4, 0), (0,)])),
        Sample("convolution", sample([(8, 3, 2, 2)], cols=False)),
        Sample("scaled", sample([(33, 20), (9,)], scale=True)),
        Sample("scaled_rows_only", sample([(33, 20)], cols=False, scale=True)),
        Sample("repeats_and_any_order", repeats),
    ],
    bad_calls=[
        BadCall("not_a_list", TypeError, "`tensors` must be a list", bad(W, [I2], [None])),
        BadCall("length", ValueError, "`rows` must have 1 entries", bad([W], [], [None])),
        BadCall(
            "index_dtype",
            TypeError,
            r"`rows\[0\]` must have dtype int32, int64, got float32",
            bad([W], [torch.ones(2)], [None]),
        ),
        BadCall("index_rank", ValueError, r"`cols\[0\]` must have rank 1", bad([W], [None], [I2.view(1, 2)])),
        BadCall(
            "above",
            ValueError,
            r"`rows\[0\]` must lie in \[0, 3\), got values from 0 to 3",
            bad([W], [torch.tensor([0, 3])], [None]),
        ),
        BadCall(
            "below",
            ValueError,
            r"`cols\[0\]` must lie in \[0, 4\), got values from -1 to 0",
            bad([W], [None], [torch.tensor([0, -1])]),
        ),
        BadCall(
            "cols_of_a_vector", ValueError, "must have rank 2 when `cols", bad([torch.ones(3)], [None], [I2])
        ),
        BadCall(
            "scale_size",
            ValueError,
            r"`row_scale\[0\]` must have shape \[2\]",
            bad([W], [I2], [None], row_scale=[torch.ones(3)]),
        ),
        BadCall(
            "scale_dtype",
            TypeError,
            r"`col_scale\[0\]` must have dtype float32, got float64",
            bad([W], [None], [I2], col_scale=[torch.ones(2).double()]),
        ),
        BadCall(
            "scale_of_integers",
            TypeError,
            "must have dtype float32",
            bad([W.long()], [I2], [None], row_scale=[torch.ones(2)]),
        ),
        BadCall(
            "scale_grad",
            NotImplementedError,
            "is a constant; detach it",
            bad([W], [I2], [None], row_scale=[torch.ones(2, requires_grad=True)]),
        ),
        BadCall("device", ValueError, "must be on the device", bad([W], [I2.to("meta")], [None])),
    ],
    bound=bound,
    inputs=lambda args, _: args[0],
)


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.complex64, torch.complex128],
)
def test_any_dtype(dtype):
    w = torch.randint(0, 2, (9, 8)).to(dtype)
    rows, cols = torch.tensor([1, 2, 3, 8]), torch.tensor([0, 5, 6, 7])
    (out,) = ops.structured_gather([w], [rows], [cols])
    assert torch.equal(out, w[rows][:, cols])


def test_bits_survive():
    w = torch.tensor([[float("nan"), -0.0, 1e-45, float("inf")]]).view(torch.int32)
    w[0, 0] = 0x7FA00001  # a signalling NaN with a payload
    (out,) = ops.structured_gather([w.view(torch.float32)], [None], [torch.tensor([0, 1, 2, 3])])
    assert torch.equal(out.view(torch.int32), w)


def test_layer_norm_gain_is_scaled_while_gathered():
    gamma = torch.tensor([1.0, 2.0, 3.0, 4.0])
    rows = torch.tensor([1, 3])
    (out,) = ops.structured_gather([gamma], [rows], [None], row_scale=[torch.full((2,), 2.0**0.5)])
    torch.testing.assert_close(out, torch.tensor([2.0, 4.0]) * 2.0**0.5)


def test_weights_and_optimizer_state_in_one_call():
    tensors = [torch.randn(6, 5) for _ in range(3)]
    rows, cols = torch.tensor([0, 1, 4]), torch.tensor([2, 3])
    out = ops.structured_gather(tensors, [rows] * 3, [cols] * 3)
    for t, o in zip(tensors, out, strict=True):
        assert torch.equal(o, t[rows][:, cols])
        assert o.data_ptr() != t.data_ptr()


def test_result_is_new_memory_even_if_all_is_kept():
    w = torch.randn(3, 4)
    (out,) = ops.structured_gather([w], [None], [None])
    out.zero_()
    assert w.abs().sum() > 0


def test_more_tensors_than_one_launch_holds():
    tensors = [torch.full((2, 3), float(i)) for i in range(500)]
    out = ops.structured_gather(tensors, [torch.tensor([1])] * 500, [None] * 500)
    assert torch.stack(out).sum((1, 2)).tolist() == [3.0 * i for i in range(500)]


def test_gradient_of_repeats_adds_up():
    w = torch.ones(2, 2, requires_grad=True)
    (out,) = ops.structured_gather([w], [torch.tensor([1, 1, 1])], [torch.tensor([0, 0])])
    out.sum().backward()
    assert w.grad.tolist() == [[0.0, 0.0], [6.0, 0.0]]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from(SIZES),
    cols=st.sampled_from(SIZES),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(TABLE.dtypes),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.95, 1.0]),
    block=st.sampled_from([1, 16]),
)
def test_any_shape_and_stride(rows, cols, layout, dtype, index_dtype, share, block):
    values = torch.randn(rows, cols).to(dtype)

    def pick(size):
        if block == 1:
            return kept(size, index_dtype, share)
        return torch.arange(size // 3, size, dtype=index_dtype)  # one run, as groups leave them

    row, col = pick(rows), pick(cols)
    (out,) = ops.structured_gather([strided(values, layout)], [row], [col])
    (expected,) = reference.structured_gather([values], [row], [col])
    assert torch.equal(out, expected)
    assert out.is_contiguous()
