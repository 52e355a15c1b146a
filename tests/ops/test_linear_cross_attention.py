from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.crossvit import CrossAttention

from pyvitfast import ops, reference
from pyvitfast.ops.linear_cross_attention import folds
from tests.ops.table import EMULATED, LAYOUTS, BadCall, OpTable, Sample, strided, widened

MATRICES = ("q_weight", "k_weight", "v_weight", "proj_weight")
VECTORS = ("q_bias", "k_bias", "v_bias", "proj_bias")


def call(batch, tokens, channels, heads, dtype=torch.float32, norm=True, bias=True, scale=None):
    """Arguments with every parameter away from zero and one, the tokens a view without their first row."""
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    query, rows = draw(batch, channels), draw(batch, tokens + 1, channels)
    args = [query.to(dtype), rows.to(dtype)[:, 1:]]
    args += [(draw(channels, channels) * channels**-0.5).to(dtype) for _ in MATRICES]
    kwargs = {"num_heads": heads}
    if bias:
        kwargs |= {name: (0.3 * draw(channels)).to(dtype) for name in VECTORS}
    if norm:
        kwargs |= {"norm_weight": (1 + 0.3 * draw(channels)).to(dtype)}
        kwargs |= {"norm_bias": (0.3 * draw(channels)).to(dtype)}
    if scale is not None:
        kwargs["scale"] = scale
    return tuple(args), kwargs


def sample(*shape, **options):
    return lambda dtype: call(*shape, dtype=dtype, **options)


def bound(args, kwargs, expected, dtype):
    # A result is a chain of six sums of up to C or N terms, in float32 of relative error 2^-24 each step;
    # their errors are relative to the largest entries. 16-bit results are rounded once at the end.
    if dtype == torch.float64:
        return [
            e.abs().max().nan_to_num(0) * 1e-13 + torch.zeros_like(e) if e.numel() else e for e in expected
        ]
    rounding = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    # Matrix units of a GPU take the normalised rows in 16 bits, as eager does.
    rows = rounding if EMULATED and "norm_weight" in kwargs else 0.0
    limits = []
    for e in expected:
        largest = e.abs().max() if e.numel() else torch.zeros(())
        limits.append(e.abs() * rounding + largest * (4e-6 + rows))
    return limits


def bad(error, match, **changes):
    def make():
        args, kwargs = call(2, 3, 8, 2)
        named = dict(zip(("query", "tokens", *MATRICES), args, strict=True)) | kwargs
        for name, change in changes.items():
            named[name] = change(named.get(name)) if callable(change) else change
        return tuple(named.pop(n) for n in ("query", "tokens", *MATRICES)), named

    name = "_".join(changes) + "_" + match.split()[-1].strip("\\[].,")
    return BadCall(name, error, match, make)


TABLE = OpTable(
    op="linear_cross_attention",
    samples=[
        Sample("one_image", sample(1, 5, 8, 2)),
        Sample("no_norm", sample(2, 17, 12, 3, norm=False)),
        Sample("no_bias", sample(2, 33, 16, 4, bias=False)),
        Sample("bare", sample(3, 2, 6, 1, norm=False, bias=False)),
        Sample("several_splits", sample(2, 130, 32, 4)),
        Sample("odd_width", sample(5, 20, 35, 5)),
        Sample("seven_heads", sample(2, 40, 56, 7)),
        Sample("twelve_heads", sample(9, 9, 96, 12)),
        Sample("only_the_query", sample(2, 0, 8, 2)),
        Sample("no_images", sample(0, 4, 8, 2)),
        Sample("own_scale", sample(2, 9, 8, 2, scale=0.3)),
    ],
    bad_calls=[
        bad(TypeError, "`query` must be a tensor, got list", query=[1.0]),
        bad(TypeError, "`q_bias` must be a tensor, got float", q_bias=1.0),
        bad(ValueError, r"`query` must have shape \[B, C\], got \[8\]", query=lambda t: t[0]),
        bad(ValueError, r"`tokens` must have shape \[B, N, C\].*got \[3, 8\]", tokens=lambda t: t[0]),
        bad(ValueError, r"`tokens` must have shape \[B, N, C\].*got \[1, 3, 8\]", tokens=lambda t: t[:1]),
        bad(ValueError, r"`v_weight` must have shape \[C, C\], C 8, got \[7, 8\]", v_weight=lambda t: t[1:]),
        bad(ValueError, r"`k_bias` must have shape \[C\], C 8, got \[7\]", k_bias=lambda t: t[1:]),
        bad(ValueError, "`num_heads` must divide the 8 channels, got 3", num_heads=3),
        bad(ValueError, "`num_heads` must divide the 8 channels, got 0", num_heads=0),
        bad(TypeError, "`num_heads` must be a whole number, got float", num_heads=2.5),
        bad(ValueError, "`norm_bias` needs `norm_weight`", norm_weight=None),
        bad(TypeError, "must have dtype float32", query=lambda t: t.long()),
        bad(
            TypeError,
            "`tokens` must have the dtype of `query`, float32, got float64",
            tokens=lambda t: t.double(),
        ),
        bad(
            TypeError,
            "`k_weight` must have the dtype of `query`, float32, got bfloat16",
            k_weight=lambda t: t.bfloat16(),
        ),
        bad(
            ValueError,
            r"`tokens` must be on the device of `query` \(cpu\), got meta",
            tokens=lambda t: t.to("meta"),
        ),
        bad(TypeError, "must be a strided tensor", k_weight=lambda t: t.to_sparse()),
    ],
    bound=bound,
    inputs=lambda args, kwargs: [*args, *(t for t in kwargs.values() if isinstance(t, torch.Tensor))],
    gradient_slack=8.0,  # sums over images and tokens of products of four rounded factors
    casts=True,
)


def test_hand_worked_example():
    """C = 2, two heads one wide; keys whose bias must not matter."""
    log2, half3 = math.log(2), math.log(3) / 2
    x = torch.tensor([[[1.0, 1.0], [0.0, 1.0], [2.0, 0.0]]], dtype=torch.float64)
    weights = [
        torch.tensor(w, dtype=torch.float64, requires_grad=True)
        for w in ([[1, 0], [0, 2]], [[log2, 0], [0, half3]], [[1, 2], [3, -1]], [[1, 1], [0, 7]])
    ]
    vectors = [
        torch.tensor(b, dtype=torch.float64, requires_grad=True) for b in ([0, 0], [5, -3], [1, 0], [0, 1.0])
    ]
    query, rows = x[:, 0].clone().requires_grad_(), x[:, 1:].clone().requires_grad_()
    op = torch.ops.pyvitfast.linear_cross_attention  # the public function takes the unfolded way here
    out, _ = op(query, rows, *weights, *vectors, None, None, 2, 1e-6, 1.0, True)
    torch.testing.assert_close(out, torch.tensor([[32 / 7, 10.0]], dtype=torch.float64), rtol=0, atol=1e-14)
    out[0, 0].backward()
    q, k, v, o = (w.grad * 49 for w in weights)
    close = lambda got, want: torch.testing.assert_close(  # noqa: E731
        got, torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-12
    )
    close(k, [[-6.0, 8.0], [162.0, -66.0]])
    close(v, [[70.0, 21.0], [35.0, 42.0]])
    close(o, [[161.0, 63.0], [0.0, 0.0]])
    dq = [-6 * log2, -16.5 * math.log(3)]
    close(q, [[dq[0], dq[0]], [dq[1], dq[1]]])
    assert vectors[1].grad.tolist() == [0.0, 0.0]
    close(rows.grad[0, 0] * 49, [70 - 2 * log2, -7 - 48 * math.log(3)])
    as_row = [77 + 10 * log2, 7 + 15 * math.log(3)]
    close(query.grad[0] * 49, [as_row[0] + dq[0], as_row[1] + 2 * dq[1]])


def run(args, kwargs):
    return ops.linear_cross_attention(*args, **kwargs)


def exact(args, kwargs):
    wide_args, wide_kwargs = widened((args, kwargs))
    return reference.linear_cross_attention(*wide_args, **wide_kwargs)


def distance(out, want):
    return (out.double() - want).square().mean().sqrt()


def test_the_key_bias_has_no_effect_and_a_gradient_of_zeros():
    args, kwargs = call(3, 20, 16, 4)
    kwargs["k_bias"].requires_grad_()
    out = run(args, kwargs)
    out.sum().backward()
    assert torch.equal(kwargs["k_bias"].grad, torch.zeros(16))
    assert torch.equal(run(args, kwargs | {"k_bias": kwargs["k_bias"] + 100}), out)


def test_order_of_the_tokens_does_not_matter():
    args, kwargs = call(2, 40, 16, 4, dtype=torch.float64)
    order = torch.randperm(40)
    tokens = args[1].clone().requires_grad_()
    shuffled = args[1][:, order].clone().requires_grad_()
    first = run((args[0], tokens, *args[2:]), kwargs)
    second = run((args[0], shuffled, *args[2:]), kwargs)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-14)
    first.sum().backward()
    second.sum().backward()
    torch.testing.assert_close(shuffled.grad, tokens.grad[:, order], rtol=0, atol=1e-13)


def test_every_row_twice_changes_nothing():
    args, kwargs = call(2, 20, 16, 4, dtype=torch.float64)
    query, tokens = args[:2]
    twice = torch.cat([query[:, None], tokens, tokens], 1)
    torch.testing.assert_close(run((query, twice, *args[2:]), kwargs), run(args, kwargs), rtol=0, atol=1e-14)


def test_equal_rows_give_the_value_of_one_and_no_gradient_of_the_keys():
    args, kwargs = call(2, 20, 16, 4, dtype=torch.float64, norm=False)
    query = args[0]
    weights = [w.clone().requires_grad_() for w in args[2:]]
    out = run((query, query[:, None].expand(2, 20, 16), *weights), kwargs)
    value = query @ weights[2].T + kwargs["v_bias"]
    torch.testing.assert_close(out, value @ weights[3].T + kwargs["proj_bias"], rtol=0, atol=1e-13)
    out.sum().backward()
    assert weights[1].grad.abs().max() < 1e-13


def test_linear_in_values_and_output_layer():
    args, kwargs = call(2, 20, 16, 4, dtype=torch.float64, norm=False)
    query, tokens, q, k, v, o = args
    once = run(args, kwargs)
    doubled = kwargs | {"proj_bias": 2 * kwargs["proj_bias"]}
    torch.testing.assert_close(run((query, tokens, q, k, v, 2 * o), doubled), 2 * once, rtol=0, atol=1e-13)
    values = kwargs | {"v_bias": 2 * kwargs["v_bias"], "proj_bias": None}
    alone = run(args, kwargs | {"proj_bias": None})
    torch.testing.assert_close(run((query, tokens, q, k, 2 * v, o), values), 2 * alone, rtol=0, atol=1e-13)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [False, True])
def test_non_finite_tokens_spoil_their_image_only(value, dtype, norm):
    args, kwargs = call(3, 70, 32, 4, dtype=dtype, norm=norm)
    args[1][1, 66, 5] = value
    out = run(args, kwargs)
    expected = reference.linear_cross_attention(*args, **kwargs)
    assert torch.equal(out.isfinite().all(1), torch.tensor([True, False, True]))
    if value != value or norm:
        assert torch.equal(out.isnan(), expected.isnan())


def test_a_large_common_offset_is_no_worse_than_in_eager():
    args, kwargs = call(4, 60, 64, 4)
    args = (args[0] + 100, args[1] + 100, *args[2:])
    want, eager = exact(args, kwargs), reference.linear_cross_attention(*args, **kwargs)
    assert distance(run(args, kwargs), want) <= 2 * distance(eager, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_no_worse_than_in_eager(dtype):
    args, kwargs = call(4, 100, 96, 3, dtype=dtype)
    want, eager = exact(args, kwargs), reference.linear_cross_attention(*args, **kwargs)
    assert distance(run(args, kwargs), want) <= distance(eager, want)


def test_large_scores_need_their_peak():
    args, kwargs = call(2, 90, 16, 2, dtype=torch.float64, norm=False)
    single = (
        [a.float() for a in args],
        {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()},
    )
    out = ops.linear_cross_attention(*single[0], scale=60.0, **single[1])
    want = reference.linear_cross_attention(*args, scale=60.0, **kwargs)
    assert out.isfinite().all()
    assert (out.double() - want).abs().max() < 1e-3 * want.abs().max()


@settings(max_examples=40, deadline=None)
@given(
    batch=st.sampled_from((0, 1, 3, 9)),
    tokens=st.sampled_from((1, 2, 16, 63, 64, 65, 129)),
    heads=st.sampled_from((1, 2, 3, 5)),
    width=st.sampled_from((3, 4, 7, 16)),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(TABLE.dtypes),
    norm=st.booleans(),
)
def test_any_shape_and_stride(batch, tokens, heads, width, layout, dtype, norm):
    torch.manual_seed(0)
    args, kwargs = call(batch, tokens, heads * width, heads, dtype=dtype, norm=norm)
    odd = [strided(a.clone(), layout) for a in args]
    want = exact(args, kwargs)
    (limit,) = bound(args, kwargs, [want], dtype)
    assert ((ops.linear_cross_attention(*odd, **kwargs).double() - want).abs() <= limit + 1e-12).all()


def test_folding_is_chosen_by_its_cost():
    """2 R C H + 4 C^2 against 2 R C (C + 1) + 2 C^2 multiply-accumulates for R rows."""
    for rows in (1, 2, 3, 50, 197):
        for channels, heads in ((384, 6), (384, 384), (8, 8), (8, 4), (2, 2), (1, 1)):
            folded = 2 * rows * channels * heads + 4 * channels**2
            unfolded = 2 * rows * channels * (channels + 1) + 2 * channels**2
            assert folds(rows, channels, heads) == (folded <= unfolded)
    assert not folds(1, 384, 6)
    assert folds(2, 384, 6)


def kept_bytes(run, known):
    """Bytes that autograd keeps beyond the storages in ``known``."""
    seen = {}
    known = {t.untyped_storage().data_ptr() for t in known}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    del out
    return sum(seen.values())


@pytest.mark.parametrize(
    ("tokens", "channels", "heads"), [(196, 384, 6), (400, 192, 6), (196, 448, 7), (400, 224, 7)]
)
def test_little_is_kept_for_the_backward(tokens, channels, heads):
    if EMULATED:
        pytest.skip("what is kept does not depend on the kernels; the sizes are large for the emulator")
    module = CrossAttention(channels, heads, qkv_bias=True)
    x = torch.randn(2, tokens + 1, channels, requires_grad=True)
    parameters = {f"{n}_{w}": getattr(getattr(module, "w" + n), w) for n in "qkv" for w in ("weight", "bias")}
    query, rest = x[:, 0], x[:, 1:]
    ours = kept_bytes(
        lambda: ops.linear_cross_attention(
            query,
            rest,
            proj_weight=module.proj.weight,
            proj_bias=module.proj.bias,
            num_heads=heads,
            **parameters,
        ),
        [x, *module.parameters()],
    )
    eager = kept_bytes(lambda: module(x), [x, *module.parameters()])
    assert 0 < ours <= eager / 15


def of_kernel(counters, name):
    (found,) = [counts for kernel, counts in counters.items() if f"cross_attention_{name}" in kernel]
    return found


# As many images as give two splits, as they do in any batch that fills a large GPU.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_moved_on_the_large_branch(counting, dtype):
    batch, tokens, channels, heads = 66, 196, 384, 6
    args, kwargs = call(batch, tokens, channels, heads, dtype=dtype)
    counting.reset_counters()
    run(args, kwargs)
    kernel = "attend_kernel" if dtype == torch.float32 else "attend_mma_kernel"
    moved = of_kernel(counting.counters(), kernel)["bytes_moved"]
    least = batch * (tokens * channels * dtype.itemsize + 2 * heads * channels * 4 + channels * 4)
    assert moved / least <= 1.2


def test_bytes_moved_backward(counting):
    batch, tokens, channels, heads = 66, 100, 192, 3
    args, kwargs = call(batch, tokens, channels, heads, norm=False, bias=False)
    out = run([a.detach().requires_grad_() for a in args], kwargs)
    counting.reset_counters()
    out.sum().backward()
    moved = of_kernel(counting.counters(), "attend_backward")["bytes_moved"]
    vectors = 4 * heads * channels + 2 * channels  # u, slopes and contexts in, slopes of u out; the query
    least = batch * 4 * (2 * tokens * channels + vectors)
    assert moved / least <= 1.2


def test_few_launches(counting):
    args, kwargs = call(2, 70, 32, 2, norm=True)
    out = run([a.detach().requires_grad_() for a in args], kwargs)
    assert sum(k["launches"] for k in counting.counters().values()) <= 7
    counting.reset_counters()
    out.sum().backward()
    assert sum(k["launches"] for k in counting.counters().values()) <= 8


def test_shared_memory_is_read_without_conflicts(counting):
    for dtype in (torch.float32, torch.bfloat16):
        run(*call(2, 40, 384, 6, dtype=dtype))
    for name, kernel in counting.counters().items():
        if "attend" in name:
            assert kernel["shared_load"]["wavefronts"] <= 1.01 * kernel["shared_load"]["least_wavefronts"], (
                name
            )


def test_unaligned_tokens():
    for dtype in (torch.float32, torch.bfloat16):
        args, kwargs = call(2, 40, 32, 4, dtype=dtype)
        tokens = torch.zeros(2, 40, 33, dtype=dtype)[:, :, 1:].copy_(args[1])
        want = run(args, kwargs)
        # Other loads share a row out to other lanes, so the last bits of its mean may differ.
        torch.testing.assert_close(run((args[0], tokens, *args[2:]), kwargs), want)


@pytest.mark.parametrize("heads", [1, 9, 16])
def test_any_number_of_heads_in_sixteen_bits(heads):
    args, kwargs = call(2, 50, 16 * heads, heads, dtype=torch.bfloat16)
    want = exact(args, kwargs)
    (limit,) = bound(args, kwargs, [want], torch.bfloat16)
    assert ((run(args, kwargs).double() - want).abs() <= limit).all()


def test_tiny_and_huge_queries_survive_sixteen_bit_matrix_units():
    for size in (1e-6, 1.0, 300.0):
        args, kwargs = call(2, 50, 64, 2, dtype=torch.float16, norm=False)
        args = (*args[:3], (args[3].float() * size).half(), *args[4:])
        want = exact(args, kwargs)
        eager = reference.linear_cross_attention(*args, **kwargs)
        assert distance(run(args, kwargs), want) <= distance(eager, want)
