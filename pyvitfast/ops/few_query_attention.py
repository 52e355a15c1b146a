"""Attention of a few queries over many keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyvitfast.ops import _attention, _checks
from pyvitfast.ops._registration import differentiable
from pyvitfast.reference.few_query_attention import few_query_attention as reference

NAME = "few_query_attention"
_OP = _checks.call(NAME) if _checks.defined() else None


def _check(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, k_before: Tensor | None, v_before: Tensor | None
) -> None:
    named = [("q", q), ("k", k), ("v", v), ("bias", bias), ("k_before", k_before), ("v_before", v_before)]
    optional = ("bias", "k_before", "v_before")
    _checks.float_tensors(NAME, [(n, t) for n, t in named if t is not None or n not in optional])
    _attention.pair_of_keys(NAME, k_before, v_before)
    if q.ndim != 4 or q.shape[3] == 0:
        raise ValueError(f"{NAME}: `q` must have shape [B, H, M, D], D at least 1, got {list(q.shape)}.")
    batch, heads, queries, width = q.shape
    keys = 0
    for name, tensor, before in (("k", k, False), ("k_before", k_before, True)):
        if tensor is None:
            continue
        if tensor.ndim != 4 or tensor.shape[:2] != q.shape[:2] or tensor.shape[3] != width:
            rows = "S" if before else "N"
            raise ValueError(
                f"{NAME}: `{name}` must have shape [B, H, {rows}, D] with the B, H and D of `q` "
                f"{list(q.shape)}, got {list(tensor.shape)}."
            )
        keys = keys + tensor.shape[2]
    _attention.same_shape(NAME, "v", v, tuple(k.shape), "that of `k`")
    if k_before is not None and v_before is not None:
        _attention.same_shape(NAME, "v_before", v_before, tuple(k_before.shape), "that of `k_before`")
    if bias is not None:
        whole = (batch, heads, queries, keys)
        tail = whole[4 - bias.ndim :] if bias.ndim <= 4 else None
        if tail is None or any(have not in (1, want) for have, want in zip(bias.shape, tail, strict=True)):
            raise ValueError(
                f"{NAME}: `bias` must broadcast to [B, H, M, S + N], {list(whole)}, got {list(bias.shape)}."
            )
        if (bias.dtype == torch.float64) != (q.dtype == torch.float64):
            want, got = (str(t.dtype).removeprefix("torch.") for t in (q, bias))
            raise TypeError(
                f"{NAME}: `bias` must be float64 where `q` is, and only there; got {want}, {got}."
            )


def few_query_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    k_before: Tensor | None = None,
    v_before: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Attention of a few queries over many keys: :math:`o = \text{softmax}(s\, q k^\top + \text{bias})\, v`.

    Args:
        q: [B, H, M, D], float32, bfloat16, float16 or float64. Made for M of 1 to 128; any M works.
        k: [B, H, N, D] of the same dtype, N from 0 on. Any strides; no copy where the channels of a head are
            neighbours, as in the halves of a fused [B, N, 2, H, D] projection.
        v: [B, H, N, D].
        bias: added to the scores; broadcastable to [B, H, M, S + N], of any float dtype. A mask is a bias of
            minus infinity.
        k_before: [B, H, S, D], keys that stand before those of ``k``, as if concatenated; or None.
        v_before: [B, H, S, D], their values.
        scale: s, by default :math:`D^{-1/2}`.

    Returns:
        o, [B, H, M, D] in the dtype of ``q``, laid out so that ``o.transpose(1, 2).reshape(B, M, H * D)`` is
        a view, and lse, [B, H, M], the logarithm of the sum of the exponentials, float32 (float64 for
        float64). Both are differentiable once with respect to all tensors.

    Raises:
        TypeError: not float tensors, or dtypes that differ outside autocast.
        ValueError: shapes or devices that do not match, or only one of ``k_before`` and ``v_before``.

    Scores, softmax and sums are float32 for 16-bit inputs. The order of all sums depends on the shapes alone,
    so the bits do not depend on threads or runs. NaN and Inf spread as in softmax, but a query that may not
    attend to any key gives zeros, lse minus infinity and gradients of zero. Autocast leaves tensors of one
    dtype as they are and brings those of several to its own. On CUDA heads wider than 128 channels take plain
    torch.

    Source:
        Making Vision Transformers Efficient from A Token Sparsification View (Chang et al., CVPR 2023),
        section 3.2: the attention of the semantic-token generation module.

    Example:
        >>> q, k = torch.ones(1, 1, 1, 1), torch.tensor([1.0, 2.0, 4.0]).log().view(1, 1, 3, 1)
        >>> o, lse = pyvitfast.ops.few_query_attention(q, k, torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 3, 1))
        >>> o.item() * 7, lse.exp().item()  # doctest: +ELLIPSIS
        (17.0..., 7.0...)
    """
    if scale is not None:
        scale = _attention.number(NAME, "scale", scale)
    try:
        plain = bias is None and k_before is None and q.dtype == k.dtype == v.dtype and _attention.fits(q)
        if plain:
            op = _OP or _checks.call(NAME)
            o, lse = op(q, k, v, None, None, v_before, q.shape[3] ** -0.5 if scale is None else scale)
            return o.transpose(1, 2), lse
    except ImportError:
        raise
    except Exception:
        # The kernels' own checks are enough, and free; these here find the words.
        _check(q, k, v, bias, k_before, v_before)
        raise
    op = _checks.call(NAME)
    _check(q, k, v, bias, k_before, v_before)
    named = [("q", q), ("k", k), ("v", v)]
    if k_before is not None and v_before is not None:
        named += [("k_before", k_before), ("v_before", v_before)]
    q, k, v, *before = _attention.mixed_dtypes(NAME, named)
    k_before, v_before = before or (None, None)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if not _attention.fits(q):
        return reference(q, k, v, bias, k_before=k_before, v_before=v_before, scale=scale)
    if bias is not None:
        bias = bias[(None,) * (4 - bias.ndim)]
    o, lse = op(q, k, v, bias, k_before, v_before, scale)
    return o.transpose(1, 2), lse


def _fake(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, k_before: Any, v_before: Any, scale: float
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, bias, k_before, v_before)
    batch, heads, queries, width = q.shape
    lse = q.new_empty((batch, heads, queries), dtype=_attention.sums(q))
    return q.new_empty((batch, queries, heads, width)), lse


def _fake_backward(
    grad: Tensor, grad_lse: Tensor, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    bias: Tensor | None, k_before: Tensor | None, v_before: Tensor | None, scale: float, bias_slope: bool,
) -> list[Tensor]:  # fmt: skip
    batch, heads, queries, width = q.shape
    before = 0 if k_before is None else k_before.shape[2]
    keys = k.shape[2]
    rows = [q.new_empty((batch, count, heads, width)) for count in (queries, keys, keys, before, before)]
    like, total = (bias, before + keys) if bias is not None and bias_slope else (q, 0)
    return [*rows, like.new_empty((batch, heads, queries, total))]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.present = [t is not None for t in tensors]
    ctx.save_for_backward(*output, *(t for t in tensors if t is not None))


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    o, lse, *saved = ctx.saved_tensors
    remaining = iter(saved)
    tensors = [next(remaining) if present else None for present in ctx.present]
    bias = tensors[3]
    bias_slope = ctx.present[3] and ctx.needs_input_grad[3]
    slopes = torch.ops.pyvitfast.few_query_attention_backward(
        grad, grad_lse, o, lse, *tensors, ctx.scale, bias_slope
    )
    d_q, d_k, d_v, *before = (slope.transpose(1, 2) for slope in slopes[:5])
    d_bias = slopes[5].sum_to_size(bias.shape) if bias is not None and bias_slope else None
    d_before = before if ctx.present[4] else (None, None)
    return (d_q, d_k, d_v, d_bias, *d_before, None)


def _flops(q: Any, k: Any, v: Any, bias: Any, k_before: Any, *_: Any, **__: Any) -> int:
    batch, heads, queries, width = q
    return int(4 * batch * heads * queries * (k[2] + (k_before[2] if k_before else 0)) * width)


differentiable(
    NAME,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    fake_backward=_fake_backward,
    flops=_flops,
)
