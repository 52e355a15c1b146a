from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvitfast import ops, reference
from tests.ops.table import EMULATED, LAYOUTS, SIZES, BadCall, OpTable, Sample, strided


def matrices(shapes, dtype, grad_dtype=None, scale=1.0):
    weights = [torch.randn(s).mul(scale).to(dtype) for s in shapes]
    grads = [torch.randn(s).mul(scale).to(grad_dtype or dtype) for s in shapes]
    return weights, grads


def sample(shapes, **kwargs):
    return lambda dtype: (tuple(matrices(shapes, dtype)), kwargs)


def mixed(dtype):
    other = torch.float64 if dtype == torch.float64 else torch.float32
    return matrices([(33, 65), (64, 8)], dtype, other), {}


def bound(args, kwargs, expected, dtype):
    # Cancellation: the error of a sum is relative to the sum of absolute values, not to the sum.
    weights, grads = args[0], args[1]
    scale = abs(float(kwargs["inv_scale"])) if kwargs.get("inv_scale") is not None else 1.0
    magnitude = reference.saliency_rowcol(
        [w.double() for w in weights], [g.double() for g in grads], abs=True
    )
    unit = 1e-13 if dtype == torch.float64 else 1e-6
    return [magnitude * scale * unit + 1e-45]


def one(dtype=torch.float32, **kwargs):
    w, g = torch.ones(2, 3, dtype=dtype), torch.ones(2, 3, dtype=dtype)
    return lambda: (([w], [g]), kwargs)


TABLE = OpTable(
    op="saliency_rowcol",
    samples=[
        Sample("one_matrix", sample([(5, 7)])),
        Sample("tile_edges", sample([(63, 33), (64, 32), (65, 31), (129, 257)])),
        Sample("vectors_and_scalars", sample([(9,), (1,), (1, 1), (3, 1), (1, 300)])),
        Sample("empty", sample([(0, 4), (4, 0), (0,), (0, 0)])),
        Sample("convolution", sample([(8, 3, 4, 4)])),
        Sample("long_row_among_tiny", sample([(2, 5000), (1, 2), (3, 2)])),
        Sample("absolute", sample([(65, 33), (7,)], abs=True)),
        Sample("scaled", sample([(65, 33)], inv_scale=torch.tensor(2.0**-16))),
        Sample("mixed_dtypes", mixed),
    ],
    bad_calls=[
        BadCall(
            "not_a_list",
            TypeError,
            "`weights` must be a list",
            lambda: ((torch.ones(2), [torch.ones(2)]), {}),
        ),
        BadCall(
            "not_tensors",
            TypeError,
            r"`grads\[0\]` must be a tensor, got float",
            lambda: (([torch.ones(2)], [1.0]), {}),
        ),
        BadCall(
            "length", ValueError, "`grads` must have 1 entries, got 0", lambda: (([torch.ones(2)], []), {})
        ),
        BadCall(
            "shape",
            ValueError,
            r"shape of `weights\[0\]` \[2\], got \[3\]",
            lambda: (([torch.ones(2)], [torch.ones(3)]), {}),
        ),
        BadCall(
            "integer",
            TypeError,
            "must have dtype float32",
            lambda: (([torch.ones(2, dtype=torch.int64)], [torch.ones(2)]), {}),
        ),
        BadCall(
            "mixed_double",
            TypeError,
            "float64 cannot be mixed",
            lambda: (([torch.ones(2).double()], [torch.ones(2)]), {}),
        ),
        BadCall(
            "scalar",
            ValueError,
            "must have rank 1 or more",
            lambda: (([torch.tensor(1.0)], [torch.tensor(1.0)]), {}),
        ),
        BadCall("scale_size", ValueError, "`inv_scale` must have one element", one(inv_scale=torch.ones(2))),
        BadCall("scale_type", TypeError, "`inv_scale` must be a float32 tensor", one(inv_scale=1.0)),
        BadCall(
            "device",
            ValueError,
            r"`grads\[0\]` must be on the device of `weights\[0\]` \(cpu\), got meta",
            lambda: (([torch.ones(2)], [torch.ones(2, device="meta")]), {}),
        ),
        BadCall(
            "sparse",
            TypeError,
            "must be a strided tensor",
            lambda: (([torch.eye(2).to_sparse()], [torch.eye(2)]), {}),
        ),
    ],
    bound=bound,
    inputs=lambda args, _: [*args[0], *args[1]],
)


def test_hand_worked_products():
    """papers' table: Wq [[1, -2], [3, 0]] with gradient one: rows (-1, 3), columns (4, -2)."""
    w = torch.tensor([[1.0, -2.0], [3.0, 0.0]])
    sums = ops.saliency_rowcol([w, torch.tensor([1.0, -1.0])], [torch.ones(2, 2), torch.ones(2)])
    assert sums.tolist() == [-1.0, 3.0, 4.0, -2.0, 1.0, -1.0, 0.0]


def test_cpu_sums_are_exact_to_one_rounding():
    if EMULATED:
        pytest.skip("the CUDA kernel adds in float32")
    w, g = matrices([(257, 129)], torch.float32)
    exact = (w[0].double() * g[0].double()).tolist()
    sums = ops.saliency_rowcol(w, g)
    for row in range(257):
        assert sums[row].item() == pytest.approx(math.fsum(exact[row]), rel=1.2e-7, abs=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_non_finite_values_reach_their_row_and_column_only(value, dtype):
    w, g = matrices([(70, 40)], dtype)
    w[0][66, 37] = value
    g[0][66, 37] = 1.0
    sums = ops.saliency_rowcol(w, g)
    bad = (~sums.isfinite()).nonzero().flatten().tolist()
    assert bad == [66, 70 + 37]
    expected = reference.saliency_rowcol([w[0].double()], [g[0].double()])
    assert torch.equal(sums[bad].double().nan_to_num(7.0), expected[bad].nan_to_num(7.0))


def test_subnormal_and_large_values():
    w = [torch.full((3, 9), 1e-38), torch.full((2, 2), 65504.0, dtype=torch.float16)]
    g = [torch.full((3, 9), 1e-3), torch.full((2, 2), 65504.0, dtype=torch.float16)]
    sums = ops.saliency_rowcol(w, g)
    expected = reference.saliency_rowcol([x.double() for x in w], [x.double() for x in g]).float()
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=2e-45)


def test_every_half_bit_pattern_is_read_right():
    for dtype in (torch.float16, torch.bfloat16):
        patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        w = patterns.view(256, 256).t().contiguous().view(-1, 1)
        sums = ops.saliency_rowcol([w], [torch.ones_like(w)])[:-1]
        assert torch.equal(sums.nan_to_num(3.0), w.flatten().float().nan_to_num(3.0))


def test_splitting_the_list_changes_no_bit():
    w, g = matrices([(65, 33), (7,), (130, 40)], torch.float32)
    whole = ops.saliency_rowcol(w, g)
    parts = torch.cat([ops.saliency_rowcol([a], [b]) for a, b in zip(w, g, strict=True)])
    assert torch.equal(whole, parts)


def test_more_matrices_than_one_launch_holds():
    w, g = matrices([(3, 2)] * 700, torch.float32)
    expected = reference.saliency_rowcol(w, g)
    torch.testing.assert_close(ops.saliency_rowcol(w, g), expected)


def test_absolute_gradient_at_zero_is_zero():
    w = torch.tensor([[0.0, -2.0]], requires_grad=True)
    g = torch.tensor([[3.0, 4.0]], requires_grad=True)
    ops.saliency_rowcol([w], [g], abs=True).sum().backward()
    assert w.grad.tolist() == [[0.0, -8.0]]
    assert g.grad.tolist() == [[0.0, 4.0]]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from(SIZES),
    cols=st.sampled_from(SIZES),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    dtype=st.sampled_from(TABLE.dtypes),
    absolute=st.booleans(),
)
def test_any_shape_and_stride(rows, cols, layouts, dtype, absolute):
    w, g = matrices([(rows, cols)], dtype)
    args = [strided(w[0], layouts[0])], [strided(g[0], layouts[1])]
    expected = reference.saliency_rowcol([w[0].double()], [g[0].double()], abs=absolute)
    (limit,) = bound(args, {}, expected, dtype)
    assert ((ops.saliency_rowcol(*args, abs=absolute).double() - expected).abs() <= limit).all()


def test_expanded_rows_need_no_copy():
    w = torch.randn(1, 9).expand(70, 9)
    g = torch.randn(70, 9)
    torch.testing.assert_close(
        ops.saliency_rowcol([w], [g]), reference.saliency_rowcol([w], [g]), atol=1e-5, rtol=1e-5
    )


def test_bytes_moved_on_deit_base_fc1(counting):
    w, g = matrices([(3072, 768)], torch.float32)
    ops.saliency_rowcol(w, g)
    kernels = counting.counters()
    moved = sum(k["bytes_moved"] for k in kernels.values())
    least = 8 * 3072 * 768 + 4 * (3072 + 768)
    assert moved / least <= 1.1
    assert [k["launches"] for k in kernels.values()] == [1]


def test_one_launch_for_all_matrices_of_a_deit(counting):
    shapes = []
    for _ in range(12):
        shapes += [(6, 4), (6,), (4, 4), (4,), (16, 4), (16,), (4, 16), (4,), (4,), (4,), (4,), (4,)]
    ops.saliency_rowcol(*matrices(shapes, torch.float32))
    assert [k["launches"] for k in counting.counters().values()] == [1]


def test_shared_memory_has_no_bank_conflicts(counting):
    ops.saliency_rowcol(*matrices([(256, 1024)], torch.float32))
    for kernel in counting.counters().values():
        for access in ("shared_load", "shared_store"):
            assert kernel[access]["wavefronts"] == kernel[access]["least_wavefronts"]


@pytest.mark.skipif(EMULATED, reason="instruction sets belong to the CPU kernels")
def test_every_instruction_set_gives_the_same_bits():
    from pyvitfast import _C

    script = (
        "import torch, pyvitfast.ops as ops; torch.manual_seed(0);"
        "draw = lambda d: [torch.randn(s).to(d) for s in ((130, 77), (33,), (64, 256))];"
        "sums = [ops.saliency_rowcol(draw(d), draw(d), abs=a)"
        " for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64) for a in (False, True)];"
        "print(torch.cat([s.double() for s in sums]).view(torch.int64).tolist())"
    )
    seen = set()
    for capability in _C.supported_cpu_capabilities():
        env = {**os.environ, "PYVITFAST_CPU_CAPABILITY": capability}
        seen.add(
            subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, check=True).stdout
        )
    assert len(seen) == 1
