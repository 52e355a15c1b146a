from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import Block
from torch.nn import functional as F

from pyvitfast import ops, reference
from pyvitfast.ops.semantic_pool_attention import absorbs
from tests.ops.table import EMULATED, BadCall, OpTable, Sample, strided, widened

MATRICES = ("q_weight", "k_weight", "v_weight", "proj_weight")
VECTORS = ("q_bias", "k_bias", "v_bias", "proj_bias")


def call(
    batch, queries, tokens, channels, heads, *, before=0, dtype=torch.float32, norm=True, bias=True, **kw
):
    """Arguments with every parameter away from zero and one, the tokens a view without their first row."""
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    args = [draw(batch, queries, channels).to(dtype), draw(batch, tokens + 1, channels).to(dtype)[:, 1:]]
    args += [(draw(channels, channels) * channels**-0.5).to(dtype) for _ in MATRICES]
    kwargs = {"num_heads": heads, **kw}
    if before:
        kwargs["tokens_before"] = draw(batch, before, channels).to(dtype)
    if bias:
        kwargs |= {name: (0.3 * draw(channels)).to(dtype) for name in VECTORS}
    if norm:
        kwargs |= {"norm_weight": (1 + 0.3 * draw(channels)).to(dtype)}
        kwargs |= {"norm_bias": (0.3 * draw(channels)).to(dtype)}
    return tuple(args), kwargs


def sample(*shape, **options):
    return lambda dtype: call(*shape, dtype=dtype, **options)


def bound(args, kwargs, expected, dtype):
    # A chain of six sums of up to C or N terms; errors are relative to the largest entries.
    unit = {torch.float64: 2e-13, torch.float32: 5e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[
        dtype
    ]
    return [e.abs() * unit + (e.abs().max() if e.numel() else 0.0) * unit for e in expected]


def bad(error, match, **changes):
    def make():
        args, kwargs = call(2, 3, 5, 8, 2)
        named = dict(zip(("query", "tokens", *MATRICES), args, strict=True)) | kwargs
        for name, change in changes.items():
            named[name] = change(named.get(name)) if callable(change) else change
        return tuple(named.pop(n) for n in ("query", "tokens", *MATRICES)), named

    return BadCall("_".join(changes) + "_" + match.split()[-1].strip("\\[].,"), error, match, make)


TABLE = OpTable(
    op="semantic_pool_attention",
    samples=[
        Sample("one_query", sample(2, 1, 9, 8, 2)),
        Sample("few", sample(2, 3, 17, 16, 2)),
        Sample("before", sample(2, 3, 30, 16, 2, before=3)),
        Sample("no_norm", sample(1, 4, 33, 24, 3, norm=False, before=4)),
        Sample("bare", sample(3, 2, 21, 12, 1, norm=False, bias=False)),
        Sample("many_rows", sample(1, 5, 130, 32, 4)),
        Sample("odd_width", sample(2, 2, 40, 35, 5)),
        Sample("no_images", sample(0, 2, 9, 8, 2)),
        Sample("no_queries", sample(2, 0, 9, 8, 2)),
        Sample("own_scale", sample(2, 2, 19, 8, 2, scale=0.3)),
    ],
    bad_calls=[
        bad(TypeError, "`query` must be a tensor, got list", query=[1.0]),
        bad(ValueError, r"`query` must have shape \[B, M, C\], got \[3, 8\]", query=lambda t: t[0]),
        bad(ValueError, r"`tokens` must have shape \[B, N, C\].*got \[1, 5, 8\]", tokens=lambda t: t[:1]),
        bad(
            ValueError, r"`tokens_before` must have shape.*got \[2, 1, 4\]", tokens_before=torch.ones(2, 1, 4)
        ),
        bad(ValueError, r"`v_weight` must have shape \[C, C\], C 8, got \[7, 8\]", v_weight=lambda t: t[1:]),
        bad(ValueError, r"`k_bias` must have shape \[C\], C 8, got \[7\]", k_bias=lambda t: t[1:]),
        bad(ValueError, "`num_heads` must divide the 8 channels, got 3", num_heads=3),
        bad(TypeError, "`num_heads` must be a whole number, got float", num_heads=2.5),
        bad(ValueError, "`norm_bias` needs `norm_weight`", norm_weight=None),
        bad(
            TypeError,
            "`tokens` must have the dtype of `query`, float32, got float64",
            tokens=lambda t: t.double(),
        ),
    ],
    bound=bound,
    inputs=lambda args, kwargs: [*args, *(t for t in kwargs.values() if isinstance(t, torch.Tensor))],
    gradient_slack=16.0,  # sums over images and tokens of products of four rounded factors
    casts=True,
)


def exact(args, kwargs):
    wide_args, wide_kwargs = widened((args, kwargs))
    return reference.semantic_pool_attention(*wide_args, **wide_kwargs)


def test_a_timm_block():
    """Queries that are among the keys: the last rows of ordinary self-attention."""
    torch.manual_seed(0)
    block = Block(48, 4, qkv_bias=True).double()
    for p in block.parameters():
        p.data += 0.2 * torch.randn_like(p)
    x = torch.randn(2, 40, 48).double()
    q, k, v = block.attn.qkv.weight.chunk(3)
    bq, bk, bv = block.attn.qkv.bias.chunk(3)
    for before in (None, x[:, :7]):
        got = ops.semantic_pool_attention(
            x[:, :3], x if before is None else x[:, 7:], q, k, v, block.attn.proj.weight,
            num_heads=4, tokens_before=before, q_bias=bq, k_bias=bk, v_bias=bv,
            proj_bias=block.attn.proj.bias,
            norm_weight=block.norm1.weight, norm_bias=block.norm1.bias, eps=block.norm1.eps,
        )  # fmt: skip
        torch.testing.assert_close(got, block.attn(block.norm1(x))[:, :3], rtol=0, atol=1e-12)


def test_without_query_weights_every_token_counts_alike():
    args, kwargs = call(2, 3, 20, 16, 2, dtype=torch.float64, before=3)
    kwargs["q_bias"] = torch.zeros(16).double()
    args = (*args[:2], torch.zeros(16, 16).double(), *args[3:])
    rows = torch.cat([kwargs["tokens_before"], args[1]], 1)
    x = F.layer_norm(rows, (16,), kwargs["norm_weight"], kwargs["norm_bias"], 1e-6)
    values = F.linear(x, args[4], kwargs["v_bias"]).mean(1, keepdim=True)
    want = F.linear(values, args[5], kwargs["proj_bias"]).expand(-1, 3, -1)
    torch.testing.assert_close(ops.semantic_pool_attention(*args, **kwargs), want, rtol=0, atol=1e-12)


def test_the_key_bias_has_no_effect_and_a_gradient_of_zeros():
    args, kwargs = call(2, 3, 20, 16, 2)
    expected = ops.semantic_pool_attention(*args, **kwargs)
    kwargs["k_bias"] = torch.full((16,), 7.0, requires_grad=True)
    got = ops.semantic_pool_attention(*args, **kwargs)
    assert torch.equal(got, expected)
    got.square().sum().backward()
    assert torch.count_nonzero(kwargs["k_bias"].grad) == 0


def test_the_order_of_tokens_does_not_matter():
    args, kwargs = call(2, 3, 20, 16, 2, dtype=torch.float64, before=4)
    expected = ops.semantic_pool_attention(*args, **kwargs)
    order = torch.randperm(20)
    moved = (args[0], args[1][:, order], *args[2:])
    torch.testing.assert_close(ops.semantic_pool_attention(*moved, **kwargs), expected, rtol=0, atol=1e-12)


def test_queries_do_not_see_each_other():
    args, kwargs = call(2, 4, 20, 24, 2, dtype=torch.float64)
    expected = ops.semantic_pool_attention(*args, **kwargs)
    one = ops.semantic_pool_attention(args[0][:, 2:3], *args[1:], **kwargs)
    torch.testing.assert_close(one, expected[:, 2:3], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("queries", "tokens"), [(20, 9), (2, 1), (3, 0)])
def test_many_queries_take_keys_and_values(queries, tokens):
    args, kwargs = call(2, queries, tokens, 8, 4, before=1)
    assert not absorbs(queries, tokens + 1, 8, 4)
    for t in TABLE.inputs(args, kwargs):
        t.requires_grad_()
    got, want = ops.semantic_pool_attention(*args, **kwargs), exact(args, kwargs)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    got.sum().backward()
    assert all(t.grad is not None for t in TABLE.inputs(args, kwargs))


@pytest.mark.parametrize("bias", [True, False])
def test_keys_and_values_of_a_fused_projection(bias):
    args, kwargs = call(2, 20, 9, 8, 4, before=1)
    weights = torch.randn(3, 8, 8)
    args = (*args[:2], *weights, args[5])
    biases = torch.randn(3, 8) if bias else [None] * 3
    kwargs |= dict(zip(("q_bias", "k_bias", "v_bias"), biases, strict=True))
    with torch.no_grad():
        got = ops.semantic_pool_attention(*args, **kwargs)
    torch.testing.assert_close(got.double(), exact(args, kwargs), rtol=1e-5, atol=1e-5)


def test_the_cheaper_form_is_taken():
    # DeiT-S over 196 tokens: it pays up to 55; over 4096 up to 75.
    assert absorbs(55, 196, 384, 6)
    assert not absorbs(56, 196, 384, 6)
    assert absorbs(75, 4096, 384, 6)
    assert not absorbs(76, 4096, 384, 6)
    assert absorbs(16, 196, 384, 6)
    assert not absorbs(100, 196, 384, 6)
    assert absorbs(16, 4096, 384, 6)
    assert not absorbs(16, 0, 384, 6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_all_queries_of_their_image(value):
    args, kwargs = call(2, 3, 20, 16, 2)
    args[1][1, 4, 2] = value
    out = ops.semantic_pool_attention(*args, **kwargs)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


@settings(max_examples=6 if EMULATED else 40, deadline=None)
@given(st.data())
def test_fuzz(data):
    batch, heads, queries = (data.draw(st.integers(1, n)) for n in (3, 4, 6))
    channels, tokens = heads * data.draw(st.integers(2, 16)), data.draw(st.integers(1, 140))
    before = data.draw(st.integers(0, 5))
    norm, bias = data.draw(st.booleans()), data.draw(st.booleans())
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    args, kwargs = call(
        batch, queries, tokens, channels, heads, before=before, dtype=dtype, norm=norm, bias=bias
    )
    args = (args[0], strided(args[1], data.draw(st.sampled_from(["plain", "step", "offset"]))), *args[2:])
    leaves = [t.requires_grad_() for t in TABLE.inputs(args, kwargs)]
    got = ops.semantic_pool_attention(*args, **kwargs)
    wide_args, wide_kwargs = widened((args, kwargs))
    wide = [t.requires_grad_() for t in TABLE.inputs(wide_args, wide_kwargs)]
    want = reference.semantic_pool_attention(*wide_args, **wide_kwargs)
    unit = 1e-5 if dtype == torch.float32 else 1e-12
    assert (got.double() - want).abs().max() <= unit * want.abs().max()
    upstream = torch.randn_like(got)
    slopes = torch.autograd.grad(got, leaves, upstream)
    for slope, expected in zip(slopes, torch.autograd.grad(want, wide, upstream.double()), strict=True):
        assert (slope.double() - expected).abs().max() <= 20 * unit * max(1.0, expected.abs().max().item())


def test_other_layouts_give_the_same():
    args, kwargs = call(2, 3, 33, 16, 2)
    expected = ops.semantic_pool_attention(*args, **kwargs)
    moved = tuple(strided(t, "step") for t in args)
    assert torch.equal(ops.semantic_pool_attention(*moved, **kwargs), expected)
    turned = (*args[:2], *(strided(t, "transposed") for t in args[2:]))
    torch.testing.assert_close(ops.semantic_pool_attention(*turned, **kwargs), expected)


def test_float32_norm_beside_16_bit_tokens():
    args, kwargs = call(2, 3, 33, 16, 2, dtype=torch.bfloat16)
    kwargs["norm_weight"], kwargs["norm_bias"] = kwargs["norm_weight"].float(), kwargs["norm_bias"].float()
    got = ops.semantic_pool_attention(*args, **kwargs)
    assert got.dtype == torch.bfloat16
    want = exact(args, kwargs)
    assert (got.double() - want).abs().max() <= 0.02 * want.abs().max()


def test_bytes_and_launches(counting):
    """Two images of a small model: launches as planned, tokens read once by each group of heads."""
    args, kwargs = call(2, 16, 128, 64, 2)
    counting.reset_counters()
    ops.semantic_pool_attention(*args, **kwargs)
    kernels = counting.counters()
    assert sum(k["launches"] for k in kernels.values()) == 8
    (attend,) = (k for name, k in kernels.items() if "attend" in name)
    rows, splits = 2 * 16, 2
    # Both groups of 16 rows read all tokens; each split reads u and writes its part.
    least = 4 * 2 * 64 * (2 * 128 + 2 * splits * rows)
    assert attend["bytes_moved"] <= 1.15 * least


def test_keys_and_values_are_never_made():
    """The backward pass keeps less than keys alone would take."""
    args, kwargs = call(4, 4, 200, 64, 4)
    for t in TABLE.inputs(args, kwargs):
        t.requires_grad_()
    kept = []
    given = {t.data_ptr() for t in TABLE.inputs(args, kwargs)}

    def keep(t):
        if t.data_ptr() not in given:
            kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        ops.semantic_pool_attention(*args, **kwargs)
    assert sum(kept) < 4 * 200 * 64
