from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvitfast import ops, reference
from pyvitfast.reference import _spsa
from tests.ops.quantizer import bits_of, outputs_by_capability, scale_like
from tests.ops.table import EMULATED, LAYOUTS, SIZES, BadCall, OpTable, Sample, strided

NOISES = ("uniform", "rademacher", "triangular", "logistic", "normal")
BASE = {"seed": 12345678901234567890, "one_minus_beta": 0.3}
ZERO = torch.zeros((), dtype=torch.float64)


def sample(shapes, granularity="tensor", slopes=(0.7,), **kwargs):
    def make(dtype):
        given = torch.float32 if dtype == torch.float64 else dtype
        grads = [torch.randn(s).to(given) for s in shapes]
        scales = [scale_like(g, granularity, kwargs.get("group_size", 0)) for g in grads]
        norm = reference.scaled_sqnorm(grads, scales, group_size=kwargs.get("group_size", 0))
        return (grads, scales, torch.tensor(slopes), norm), {**BASE, **kwargs}

    return make


def bound(args, kwargs, expected, dtype):
    # A few roundings of the terms, which at most |slope| / scale * (1 + noise) in size may cancel.
    unit = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
    most = float(args[2].abs().sum()) / 0.1 * 6
    return [want.abs() * unit + 2e-6 * most for want in expected]


def bad(**changes):
    def make():
        call = {
            "grads": [torch.ones(2, 3)],
            "scales": [torch.ones(())],
            "slopes": torch.ones(1),
            "sqnorm": ZERO,
        }
        call |= {k: v for k, v in changes.items() if k in call}
        return tuple(call.values()), {**BASE, **{k: v for k, v in changes.items() if k not in call}}

    return make


TABLE = OpTable(
    op="spsa_update_",
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    samples=[
        Sample("one", sample([(5, 33), (7,), (1, 1)])),
        Sample("rows", sample([(5, 33), (64, 65)], "channel", slopes=(0.7, -0.2, 0.1))),
        Sample(
            "groups", sample([(5, 33), (3, 4, 5, 2)], "group", group_size=7, direction=40, kind="rademacher")
        ),
        Sample("shards", sample([(9,), (300,)], offsets=[5, 2**33 + 2], tensor_ids=[2**32 - 1, 3])),
        Sample("empty", sample([(0, 4), (2,), (0,)], kind="triangular")),
    ],
    bad_calls=[
        BadCall(
            "double",
            TypeError,
            "must have dtype float32, bfloat16, float16",
            bad(grads=[torch.ones(2).double()], scales=[torch.ones((), dtype=torch.float64)]),
        ),
        BadCall("slopes", ValueError, "`slopes` must have one entry a direction", bad(slopes=torch.ones(0))),
        BadCall("slopes_type", TypeError, "`slopes` must be a tensor", bad(slopes=1.0)),
        BadCall("norm", ValueError, "`sqnorm` must have one element", bad(sqnorm=torch.ones(2).double())),
        BadCall("seed", ValueError, "`seed` must be from 0", bad(seed=-1)),
        BadCall("noise", ValueError, "`kind` must be one of", bad(kind="pink")),
        BadCall("offsets", ValueError, r"`offsets\[0\]` must be at least 0", bad(offsets=[-1])),
        BadCall("device", ValueError, "must be on the device", bad(slopes=torch.ones(1, device="meta"))),
    ],
    bound=bound,
    mutated=lambda args: args[0],
)


def drawn(count, seed=0, tensor=0, direction=0, kind="uniform"):
    """The noise itself: scale 1, slope 1, beta 0."""
    out = torch.zeros(count)
    ops.spsa_update_(
        [out], [torch.ones(())], torch.ones(1), ZERO, seed=seed, one_minus_beta=1.0, kind=kind,
        direction=direction, tensor_ids=[tensor],
    )  # fmt: skip
    return out


def test_noise_has_the_published_bits():
    first = ["3fb0f06f", "bed3e96a", "bf6a5f5e", "bfaeee6b", "bdc4ef2e", "3fa08d91", "bf87b66b", "3e0394e5"]
    assert bits_of(drawn(8)) == first
    assert bits_of(drawn(4, tensor=1)) == ["bfd64e90", "be560c1b", "3e513d6e", "bfd6d348"]
    assert bits_of(drawn(4, direction=1)) == ["3f1ead9e", "3e859bbe", "bd27d1ae", "bfa1e517"]
    assert bits_of(drawn(4, seed=42)) == ["bfab9d93", "3fcfc60b", "3e81e2a0", "3f9723c4"]
    far = drawn(24, seed=0x123456789ABCDEF0, tensor=3, direction=2)
    assert bits_of(far[20:]) == ["bf6b2aa1", "3ec72107", "3f95c70a", "bf1293fb"]


@pytest.mark.parametrize(
    ("counter", "key", "rounds", "out"),
    [
        ((0, 0, 0, 0), 0, 10, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, 2**64 - 1, 10, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            10,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
        ((0, 0, 0, 0), 0, 7, "5f6fb709 0d893f64 4f121f81 4f730a48"),
    ],
)
def test_reference_generator_has_the_vectors_of_random123(counter, key, rounds, out):
    words = _spsa.philox(list(counter), key, rounds)
    assert [f"{w:08x}" for w in words] == out.split()


def test_coins_of_directions():
    for seed, signs in ((0, [-1, -1, -1, -1]), (42, [1, 1, -1, -1])):
        for direction, sign in enumerate(signs):
            g = torch.tensor([3.0, -4.0])
            norm = ops.scaled_sqnorm([g], [torch.ones(())])
            ops.spsa_update_(
                [g], [torch.ones(())], torch.ones(1), norm, seed=seed, one_minus_beta=0.0, direction=direction
            )
            torch.testing.assert_close(g, sign * torch.tensor([0.6, -0.8]))


def test_step_by_hand():
    # The coin of seed 0 is -1; the digest's step has +1, so the gradient is turned.
    g = -torch.tensor([3.0, 0.0, -4.0, 0.0])
    scale = torch.tensor(0.25)
    norm = ops.scaled_sqnorm([g], [scale])
    ops.spsa_update_([g], [scale], torch.tensor([-0.8660254]), norm, seed=0, one_minus_beta=0.01)
    want = torch.tensor([-2.546898, 0.143376, 3.074535, 0.473422])
    torch.testing.assert_close(g, want, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("kind", "kurtosis"), [*zip(NOISES, (1.8, 1.0, 2.4, 4.2, 3.0), strict=True)])
def test_moments_of_the_noise(kind, kurtosis):
    count = 2**20 if not EMULATED else 2**16
    u = drawn(count, seed=7, kind=kind).double()
    assert abs(u.mean()) <= 4 / math.sqrt(count)
    assert abs(u.square().mean() - 1) <= 4 * math.sqrt(max(kurtosis - 1, 0) / count) + 1e-6
    eighth = float((u**8).mean())
    assert abs((u**4).mean() - kurtosis) <= 4 * math.sqrt(max(eighth - kurtosis**2, 0) / count) + 1e-4


@pytest.mark.parametrize("change", [{"seed": 8}, {"seed": 2**40}, {"tensor": 1}, {"direction": 1}])
def test_other_noise_is_uncorrelated(change):
    count = 2**16
    u, v = drawn(count, seed=7), drawn(count, **{"seed": 7, **change})
    assert abs(float((u * v).mean())) <= 4 / math.sqrt(count)


@pytest.mark.parametrize("kind", NOISES)
def test_equals_the_float32_reference(kind):
    args, kwargs = sample([(6, 51), (700,)], "group", (0.7, -0.3), group_size=8, kind=kind)(torch.float32)
    want = [g.clone() for g in args[0]]
    reference.spsa_update_(want, *args[1:], **kwargs)
    ops.spsa_update_(*args, **kwargs)
    for own, other in zip(args[0], want, strict=True):
        if kind in NOISES[:3]:
            assert torch.equal(own, other)
        else:
            torch.testing.assert_close(own, other, rtol=4e-6, atol=4e-5)


def test_the_same_call_on_kept_gradients_gives_the_same():
    args, kwargs = sample([(33, 65)], slopes=(0.5, 0.25, -1.0, 2.0))(torch.float32)
    kept = [args[0][0].clone()]
    ops.spsa_update_(*args, **kwargs)
    ops.spsa_update_(kept, *args[1:], **kwargs)
    assert torch.equal(kept[0], args[0][0])


def test_more_directions_than_a_warp():
    args, kwargs = sample([(70,)], slopes=tuple(torch.randn(70).tolist()))(torch.float32)
    want = [args[0][0].clone()]
    reference.spsa_update_(want, *args[1:], **kwargs)
    ops.spsa_update_(*args, **kwargs)
    assert torch.equal(args[0][0], want[0])


def test_shards_and_launches_change_no_bit():
    args, kwargs = sample([(5,)] * 800)(torch.float32)
    kept = [g.clone() for g in args[0]]
    ops.spsa_update_(*args, **kwargs)
    for i in (0, 359, 360, 799):
        ops.spsa_update_([kept[i]], [args[1][i]], *args[2:], **kwargs, tensor_ids=[i])
        assert torch.equal(kept[i], args[0][i])
    (whole, *rest), kwargs = sample([(5000,)])(torch.float32)
    part = whole[0][1003:2007].clone()
    ops.spsa_update_(whole, *rest, **kwargs)
    ops.spsa_update_([part], *rest, **kwargs, offsets=[1003])
    assert torch.equal(part, whole[0][1003:2007])


def test_without_a_usable_norm_only_noise_is_left():
    want = torch.zeros(40)
    ops.spsa_update_([want], [torch.ones(())], torch.ones(1), ZERO, **BASE)
    for value in (0.0, float("nan"), float("inf")):
        g = torch.full((40,), value)
        ops.spsa_update_(
            [g], [torch.ones(())], torch.ones(1), torch.tensor(value, dtype=torch.float64), **BASE
        )
        assert torch.equal(g, want)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from(SIZES),
    cols=st.sampled_from(SIZES),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(TABLE.dtypes),
    granularity=st.sampled_from(["tensor", "channel", "group"]),
)
def test_any_shape_and_stride(rows, cols, layout, dtype, granularity):
    (gs, *rest), kwargs = sample([(rows, cols)], granularity, (0.7, -0.3), group_size=5)(dtype)
    own = strided(gs[0], layout)
    reference.spsa_update_(gs, *rest, **kwargs)
    ops.spsa_update_([own], *rest, **kwargs)
    assert torch.equal(own, gs[0])


@pytest.mark.skipif(EMULATED, reason="instruction sets belong to the CPU kernels")
def test_every_instruction_set_gives_the_same_bits():
    script = (
        "import torch, pyvitfast.ops as ops; torch.manual_seed(0);"
        "s, c = torch.rand(130), torch.tensor([.5, -.25]); out = []\n"
        "for k in ('uniform', 'rademacher', 'triangular', 'logistic', 'normal'):\n"
        "    g = torch.randn(130, 77); n = ops.scaled_sqnorm([g], [s])\n"
        "    ops.spsa_update_([g], [s], c, n, seed=5, one_minus_beta=.5, kind=k)\n"
        "    out.append(g.view(torch.int32).tolist())\n"
        "print(out)"
    )
    assert len(outputs_by_capability(script)) == 1


def test_bytes_moved_and_one_launch_for_a_deit(counting):
    args, kwargs = sample([(192, 64), (64, 64), (256, 64), (64, 256)] * 12)(torch.float32)
    counting.reset_counters()
    ops.spsa_update_(*args, **kwargs)
    (kernel,) = counting.counters().values()
    assert kernel["launches"] == 1
    assert kernel["bytes_moved"] / (8 * sum(g.numel() for g in args[0])) <= 1.1
