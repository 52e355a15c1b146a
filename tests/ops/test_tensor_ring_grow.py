from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from pyvitfast import ops, reference
from tests.ops.quantizer import outputs_by_capability
from tests.ops.table import BadCall, OpTable, Sample


def ring(source, target, ranks, dtype=torch.float32):
    """A source [L1, B1, O1, I1] and the cores that make a target [L2, B2, O2, I2] of it."""
    (l1, b1, o1, i1), (l2, b2, o2, i2) = source, target
    r1, r2, r3, r4 = ranks
    shapes = [(l1, b1, o1, i1), (r1, b1, b2, r2), (r2, o1, o2, r3), (r3, l1, l2, r4), (r4, i1, i2, r1)]
    # Of the size that leaves the result near 1, so that errors are relative to it.
    made = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    scale = max(1, l1 * b1 * o1 * i1 * r1 * r2 * r3 * r4) ** -0.5
    made[1] *= scale
    return [t.to(dtype) for t in made]


def sample(source, target, ranks, **kwargs):
    return lambda dtype: (tuple(ring(source, target, ranks, dtype)), kwargs)


def bound(args, kwargs, expected, dtype):
    unit = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float64: 1e-14}[
        dtype
    ]
    # Inputs are exact; products of many random terms are off by their typical size, not by their own.
    return [unit * (e.abs() + 10 * (e.abs().mean() if e.numel() else 0) + 1e-6) for e in expected]


def bad(**changes):
    def make():
        names = ("weight", "s_b", "s_o", "s_l", "s_i")
        call = dict(zip(names, ring((2, 3, 4, 5), (2, 3, 4, 5), (1, 2, 3, 4)), strict=True))
        call |= {k: v for k, v in changes.items() if k in call}
        return tuple(call.values()), {k: v for k, v in changes.items() if k not in call}

    return make


TABLE = OpTable(
    op="tensor_ring_grow",
    samples=[
        Sample("unequal", sample((2, 3, 2, 2), (2, 4, 3, 3), (2, 1, 3, 2))),
        Sample("columns", sample((2, 3, 5, 7), (3, 4, 11, 9), (2, 2, 2, 2), columns=2)),
        Sample("all_columns", sample((1, 2, 3, 3), (2, 2, 5, 5), (1, 3, 1, 2), columns=2)),
        Sample("rank_one", sample((2, 2, 6, 5), (4, 3, 9, 10), (1, 1, 1, 1))),
        Sample("layers_last", sample((2, 2, 6, 5), (5, 3, 9, 10), (1, 1, 1, 1), columns=1)),
        Sample("several_tiles", sample((1, 2, 5, 4), (2, 2, 70, 6), (2, 1, 2, 1), columns=1)),
        Sample("wide", sample((1, 2, 9, 60), (2, 1, 18, 100), (2, 1, 1, 2))),
        Sample("narrower", sample((3, 2, 5, 6), (1, 1, 4, 3), (1, 2, 1, 2))),
        Sample("empty", sample((2, 3, 4, 5), (2, 3, 0, 5), (1, 2, 1, 2))),
        Sample("no_layers", sample((0, 2, 3, 3), (2, 2, 3, 3), (1, 2, 1, 2))),
    ],
    bad_calls=[
        BadCall("modes", ValueError, "`s_o` must have 4 modes", bad(s_o=torch.ones(2, 3, 4))),
        BadCall(
            "mode", ValueError, "`s_b` must have the 3 slots of `weight`", bad(s_b=torch.ones(1, 2, 3, 2))
        ),
        BadCall("bond", ValueError, "between `s_o` and `s_l`", bad(s_o=torch.ones(2, 4, 4, 2))),
        BadCall("columns", ValueError, "from 0 to the 3 slots", bad(columns=4)),
        BadCall("columns_type", TypeError, "`columns` must be a whole number", bad(columns=1.0)),
        BadCall(
            "integer", TypeError, "must have dtype", bad(weight=torch.ones(2, 3, 4, 5, dtype=torch.int32))
        ),
        BadCall("list", TypeError, "`weight` must be a tensor", bad(weight=[1.0])),
    ],
    bound=bound,
    inputs=lambda args, kwargs: list(args),
    gradient_slack=30.0,  # each entry of a core's gradient is a sum over a whole mode of the target
)


def core(*rows):
    """A core of modes 1 x 1 with this matrix over its bonds."""
    return torch.tensor(rows, dtype=torch.float64)[:, None, None, :]


def mode(matrix):
    """A core of bonds 1 with this matrix."""
    return torch.tensor(matrix, dtype=torch.float64)[None, :, :, None]


def test_ring_of_one_entry_by_hand():
    """Example E4: the trace of the four bond matrices is 9."""
    cores = core([1, 2], [0, 1]), core([1, 0], [1, 1]), core([2, 0], [0, 1]), core([1, 1], [0, 1])
    grown = ops.tensor_ring_grow(torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64), *cores)
    assert grown.item() == 18


def test_rank_one_by_hand():
    """Example E5 with its gradients."""
    source = torch.tensor([3.0, 5.0], dtype=torch.float64).view(1, 2, 1, 1)
    cores = [mode([[1, 0], [2, 1]]), mode([[1, 1]]), mode([[1, -1]]), mode([[0.5, 0.5]])]
    for tensor in cores:
        tensor.requires_grad_()
    s_b, s_o, s_l, s_i = cores
    grown = ops.tensor_ring_grow(source, s_b, s_o, s_l, s_i)
    assert grown.flatten(2).tolist() == [[[6.5] * 4, [2.5] * 4], [[-6.5] * 4, [-2.5] * 4]]
    grown[0, 0].sum().backward()
    assert s_b.grad.flatten().tolist() == [6, 0, 10, 0]
    assert s_o.grad.flatten().tolist() == [13, 13]
    assert s_l.grad.flatten().tolist() == [26, 0]
    assert s_i.grad.flatten().tolist() == [26, 26]


@pytest.mark.parametrize("columns", [0, 3])
def test_identity_cores_return_the_source_bit_for_bit(columns):
    source = torch.randn(3, 5, 8, 8)
    cores = [torch.eye(n)[None, :, :, None] for n in (5, 8, 3, 8)]
    if columns:
        main, tail = ops.tensor_ring_grow(source, *cores, columns=columns)
        assert torch.equal(main, source[:, :2])
        assert torch.equal(tail, source[:, 2:].transpose(1, 2).flatten(2))
    else:
        assert torch.equal(ops.tensor_ring_grow(source, *cores), source)


def test_columns_are_the_blocks_of_a_linear_layer():
    made = ring((2, 4, 3, 3), (2, 4, 5, 5), (2, 2, 2, 2), torch.float64)
    whole = ops.tensor_ring_grow(*made)
    main, tail = ops.tensor_ring_grow(*made, columns=2)
    torch.testing.assert_close(main, whole[:, :2], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(tail[:, :, :5], whole[:, 2], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(tail[:, :, 5:], whole[:, 3], rtol=1e-12, atol=1e-14)


def test_a_matrix_and_its_inverse_on_a_bond_change_nothing():
    weight, *cores = ring((2, 3, 4, 4), (3, 3, 6, 6), (3, 3, 3, 3), torch.float64)
    want = ops.tensor_ring_grow(weight, *cores)
    for bond in range(4):
        turn = torch.randn(3, 3, dtype=torch.float64) + 3 * torch.eye(3, dtype=torch.float64)
        changed = list(cores)
        changed[bond] = changed[bond] @ turn
        follower = (bond + 1) % 4
        changed[follower] = torch.einsum("xy,yabz->xabz", turn.inverse(), changed[follower])
        torch.testing.assert_close(ops.tensor_ring_grow(weight, *changed), want, rtol=1e-10, atol=1e-10)


def test_linear_in_the_source_and_each_core():
    made = ring((2, 2, 3, 4), (2, 3, 5, 4), (2, 1, 2, 3), torch.float64)
    want = ops.tensor_ring_grow(*made)
    for place in range(5):
        other = torch.randn_like(made[place])
        call = lambda t, place=place: ops.tensor_ring_grow(*made[:place], t, *made[place + 1 :])  # noqa: E731
        torch.testing.assert_close(
            call(2 * made[place] + other), 2 * want + call(other), rtol=1e-11, atol=1e-13
        )


def test_order_of_layers_and_slots_is_a_relabelling():
    weight, s_b, s_o, s_l, s_i = ring((4, 5, 3, 3), (4, 5, 4, 4), (2, 2, 2, 2), torch.float64)
    want = ops.tensor_ring_grow(weight, s_b, s_o, s_l, s_i)
    layers, slots = torch.randperm(4), torch.randperm(5)
    got = ops.tensor_ring_grow(weight[layers][:, slots], s_b[:, slots], s_o, s_l[:, layers], s_i)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


def test_a_sum_of_terms_is_a_ring_of_diagonal_bonds():
    torch.manual_seed(0)
    weight = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    terms = [
        [torch.randn(n, m, dtype=torch.float64) for n, m in ((3, 4), (4, 6), (2, 3), (5, 7))]
        for _ in range(3)
    ]
    want = sum(torch.einsum("lboi,bc,op,lm,ij->mcpj", weight, *term) for term in terms)
    cores = [torch.zeros(3, *terms[0][x].shape, 3, dtype=torch.float64) for x in range(4)]
    for r, term in enumerate(terms):
        for tensor, matrix in zip(cores, term, strict=True):
            tensor[r, :, :, r] = matrix
    torch.testing.assert_close(ops.tensor_ring_grow(weight, *cores), want, rtol=1e-12, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(
    source=st.tuples(*(st.integers(1, 5) for _ in range(2)), *(st.integers(1, 60) for _ in range(2))),
    target=st.tuples(*(st.integers(1, 5) for _ in range(2)), *(st.integers(1, 60) for _ in range(2))),
    ranks=st.tuples(*(st.integers(1, 3) for _ in range(4))),
    order=st.permutations(range(4)),
)
def test_any_shape_rank_and_stride(source, target, ranks, order):
    made = ring(source, target, ranks, torch.float64)
    moved = [t.permute(order).contiguous().permute(*torch.tensor(order).argsort().tolist()) for t in made]
    want = reference.tensor_ring_grow(*made)
    torch.testing.assert_close(ops.tensor_ring_grow(*moved), want, rtol=1e-10, atol=1e-12)


def test_instruction_sets_differ_by_rounding_alone():
    script = """
import torch
from pyvitfast import ops
from tests.ops.test_tensor_ring_grow import ring
torch.manual_seed(0)
made = [t.requires_grad_() for t in ring((3, 4, 20, 50), (4, 5, 30, 70), (2, 2, 2, 2))]
out = ops.tensor_ring_grow(*made)
for t in (out, *torch.autograd.grad(out.square().sum(), made)):
    print(*t.detach().flatten().tolist()[:2000])
"""
    base, *others = (
        [torch.tensor([float(x) for x in line.split()]) for line in out.decode().splitlines()]
        for out in outputs_by_capability(script)
    )
    for other in others:
        for a, b in zip(base, other, strict=True):
            assert (a - b).abs().max() <= 2e-5 * a.abs().max()


@pytest.mark.parametrize(("rank", "operations"), [(1, 12.74e9), (4, 228.3e9), (10, 1733e9)])
def test_operations_of_the_best_order(rank, operations):
    """DeiT-Ti to DeiT-S; the digest's figures for the order O, B, L, I."""
    made = [torch.empty(12, 12, 192, 192, device="meta")]
    sizes = ((12, 12), (192, 384), (12, 12), (192, 384))
    made += [torch.empty(rank, *pair, rank, device="meta") for pair in sizes]
    with FlopCounterMode(display=False) as counter:
        ops.tensor_ring_grow(*made)
    assert counter.get_total_flops() == pytest.approx(operations, rel=2e-3)


def test_values_that_are_not_finite_spread():
    weight, *cores = ring((1, 2, 3, 3), (1, 2, 3, 3), (1, 1, 1, 1))
    weight[0, 1, 2, 2] = torch.nan
    assert ops.tensor_ring_grow(weight, *cores).isnan().all()


def test_bytes_between_the_cores_stay_small(counting):
    """One tile of 32 rows: what lies between is written and read once each."""
    made = ring((2, 3, 32, 64), (2, 3, 32, 128), (2, 2, 2, 2))
    ops.tensor_ring_grow(*made)
    (kernel,) = (k for name, k in counting.counters().items() if "strided_product" in name)
    ends = sum(t.numel() for t in made) + 2 * 3 * 32 * 128
    between = 2 * 3 * 4 * 32 * 64  # the first, second and third are of one size here
    assert kernel["launches"] == 4
    again = 5 * made[4].numel()  # the input core is read for each of the six matrices, from a cache
    assert kernel["bytes_moved"] <= 1.15 * 4 * (ends + 6 * between + again)
