from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvitfast import ops, reference
from tests.ops.table import EMULATED, SIZES, BadCall, OpTable, Sample


def csr(units, size, index_dtype, empty=False):
    lengths = torch.randint(0, 5, (units,)) if size else torch.zeros(units, dtype=torch.int64)
    if empty:
        lengths.zero_()
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    indices = torch.randint(0, max(size, 1), (int(indptr[-1]),))
    return indptr.to(index_dtype), indices.to(index_dtype)


def call(units, size, index_dtype=torch.int32, coeff=False, spoil=None):
    def make(dtype):
        workspace = torch.randn(size).to(dtype)
        if spoil is not None:
            workspace[size // 2] = spoil
        acc = torch.rand(units).to(dtype)
        kwargs = {"coeff": torch.rand(units).to(dtype)} if coeff else {}
        return (acc, torch.zeros(2, dtype=torch.int64), workspace, *csr(units, size, index_dtype)), kwargs

    return make


def bound(args, kwargs, expected, dtype):
    unit = 1e-13 if dtype == torch.float64 else 2e-6
    return [expected[0].abs().double() * unit + unit * 40, torch.zeros(2, dtype=torch.float64)]


def changed(**replace):
    def make():
        names = ["acc", "counts", "workspace", "indptr", "indices"]
        values = {
            "acc": torch.zeros(2),
            "counts": torch.zeros(2, dtype=torch.int64),
            "workspace": torch.ones(3),
            "indptr": torch.tensor([0, 1, 3]),
            "indices": torch.tensor([0, 1, 2]),
        }
        kwargs = {k: v for k, v in replace.items() if k not in names}
        values.update({k: v for k, v in replace.items() if k in names})
        return tuple(values[n] for n in names), kwargs

    return make


TABLE = OpTable(
    op="saliency_commit_",
    samples=[
        Sample("small", call(5, 9)),
        Sample("int64_indices", call(257, 300, torch.int64)),
        Sample("coefficients", call(65, 40, coeff=True)),
        Sample("one_unit", call(1, 1)),
        Sample("no_units", call(0, 4)),
        Sample("empty_workspace", call(4, 0)),
        Sample("nan", call(33, 50, spoil=float("nan"))),
        Sample("inf", call(33, 50, spoil=float("inf"))),
    ],
    bad_calls=[
        BadCall("not_a_tensor", TypeError, "`acc` must be a tensor, got list", changed(acc=[0.0])),
        BadCall(
            "acc_dtype",
            TypeError,
            "`acc` must have dtype float32, float64, got float16",
            changed(acc=torch.zeros(2).half()),
        ),
        BadCall("counts_dtype", TypeError, "`counts` must have dtype int64", changed(counts=torch.zeros(2))),
        BadCall(
            "counts_shape",
            ValueError,
            r"`counts` must have shape \[2\]",
            changed(counts=torch.zeros(3, dtype=torch.int64)),
        ),
        BadCall(
            "workspace_dtype",
            TypeError,
            "`workspace` must have dtype float32, got float64",
            changed(workspace=torch.ones(3).double()),
        ),
        BadCall(
            "indptr_size", ValueError, r"`indptr` must have shape \[3\]", changed(indptr=torch.tensor([0, 3]))
        ),
        BadCall(
            "index_dtypes",
            TypeError,
            "`indices` must have dtype int64, got int32",
            changed(indices=torch.tensor([0, 1, 2], dtype=torch.int32)),
        ),
        BadCall("coeff_shape", ValueError, r"`coeff` must have shape \[2\]", changed(coeff=torch.ones(3))),
        BadCall("rank", ValueError, "`workspace` must have rank 1", changed(workspace=torch.ones(1, 3))),
        BadCall(
            "strided_acc",
            ValueError,
            "`acc` is written in place and must be contiguous",
            changed(acc=torch.zeros(4)[::2]),
        ),
        BadCall(
            "device",
            ValueError,
            "`workspace` must be on the device",
            changed(workspace=torch.ones(3, device="meta")),
        ),
    ],
    bound=bound,
    dtypes=(torch.float32, torch.float64),
    mutated=lambda args: [args[0], args[1]],
)


def test_order_of_operations():
    """Two minibatches of sums 0.2 and -0.3: mean of squares 0.065, not square of mean 0.0025."""
    acc, counts = torch.zeros(1), torch.zeros(2, dtype=torch.int64)
    indptr, indices = torch.tensor([0, 3]), torch.tensor([0, 1, 2])
    w = torch.tensor([1.0, -2.0, 0.5])
    for g in ([0.2, 0.1, 0.4], [-0.1, 0.1, 0.0]):
        sums = ops.saliency_rowcol([w], [torch.tensor(g)])
        ops.saliency_commit_(acc, counts, sums, indptr, indices)
    assert (acc / counts[0]).item() == pytest.approx(0.065, rel=1e-6)
    assert counts.tolist() == [2, 0]


@pytest.mark.parametrize("spoil", [float("nan"), float("inf"), -float("inf")])
def test_a_spoilt_minibatch_is_counted_and_leaves_no_trace(spoil):
    # The bad entry belongs to no unit: it still says that this minibatch's gradients are wrong.
    acc, counts = torch.tensor([1.0, 2.0]), torch.zeros(2, dtype=torch.int64)
    workspace = torch.tensor([1.0, 2.0, spoil])
    ops.saliency_commit_(acc, counts, workspace, torch.tensor([0, 1, 2]), torch.tensor([0, 1]))
    assert acc.tolist() == [1.0, 2.0]
    assert counts.tolist() == [0, 1]


def test_a_square_that_overflows_is_a_spoilt_minibatch():
    acc, counts = torch.ones(1), torch.zeros(2, dtype=torch.int64)
    ops.saliency_commit_(acc, counts, torch.tensor([1e25]), torch.tensor([0, 1]), torch.tensor([0]))
    assert acc.tolist() == [1.0]
    assert counts.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("indptr", "indices"),
    [
        ([0, 1, 3], [0, 1, 3]),
        ([0, 1, 3], [0, -1, 2]),
        ([0, 2, 1], [0]),
        ([1, 1, 3], [0, 1, 2]),
        ([0, 1, 2], [0, 1, 2]),
    ],
)
def test_a_broken_index_never_reads_outside(indptr, indices):
    acc, counts = torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    args = (acc, counts, torch.ones(3), torch.tensor(indptr), torch.tensor(indices))
    if EMULATED:
        if indptr in ([1, 1, 3], [0, 1, 2]):
            pytest.skip("entries that no unit names cost the CUDA kernel nothing and are not looked for")
        ops.saliency_commit_(*args)
        assert counts.tolist() == [0, 1]
    else:
        with pytest.raises(RuntimeError, match="`indices` must lie in"):
            ops.saliency_commit_(*args)
        assert counts.tolist() == [0, 0]
    assert acc.tolist() == [0.0, 0.0]


def test_gradients_do_not_flow_through_bookkeeping():
    w = torch.ones(2, requires_grad=True)
    acc, counts = torch.zeros(1), torch.zeros(2, dtype=torch.int64)
    sums = ops.saliency_rowcol([w], [torch.ones(2)])
    ops.saliency_commit_(acc, counts, sums, torch.tensor([0, 2]), torch.tensor([0, 1]))
    assert not acc.requires_grad
    assert acc.item() == 4.0


@settings(max_examples=40, deadline=None)
@given(
    units=st.sampled_from(SIZES),
    size=st.sampled_from(SIZES),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    coeff=st.booleans(),
    step=st.booleans(),
)
def test_any_size(units, size, index_dtype, coeff, step):
    (acc, counts, workspace, indptr, indices), kwargs = call(units, size, index_dtype, coeff)(torch.float32)
    expected = acc.double()
    wide = {k: v.double() for k, v in kwargs.items()}
    reference.saliency_commit_(expected, counts.clone(), workspace.double(), indptr, indices, **wide)
    if step:
        workspace = torch.stack([workspace, workspace], 1)[:, 0]
    ops.saliency_commit_(acc, counts, workspace, indptr, indices, **kwargs)
    torch.testing.assert_close(acc.double(), expected, rtol=1e-5, atol=1e-5)
    assert counts.tolist() == [1, 0]
