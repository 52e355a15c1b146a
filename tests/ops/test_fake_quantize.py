from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvitfast import ops, reference
from tests.ops.quantizer import outputs_by_capability, scale_like
from tests.ops.table import EMULATED, LAYOUTS, SIZES, BadCall, OpTable, Sample, strided


def sample(shapes, granularity="tensor", **kwargs):
    def make(dtype):
        weights = [(0.3 * torch.randn(s)).to(dtype) for s in shapes]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        scales = [scale_like(w, granularity, kwargs.get("group_size", 0)).to(wide) for w in weights]
        # Gradients that come back in 16 bits would be rounded before the sums.
        out = {} if dtype in (torch.float32, torch.float64) else {"dtype": torch.float32}
        return (weights, scales), {"bits": 2, **kwargs, **out}

    return make


def bound(args, kwargs, expected, dtype):
    # Next to a threshold float64 may round to another level than float32, in which the reference is met.
    own = reference.fake_quantize(*args, **kwargs)
    return [(o.double() - want).abs() + 1e-6 * want.abs() for o, want in zip(own, expected, strict=True)]


def bad(**changes):
    def make():
        call = {"weights": [torch.ones(2, 3)], "scales": [torch.ones(())]}
        call |= {k: v for k, v in changes.items() if k in call}
        return tuple(call.values()), {"bits": 2, **{k: v for k, v in changes.items() if k not in call}}

    return make


TABLE = OpTable(
    op="fake_quantize",
    samples=[
        Sample("two_bits", sample([(5, 33), (7,), (1, 1)])),
        Sample("half_integer_rows", sample([(5, 33), (64, 65)], "channel", grid="half_integer", bits=3)),
        Sample("groups", sample([(5, 33), (3, 4, 5, 2)], "group", group_size=7, scale_gradient=True)),
        Sample("rounded", sample([(33, 5)], mask="rounded", bits=8)),
        Sample("identity", sample([(1100,)], mask="identity")),
        Sample("sign_tanh", sample([(33, 5)], "channel", grid="sign", mask="tanh", bits=1)),
        Sample("sign_hardtanh", sample([(33, 5)], grid="sign", mask="hardtanh", bits=1)),
        Sample("sign_approx", sample([(33, 5)], grid="sign", mask="approx_sign", bits=1)),
    ],
    bad_calls=[
        BadCall("bits", ValueError, "`bits` must be from 1 to 8, got 0", bad(bits=0)),
        BadCall("grid", ValueError, "`grid` must be one of", bad(grid="cubic")),
        BadCall("integer_one", ValueError, "'integer' with `bits` 1", bad(bits=1)),
        BadCall("sign_two", ValueError, "'sign' has two levels", bad(grid="sign", mask="tanh")),
        BadCall("mask", ValueError, "`mask` must be one of identity, hardtanh", bad(grid="sign", bits=1)),
        BadCall("mask_of_sign", ValueError, "`mask` must be one of lsq, rounded", bad(mask="tanh")),
        BadCall("scale_dtype", TypeError, "must have dtype float32", bad(scales=[torch.ones(()).half()])),
        BadCall("scale_count", ValueError, "for groups of 2", bad(scales=[torch.ones(5)], group_size=2)),
        BadCall("integer", TypeError, "must have dtype", bad(weights=[torch.ones(2, dtype=torch.int32)])),
        BadCall(
            "dtype",
            TypeError,
            "`dtype` must be float32, bfloat16, float16 for float32",
            bad(dtype=torch.float64),
        ),
    ],
    bound=bound,
    inputs=lambda args, kwargs: [*args[0], *args[1]],
    gradient_slack=100.0,  # gradients of scales are sums of a thousand terms of either sign
    surrogate=True,
)


@pytest.mark.parametrize(
    ("mask", "rows"),
    [
        ("lsq", [(0, 1), (1, 0.2), (1, -0.5), (1, -0.48), (0, -2), (0, 1)]),
        ("rounded", [(1, -0.48), (1, 0.2), (1, -0.5), (1, -0.48), (1, 0.48), (0, 1)]),
    ],
)
def test_row_of_lsq_by_hand(mask, rows):
    for ratio, (for_weight, for_scale) in zip((1.48, 0.8, 0.5, -0.52, -2.48, 1.5), rows, strict=True):
        w = torch.tensor([0.25 * ratio], dtype=torch.float64, requires_grad=True)
        s = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
        ops.fake_quantize([w], [s], bits=2, mask=mask)[0].sum().backward()
        assert w.grad.item() == for_weight
        assert s.grad.item() == pytest.approx(for_scale, abs=1e-12)


@pytest.mark.parametrize("bits", range(2, 9))
def test_rounded_mask_is_torchs_bit_for_bit(bits):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    w, s = torch.randn(7, 301), torch.tensor(0.13)
    w.flatten()[:40] = s * (torch.arange(40) - 20.5)  # ties
    mine, theirs = (w.clone().requires_grad_() for _ in range(2))
    got = ops.fake_quantize([mine], [s], bits=bits, mask="rounded")[0]
    want = torch.fake_quantize_per_tensor_affine(theirs, s, torch.zeros((), dtype=torch.int32), low, high)
    assert torch.equal(got, want)
    upstream = torch.randn_like(w)
    got.backward(upstream)
    want.backward(upstream)
    assert torch.equal(mine.grad, theirs.grad)


def test_rounded_mask_has_the_scale_gradient_of_torch():
    w, s = torch.randn(50, 30), torch.tensor([0.13], requires_grad=True)
    other = s.detach().clone().requires_grad_()
    ops.fake_quantize([w], [s], bits=3, mask="rounded")[0].square().sum().backward()
    torch._fake_quantize_learnable_per_tensor_affine(
        w, other, torch.zeros(1), -4, 3, 1.0
    ).square().sum().backward()
    torch.testing.assert_close(s.grad, other.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("grid", "low", "high"), [("integer", -2.0, 1.0), ("half_integer", -1.5, 1.5)])
def test_smoothed_quantiser_is_the_clip_whose_slope_the_mask_is(grid, low, high):
    """The mean over a uniform shift of one step is clip(w, lowest level, highest level)."""
    w = torch.linspace(-1, 1, 41, dtype=torch.float64)
    shifts = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000 - 0.5
    s = torch.tensor(0.25, dtype=torch.float64)
    smooth = ops.fake_quantize([w[:, None] + s * shifts], [s], bits=2, grid=grid)[0].mean(1)
    torch.testing.assert_close(smooth, w.clamp(low * 0.25, high * 0.25), atol=2e-4, rtol=0)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_factor_of_lsq(granularity):
    w, s = torch.randn(6, 22), scale_like(torch.randn(6, 22), granularity, 5)
    grads = []
    for scaled in (False, True):
        leaf = s.clone().requires_grad_()
        ops.fake_quantize([w], [leaf], bits=4, group_size=5, scale_gradient=scaled)[0].sum().backward()
        grads.append(leaf.grad)
    count = {
        "tensor": torch.tensor(132.0),
        "channel": torch.full((6,), 22.0),
        "group": torch.tensor([5.0] * 4 + [2]),
    }
    torch.testing.assert_close(grads[1], grads[0] / torch.sqrt(7 * count[granularity]), rtol=1e-6, atol=1e-7)


def test_odd_weights_and_zero_scales_behave_as_the_reference():
    w = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-42, 3e38, 0.0, -0.0])
    for scale in (0.25, 0.0, 1e-40):
        args = ([w], [torch.tensor(scale)])
        got, want = (f(*args, bits=3)[0] for f in (ops.fake_quantize, reference.fake_quantize))
        assert torch.equal(got.nan_to_num(9.0), want.nan_to_num(9.0))
    leaf = torch.tensor([float("nan"), 0.1], requires_grad=True)
    ops.fake_quantize([leaf], [torch.tensor(0.25)], bits=3)[0].sum().backward()
    assert leaf.grad.isnan().tolist() == [True, False]


def test_empty_tensors_and_their_scales():
    w, s = torch.zeros(0, 4, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    (out,) = ops.fake_quantize([w], [s], bits=2)
    out.sum().backward()
    assert out.shape == (0, 4)
    assert s.grad.item() == 0
    assert ops.fake_quantize([], [], bits=2) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_in_16_bits_are_the_rounded_ones(dtype):
    w, s = torch.randn(5, 37), torch.rand(5)
    wide = ops.fake_quantize([w], [s], bits=4)[0]
    assert torch.equal(ops.fake_quantize([w], [s], bits=4, dtype=dtype)[0], wide.to(dtype))


def test_more_tensors_than_one_launch_holds():
    ws = [torch.randn(3, 2, requires_grad=True) for _ in range(650)]
    ss = [torch.full((), 0.2, requires_grad=True) for _ in ws]
    torch.cat(ops.fake_quantize(ws, ss, bits=2)).square().sum().backward()
    for i in (0, 299, 300, 649):
        w, s = ws[i].detach().requires_grad_(), ss[i].detach().requires_grad_()
        reference.fake_quantize([w], [s], bits=2)[0].square().sum().backward()
        torch.testing.assert_close(ws[i].grad, w.grad)
        torch.testing.assert_close(ss[i].grad, s.grad)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from(SIZES),
    cols=st.sampled_from(SIZES),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(TABLE.dtypes),
    granularity=st.sampled_from(["tensor", "channel", "group"]),
    quantiser=st.sampled_from(
        [("integer", 2), ("half_integer", 1), ("half_integer", 5), ("integer", 8), ("sign", 1)]
    ),
)
def test_any_shape_and_stride(rows, cols, layout, dtype, granularity, quantiser):
    grid, bits = quantiser
    w = (0.3 * torch.randn(rows, cols)).to(dtype)
    scale = scale_like(w, granularity, 5).to(torch.float64 if dtype == torch.float64 else torch.float32)
    options = {"bits": bits, "grid": grid, "mask": "hardtanh" if grid == "sign" else "lsq", "group_size": 5}
    results = []
    for function, value in ((reference.fake_quantize, w), (ops.fake_quantize, strided(w, layout))):
        leaf, s = value.detach().requires_grad_(), scale.clone().requires_grad_()
        (out,) = function([leaf], [s], **options)
        out.sum().backward()
        results.append((out, leaf.grad, s.grad))
    for want, got in zip(results[0][:2], results[1][:2], strict=True):
        assert torch.equal(got, want)
    slack = max(cols, 1) * max(rows, 1)
    torch.testing.assert_close(
        results[1][2], results[0][2], rtol=1e-6, atol=1e-7 * math.sqrt(slack) * 2**bits
    )


@pytest.mark.skipif(EMULATED, reason="instruction sets belong to the CPU kernels")
def test_every_instruction_set_gives_the_same_bits():
    script = (
        "import torch, pyvitfast.ops as ops; torch.manual_seed(0); out = []\n"
        "for grid, bits, mask in ("
        "('integer', 2, 'lsq'), ('half_integer', 3, 'rounded'), ('sign', 1, 'tanh')):\n"
        "    w, s = torch.randn(130, 77, requires_grad=True), torch.rand(130, requires_grad=True)\n"
        "    q = ops.fake_quantize([w], [s], bits=bits, grid=grid, mask=mask, scale_gradient=True)[0]\n"
        "    q.backward(torch.randn_like(q))\n"
        "    out += [t.detach().view(torch.int32).tolist() for t in (q, w.grad, s.grad)]\n"
        "print(out)"
    )
    assert len(outputs_by_capability(script)) == 1


def test_bytes_moved_and_one_launch_each_way(counting):
    ws = [torch.randn(s, requires_grad=True) for s in [(192, 64), (64, 64), (256, 64), (64, 256)] * 12]
    count = sum(w.numel() for w in ws)
    out = ops.fake_quantize(ws, [torch.rand((), requires_grad=True) for _ in ws], bits=2)
    (kernel,) = counting.counters().values()
    assert kernel["launches"] == 1
    assert kernel["bytes_moved"] / (8 * count) <= 1.1
    counting.reset_counters()
    torch.autograd.backward(out, [torch.ones_like(w) for w in ws])
    (kernel,) = counting.counters().values()
    assert kernel["launches"] == 1
    assert kernel["bytes_moved"] / (12 * count) <= 1.1
