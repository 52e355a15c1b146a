from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvitfast import ops, reference
from pyvitfast.reference import _spsa
from tests.ops.quantizer import outputs_by_capability, scale_like
from tests.ops.table import EMULATED, LAYOUTS, SIZES, BadCall, OpTable, Sample, strided

NOISES = ("uniform", "rademacher", "triangular", "logistic", "normal")
EXACT = NOISES[:3]
BASE = {"seed": 12345678901234567890, "one_minus_beta": 0.3, "eps_bar": 0.2886751, "bits": 2}


def sample(shapes, granularity="tensor", **kwargs):
    def make(dtype):
        given = torch.float32 if dtype == torch.float64 else dtype
        weights = [0.3 * torch.randn(s) for s in shapes]
        grads = [torch.randn(s).to(given) for s in shapes]
        scales = [scale_like(w, granularity, kwargs.get("group_size", 0)) for w in weights]
        norm = reference.scaled_sqnorm(grads, scales, group_size=kwargs.get("group_size", 0))
        return (weights, grads, scales, norm), {**BASE, **kwargs}

    return make


def bound(args, kwargs, expected, dtype):
    # Next to a threshold float64 may round to another level than the float32 reference, which the op
    # equals bit for bit.
    plus, minus = reference.spsa_perturb(*args, **kwargs)
    return [
        (own.double() - want).abs() + 1e-6 * want.abs()
        for own, want in zip((*plus, *minus), expected, strict=True)
    ]


def bad(**changes):
    def make():
        w = torch.ones(2, 3)
        call = {
            "weights": [w],
            "grads": [w],
            "scales": [torch.ones(())],
            "sqnorm": torch.ones((), dtype=torch.float64),
        }
        call |= {k: v for k, v in changes.items() if k in call}
        return tuple(call.values()), {**BASE, **{k: v for k, v in changes.items() if k not in call}}

    return make


TABLE = OpTable(
    op="spsa_perturb",
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    samples=[
        Sample("two_bits", sample([(5, 33), (7,), (1, 1)])),
        Sample(
            "half_integer_rows", sample([(5, 33), (64, 65)], "channel", grid="half_integer", directions=3)
        ),
        Sample(
            "groups", sample([(5, 33), (3, 4, 5, 2)], "group", group_size=7, direction=40, kind="rademacher")
        ),
        Sample("sign", sample([(33, 5)], grid="sign", bits=1, kind="triangular")),
        Sample("shards", sample([(9,), (300,)], offsets=[5, 2**33 + 2], tensor_ids=[2**32 - 1, 3])),
        Sample("empty", sample([(0, 4), (2,), (0,)], bits=8)),
    ],
    bad_calls=[
        BadCall(
            "half",
            TypeError,
            "must be float32, got bfloat16: in 16 bits",
            bad(weights=[torch.ones(2, 3).bfloat16()]),
        ),
        BadCall("shape", ValueError, r"`grads\[0\]` must have the shape", bad(grads=[torch.ones(3, 2)])),
        BadCall(
            "norm",
            ValueError,
            "`sqnorm` must have one element",
            bad(sqnorm=torch.ones(2, dtype=torch.float64)),
        ),
        BadCall("norm_dtype", TypeError, "`sqnorm` must have dtype float64", bad(sqnorm=torch.ones(()))),
        BadCall("bits", ValueError, "`bits` must be from 1 to 8, got 9", bad(bits=9)),
        BadCall("grid", ValueError, "`grid` must be one of integer", bad(grid="cubic")),
        BadCall("integer_one", ValueError, "'integer' with `bits` 1", bad(bits=1)),
        BadCall("sign_two", ValueError, "'sign' has two levels", bad(grid="sign")),
        BadCall("noise", ValueError, "`kind` must be one of", bad(kind="pink")),
        BadCall("seed", ValueError, "`seed` must be from 0", bad(seed=2**64)),
        BadCall("share", ValueError, "`one_minus_beta` must be from 0 to 1", bad(one_minus_beta=1.5)),
        BadCall("radius", ValueError, "`eps_bar` must be a finite", bad(eps_bar=float("nan"))),
        BadCall("ids", ValueError, "`tensor_ids` must have 1 entries", bad(tensor_ids=[1, 2])),
        BadCall("directions", ValueError, "`directions` must be from 1", bad(directions=0)),
        BadCall("dtype", TypeError, "`dtype` must be float32", bad(dtype=torch.float64)),
    ],
    bound=bound,
)


def hand(grid, sign_of_gradient=-1.0):
    # The digest's step has the coin +1; seed 0 throws -1 for direction 0, which a turned gradient undoes.
    w, g = torch.tensor([0.3, -0.2, 0.05, -0.45]), sign_of_gradient * torch.tensor([3.0, 0.0, -4.0, 0.0])
    scale = torch.tensor(0.25)
    norm = ops.scaled_sqnorm([g], [scale])
    assert norm.item() == 1.5625
    plus, minus = ops.spsa_perturb(
        [w], [g], [scale], norm, seed=0, one_minus_beta=0.01, eps_bar=0.28867513, bits=2, grid=grid
    )
    return plus[0][0].tolist(), minus[0][0].tolist()


def test_step_by_hand():
    assert hand("integer") == ([0.25, -0.25, 0.0, -0.5], [0.25, -0.25, 0.0, -0.5])
    assert hand("half_integer") == ([0.375, -0.125, -0.125, -0.375], [0.125, -0.125, 0.125, -0.375])


def test_quantised_algebra_by_hand():
    """Rounding, scale 1, theta (.4, -.6), g (3, 4), u (1, -1), s = 1: codes (1, -1) and (0, -1)."""
    theta, g, one = torch.tensor([0.4, -0.6]), torch.tensor([3.0, 4.0]), torch.ones(())
    norm = ops.scaled_sqnorm([g], [one])
    for seed in range(200):
        coin = 1.0 if _spsa.direction_sign(seed, 0) > 0 else -1.0
        u = _spsa.noise(seed, 0, 0, 0, 2, "rademacher", torch.device("cpu"))
        if coin == 1 and u.tolist() == [1.0, -1.0]:
            break
    plus, minus = ops.spsa_perturb(
        [theta],
        [g],
        [one],
        norm,
        seed=seed,
        one_minus_beta=0.36,
        eps_bar=0.2886751,
        bits=8,
        kind="rademacher",
    )
    assert plus[0][0].tolist() == [1.0, -1.0]
    assert minus[0][0].tolist() == [0.0, -1.0]


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize(
    ("grid", "bits"),
    [("sign", 1), ("half_integer", 1), *((g, b) for g in ("integer", "half_integer") for b in range(2, 9))],
)
def test_equals_the_float32_reference_bit_for_bit(grid, bits, kind):
    args, kwargs = sample(
        [(6, 51), (700,)], "group", group_size=8, grid=grid, bits=bits, kind=kind, directions=2
    )(torch.float32)
    got, want = ops.spsa_perturb(*args, **kwargs), reference.spsa_perturb(*args, **kwargs)
    for own, other in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        if kind in EXACT:
            assert torch.equal(own, other)
        else:  # noise to a few last bits, so a weight in a thousand may cross a threshold
            assert (own != other).float().mean() <= 1e-3


def test_inputs_are_read_only_and_extra_directions_continue():
    args, kwargs = sample([(33, 65)])(torch.float32)
    before = [t.clone() for t in (args[0][0], args[1][0])]
    whole = ops.spsa_perturb(*args, **kwargs, directions=40)[0][0]
    assert torch.equal(args[0][0], before[0])
    assert torch.equal(args[1][0], before[1])
    for first, count in ((0, 1), (5, 3), (31, 2), (39, 1)):
        part = ops.spsa_perturb(*args, **kwargs, direction=first, directions=count)[0][0]
        assert torch.equal(part, whole[first : first + count])


@pytest.mark.parametrize("start", [0, 1, 4, 6, 1000])
def test_a_shard_gives_its_part_of_the_whole(start):
    args, kwargs = sample([(5000,)], grid="half_integer")(torch.float32)
    whole = ops.spsa_perturb(*args, **kwargs)[0][0][0]
    part = slice(start, start + 1501)
    shard = ([args[0][0][part]], [args[1][0][part]], *args[2:])
    assert torch.equal(ops.spsa_perturb(*shard, **kwargs, offsets=[start])[0][0][0], whole[part])


def test_grouping_and_launches_change_no_bit():
    shapes = [(3, 5)] * 600
    args, kwargs = sample(shapes)(torch.float32)
    whole = ops.spsa_perturb(*args, **kwargs)[1]
    for i in (0, 279, 280, 599):
        alone = ops.spsa_perturb(*([a[i]] for a in args[:3]), args[3], **kwargs, tensor_ids=[i])[1]
        assert torch.equal(alone[0], whole[i])


@pytest.mark.parametrize("norm", [0.0, float("nan"), float("inf")])
def test_without_a_usable_norm_only_noise_is_left(norm):
    args, kwargs = sample([(5, 40)], grid="half_integer")(torch.float32)
    unguided = ops.spsa_perturb(
        args[0], [torch.zeros_like(args[1][0])], args[2], torch.zeros((), dtype=torch.float64), **kwargs
    )
    got = ops.spsa_perturb(
        args[0],
        [torch.full_like(args[1][0], norm)],
        args[2],
        torch.tensor(norm, dtype=torch.float64),
        **kwargs,
    )
    assert torch.equal(got[0][0], unguided[0][0])


def test_odd_weights_and_zero_scales_behave_as_the_reference():
    w = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-42, 3e38, 0.0])
    g = torch.zeros(6)
    for scale in (0.25, 0.0, 1e-40):
        args = ([w], [g], [torch.tensor(scale)], torch.zeros((), dtype=torch.float64))
        got, want = ops.spsa_perturb(*args, **BASE), reference.spsa_perturb(*args, **BASE)
        assert torch.equal(got[0][0].nan_to_num(9.0), want[0][0].nan_to_num(9.0))
        assert got[0][0].isnan()[0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_in_16_bits_are_the_rounded_ones(dtype):
    args, kwargs = sample([(5, 37)], bits=4)(torch.float32)
    wide = ops.spsa_perturb(*args, **kwargs)[0][0]
    assert torch.equal(ops.spsa_perturb(*args, **kwargs, dtype=dtype)[0][0], wide.to(dtype))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from(SIZES),
    cols=st.sampled_from(SIZES),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    granularity=st.sampled_from(["tensor", "channel", "group"]),
    offset=st.integers(0, 9),
)
def test_any_shape_and_stride(rows, cols, layouts, granularity, offset):
    (ws, gs, scales, norm), kwargs = sample([(rows, cols)], granularity, group_size=5, grid="half_integer")(
        torch.float32
    )
    want = reference.spsa_perturb(ws, gs, scales, norm, **kwargs, offsets=[offset])
    got = ops.spsa_perturb(
        [strided(ws[0], layouts[0])], [strided(gs[0], layouts[1])], scales, norm, **kwargs, offsets=[offset]
    )
    assert torch.equal(got[0][0], want[0][0])
    assert torch.equal(got[1][0], want[1][0])


@pytest.mark.skipif(EMULATED, reason="instruction sets belong to the CPU kernels")
def test_every_instruction_set_gives_the_same_bits():
    script = (
        "import torch, pyvitfast.ops as ops; torch.manual_seed(0);"
        "w, g, s = torch.randn(130, 77), torch.randn(130, 77), torch.rand(130);"
        "n = ops.scaled_sqnorm([g], [s]);"
        "print([ops.spsa_perturb([w], [g], [s], n, seed=5, one_minus_beta=.5, eps_bar=.3, bits=8, kind=k,"
        " directions=2)[0][0].view(torch.int32).tolist() for k in"
        " ('uniform', 'rademacher', 'triangular', 'logistic', 'normal')], n.item().hex())"
    )
    assert len(outputs_by_capability(script)) == 1


def test_bytes_moved_and_one_launch_for_a_deit(counting):
    shapes = [(192, 64), (64, 64), (256, 64), (64, 256)] * 12
    args, kwargs = sample(shapes)(torch.float32)
    counting.reset_counters()
    ops.spsa_perturb(*args, **kwargs)
    (kernel,) = counting.counters().values()
    assert kernel["launches"] == 1
    assert kernel["bytes_moved"] / (16 * sum(w.numel() for w in args[0])) <= 1.1
