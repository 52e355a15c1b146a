from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from pyvitfast import ops, reference
from tests.ops.table import BadCall, OpTable, Sample


def stack(source, target, factors="shared", types=1, dtype=torch.float32):
    """Matrices [T, L1, O1, I1] and the factors that make [T, L2, O2, I2] of them."""
    (l1, o1, i1), (l2, o2, i2) = source, target
    layers = {"shared": (), "source": (l1,), "target": (l2,)}[factors]
    shapes = [(types, l1, o1, i1), (*layers, i2, i1), (*layers, o2, o1), (types, l2, l1)]
    made = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    made[3] *= max(1, l1 * o1 * i1) ** -0.5
    return [t.to(dtype) for t in made]


def sample(source, target, factors="shared", types=1, **options):
    options |= {} if factors == "shared" else {"factors": factors}
    return lambda dtype: (tuple(stack(source, target, factors, types, dtype)), options)


def bound(args, kwargs, expected, dtype):
    unit = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float64: 1e-14}[
        dtype
    ]
    # Products of many random terms are off by their typical size, not by their own.
    return [unit * (e.abs() + 10 * (e.abs().mean() if e.numel() else 0) + 1e-6) for e in expected]


def bad(**changes):
    def make():
        call = dict(zip(("weight", "a", "b", "d"), stack((2, 3, 4), (3, 5, 6)), strict=True))
        call |= {k: v for k, v in changes.items() if k in call}
        return tuple(call.values()), {k: v for k, v in changes.items() if k not in call}

    return make


TABLE = OpTable(
    op="kron_grow",
    samples=[
        Sample("shared", sample((2, 3, 4), (3, 5, 6), types=2)),
        Sample("fewer_layers", sample((4, 3, 4), (2, 5, 6))),
        Sample("source", sample((2, 3, 4), (5, 5, 6), "source", types=3)),
        Sample("target", sample((3, 3, 4), (5, 7, 6), "target", types=2)),
        Sample("identity", sample((2, 3, 4), (3, 5, 6), types=2, identity=True)),
        Sample("identity_target", sample((3, 3, 4), (5, 7, 6), "target", types=2, identity=True)),
        Sample("identity_one_side", sample((2, 5, 5), (2, 0, 60), identity=True)),
        Sample("wide_left", sample((6, 33, 20), (3, 40, 70))),
        Sample("wide_right", sample((2, 33, 60), (6, 64, 70), types=2)),
        Sample("narrower", sample((3, 8, 8), (3, 4, 2), "source")),
        Sample("empty", sample((2, 3, 4), (2, 0, 5))),
        Sample("no_layers", sample((0, 3, 4), (2, 5, 5))),
    ],
    bad_calls=[
        BadCall("weight", ValueError, r"\[T, L1, O1, I1\]", bad(weight=torch.ones(2, 3, 4))),
        BadCall(
            "a",
            ValueError,
            "`a` must have as many columns as `weight` has columns, 4",
            bad(a=torch.ones(6, 5)),
        ),
        BadCall(
            "b", ValueError, "`b` must have as many columns as `weight` has rows, 3", bad(b=torch.ones(6, 5))
        ),
        BadCall("d", ValueError, "2 layers of `weight`", bad(d=torch.ones(1, 3, 3))),
        BadCall("both", ValueError, "or both stacks", bad(a=torch.ones(2, 6, 4))),
        BadCall(
            "layers",
            ValueError,
            "one matrix for each of the 3 layers of the target",
            bad(a=torch.ones(2, 6, 4), b=torch.ones(2, 5, 3), factors="target"),
        ),
        BadCall("factors", ValueError, "`factors` must be 'source' or 'target'", bad(factors="layer")),
        BadCall(
            "identity_of_source",
            ValueError,
            "goes with shared factors",
            bad(a=torch.ones(2, 6, 4), b=torch.ones(2, 5, 3), identity=True),
        ),
        BadCall("identity_type", TypeError, "`identity` must be True or False", bad(identity=1)),
        BadCall("integer", TypeError, "must have dtype", bad(d=torch.ones(1, 3, 2, dtype=torch.int32))),
    ],
    bound=bound,
    inputs=lambda args, kwargs: list(args),
    gradient_slack=30.0,  # each entry of a factor's gradient is a sum over all matrices
)


def test_copied_units_by_hand():
    """Example E1: columns divided by their copies, then rows copied."""
    w = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[None, None]
    a = torch.tensor([[0.5, 0], [0, 1], [0.5, 0]])
    b = torch.tensor([[1.0, 0], [0, 1], [0, 1]])
    grown = ops.kron_grow(w, a, b, torch.ones(1, 1, 1))[0, 0]
    assert grown.tolist() == [[0.5, 2, 0.5], [1.5, 4, 1.5], [1.5, 4, 1.5]]
    assert (grown @ torch.tensor([10.0, 1, 10])).tolist() == [12, 34, 34]


@pytest.mark.parametrize("factors", ["shared", "target"])
def test_mixed_layers_by_hand(factors):
    """Example E3: layers mixed .75 and .25, a third unit that is the mean of two."""
    w = torch.tensor([[[1.0, 2], [3, 4]], [[5, 6], [7, 8]]])[None]
    grow = torch.tensor([[1.0, 0], [0, 1], [0.5, 0.5]])
    options = {}
    if factors == "target":
        grow, options = grow[None], {"factors": "target"}
    grown = ops.kron_grow(w, grow, grow, torch.tensor([[[0.75, 0.25]]]), **options)
    assert grown[0, 0].tolist() == [[2, 3, 2.5], [4, 5, 4.5], [3, 4, 3.5]]


def test_factors_of_layers_come_before_or_after_mixing():
    w, a, b, d = stack((2, 3, 3), (2, 4, 4), "source", dtype=torch.float64)
    before = sum(d[0, 0, n] * b[n] @ w[0, n] @ a[n].T for n in range(2))
    after = b[0] @ (d[0, 0, 0] * w[0, 0] + d[0, 0, 1] * w[0, 1]) @ a[0].T
    torch.testing.assert_close(ops.kron_grow(w, a, b, d)[0, 0], before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        ops.kron_grow(w, a, b, d, factors="target")[0, 0], after, rtol=1e-12, atol=1e-12
    )


def test_identity_returns_the_source_bit_for_bit():
    w = torch.randn(2, 3, 5, 7)
    assert torch.equal(ops.kron_grow(w, torch.eye(7), torch.eye(5), torch.eye(3).expand(2, 3, 3)), w)


def test_identity_is_written_out_rows():
    w, a, b, d = stack((2, 3, 4), (3, 5, 6), types=2, dtype=torch.float64)
    eyes = [torch.eye(n, dtype=torch.float64) for n in (4, 3)]
    want = ops.kron_grow(w, torch.cat([eyes[0], a]), torch.cat([eyes[1], b]), d)
    got = ops.kron_grow(w, a, b, d, identity=True)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    assert torch.equal(got[:, :, :3, :4], ops.kron_grow(w, *eyes, d))


@settings(max_examples=15, deadline=None)
@given(
    source=st.tuples(st.integers(1, 6), st.integers(1, 70), st.integers(1, 70)),
    target=st.tuples(st.integers(1, 6), st.integers(1, 70), st.integers(1, 70)),
    factors=st.sampled_from(["shared", "source", "target"]),
    types=st.integers(1, 3),
)
def test_any_shape_and_stride(source, target, factors, types):
    made = stack(source, target, factors, types, torch.float64)
    options = {} if factors == "shared" else {"factors": factors}
    moved = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in made]
    want = reference.kron_grow(*made, **options)
    torch.testing.assert_close(ops.kron_grow(*moved, **options), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("target", "options", "operations"),
    [
        # Layers mixed first: 3 x (36 products of 2 x 384 x 768 x 1152, and 144 x 384 x 384 twice).
        ((12, 768, 768), {}, 2 * 3 * (12 * 384 * 768 * (384 + 768) + 144 * 384 * 384)),
        # Half of the target's rows and columns are an identity's.
        ((12, 384, 384), {"identity": True}, 2 * 3 * (12 * 384 * 384 * (384 + 768) + 144 * 384 * 384)),
        # Factors first where the target has more layers.
        ((24, 768, 768), {}, 2 * 3 * (12 * 384 * 768 * (384 + 768) + 288 * 768 * 768)),
    ],
)
def test_operations_of_the_cheapest_order(target, options, operations):
    made = [t.to("meta") for t in stack((12, 384, 384), target, types=3)]
    with FlopCounterMode(display=False) as counter:
        ops.kron_grow(*made, **options)
    assert counter.get_total_flops() == operations


def test_bytes_moved(counting):
    """Mixing, columns and rows: each reads what it needs and writes once."""
    made = stack((2, 64, 64), (2, 128, 128), types=2)
    ops.kron_grow(*made)
    (kernel,) = (k for name, k in counting.counters().items() if "strided_product" in name)
    source, between, target = (4 * 2 * 2 * n for n in (64 * 64, 64 * 128, 128 * 128))
    # A factor is read anew for each matrix, here from a cache.
    factors = 4 * 2 * 2 * (128 * 64 + 128 * 64)
    assert kernel["launches"] == 1 + 2 * 2
    assert kernel["bytes_moved"] <= 1.2 * (3 * source + 2 * between + target + factors)
