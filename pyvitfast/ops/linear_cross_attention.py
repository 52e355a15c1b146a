"""Attention of one query an image over all tokens, without keys and values."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from pyvitfast.ops import _attention, _checks
from pyvitfast.ops._registration import differentiable
from pyvitfast.reference.linear_cross_attention import linear_cross_attention as reference

NAME = "linear_cross_attention"
NAMES = (
    "query", "tokens", "q_weight", "k_weight", "v_weight", "proj_weight",
    "q_bias", "k_bias", "v_bias", "proj_bias", "norm_weight", "norm_bias",
)  # fmt: skip
_ALIGNMENT = 16  # elements to which each part of what is kept for the backward is rounded up


_OP = _checks.call(NAME) if _checks.defined() else None


def folds(rows: int, channels: int, num_heads: int) -> bool:
    """Whether the folded form needs no more multiply-accumulates than keys and values of ``rows`` rows.

    Folded: 2 rows C H + 4 C^2; unfolded: 2 rows C (C + 1) + 2 C^2. It loses for a single row, and for heads
    one or two channels wide with few rows.
    """
    return rows * (channels + 1 - num_heads) >= channels


def _fits(tokens: Tensor, channels: int, num_heads: int) -> bool:
    """Whether the CUDA kernels can hold one image's vectors in shared memory; the CPU has no such limit."""
    most = 20_800 if tokens.dtype == torch.float64 else 41_600
    return tokens.device.type != "cuda" or channels * (16 + 3 * num_heads) + 36 * num_heads <= most


def _check(inputs: tuple[Tensor | None, ...], num_heads: int) -> None:
    named = [(n, t) for n, t in zip(NAMES, inputs, strict=True) if t is not None or n in NAMES[:6]]
    _checks.float_tensors(NAME, named)
    present: dict[str, Any] = dict(named)
    query = present["query"]
    if query.ndim != 2:
        raise ValueError(f"{NAME}: `query` must have shape [B, C], got {list(query.shape)}.")
    _attention.projected(NAME, query, present, num_heads)


def _unfolded(inputs: tuple[Tensor | None, ...], num_heads: int, scale: float, eps: float) -> Tensor:
    """Keys and values after all, in float32 as the kernels."""
    named: dict[str, Any] = dict(zip(NAMES, inputs, strict=True))
    query = named["query"]
    dtype, device = query.dtype, query.device.type
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    named = {name: None if tensor is None else tensor.to(wide) for name, tensor in named.items()}
    with torch.autocast(device, enabled=False) if _attention.autocast(query) else contextlib.nullcontext():
        return reference(num_heads=num_heads, scale=scale, eps=eps, **named).to(dtype)


def linear_cross_attention(
    query: Tensor,
    tokens: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    proj_weight: Tensor,
    *,
    num_heads: int,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    proj_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    scale: float | None = None,
) -> Tensor:
    r"""Multi-head attention of one query an image over itself and N tokens, linear in N.

    With X the rows ``[query; tokens]``, after LayerNorm where ``norm_weight`` is given, :math:`x_0` its first
    row, and :math:`W_j` the rows of head j:

    :math:`u_j = s\, W_{k,j}^\top (W_q x_0 + b_q)_j`, :math:`a_j = \text{softmax}_n(u_j \cdot x_n)`,
    :math:`o_j = W_{v,j} \sum_n a_{jn} x_n + b_{v,j}`, result :math:`W_o o + b_o`.

    That is ordinary attention with the key and value layers moved to the other side of the sums: neither keys
    nor values exist, and each token is read once for all heads.

    Args:
        query: [B, C], float32, bfloat16, float16 or float64.
        tokens: [B, N, C] of the same dtype, the rows besides the query; any strides, and no copy where the
            channels are neighbours, as in ``x[:, 1:]``.
        q_weight: [C, C], rows are outputs, head after head.
        k_weight: [C, C].
        v_weight: [C, C].
        proj_weight: [C, C] of the output layer.
        num_heads: H, a divisor of C.
        q_bias: [C] or None.
        k_bias: [C] or None. It shifts all scores of a head alike, so it has no effect and a gradient of
            exact zeros.
        v_bias: [C] or None.
        proj_bias: [C] or None.
        norm_weight: [C], or None for rows that are normalised already. May be float32 beside 16-bit tokens.
        norm_bias: [C] or None.
        eps: added to the variance in LayerNorm.
        scale: softmax scale s, by default :math:`(C / H)^{-1/2}`.

    Returns:
        [B, C] in the dtype of ``query``, or of autocast where that is active; differentiable once with
        respect to all tensors.

    Raises:
        TypeError: not float tensors, or dtypes that differ outside autocast.
        ValueError: shapes or devices that do not match, or heads that do not divide C.

    Sums are float32 for 16-bit inputs. The order of all sums depends on the shapes alone, so the bits do not
    depend on threads or runs. NaN and Inf spread as in softmax. There is no dropout and no mask. Where keys
    and values would cost fewer multiply-accumulates (N = 0, or heads one or two channels wide over few
    tokens) they are computed, in plain torch; on CUDA also where C (16 + 3 H) + 36 H is above 41,600, or
    20,800 in float64.

    Source:
        CrossViT (Chen et al., ICCV 2021), section 3.3, eq. 5; the order of the products is ours.

    Example:
        >>> eye, zero = torch.eye(2), torch.zeros(2, 2)
        >>> query, tokens = torch.tensor([[3.0, 1.0]]), torch.tensor([[[0.0, 4.0], [3.0, 1.0]]])
        >>> pyvitfast.ops.linear_cross_attention(query, tokens, zero, eye, eye, eye, num_heads=1)
        tensor([[2., 2.]])
    """
    inputs = (
        query, tokens, q_weight, k_weight, v_weight, proj_weight,
        q_bias, k_bias, v_bias, proj_bias, norm_weight, norm_bias,
    )  # fmt: skip
    try:
        channels, dtype = query.shape[1], query.dtype
        scale = (channels // num_heads) ** -0.5 if scale is None else scale
        cast = _attention.autocast(tokens)
        plain = cast or all([t is None or t.dtype == dtype for t in inputs])
        folding = folds(tokens.shape[1] + 1, channels, num_heads) and _fits(tokens, channels, num_heads)
        if not (plain and folding) or (norm_weight is None and norm_bias is not None):
            _check(inputs, num_heads)
        if folding:
            keep = torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in inputs])
            op = _OP or _checks.call(NAME)
            result: Tensor = op(*inputs, num_heads, eps, scale, keep)[0]
        else:
            result = _unfolded(inputs, num_heads, scale, eps)
    except ImportError:
        raise
    except Exception:
        # The kernels' own checks are enough, and free; these here find the words.
        _check(inputs, num_heads)
        raise
    if cast and result.dtype != torch.float64:
        result = result.to(torch.get_autocast_dtype(tokens.device.type))
    return result


def _kept_size(batch: int, tokens: int, channels: int, num_heads: int, norm: bool) -> int:
    rows = batch * channels
    sizes = [rows, rows, rows, rows * num_heads, rows * num_heads, batch * num_heads, batch * num_heads]
    sizes.append(batch * num_heads * (1 + tokens))
    if norm:
        sizes += [batch * tokens, batch * (1 + tokens)]
    return sum((size + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT for size in sizes)


def _fake(query: Tensor, tokens: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _check((query, tokens, *rest[:10]), rest[10])
    norm_weight, num_heads, keep = rest[8], rest[10], rest[13]
    batch, count, channels = tokens.shape
    size = _kept_size(batch, count, channels, num_heads, norm_weight is not None) if keep else 0
    sums = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    return query.new_empty((batch, channels)), tokens.new_empty((size,), dtype=sums)


def _fake_backward(grad: Tensor, kept: Tensor, query: Tensor, tokens: Tensor, *rest: Any) -> list[Tensor]:
    weights, biases, norm = rest[:4], rest[4:8], rest[8:10]
    dense = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, tokens, *weights)]
    channels = query.shape[1]
    slopes = [(w if b is None else b).new_empty((channels,)) for w, b in zip(weights, biases, strict=True)]
    size = 0 if norm[0] is None else channels
    slopes += [(weights[0] if n is None else n).new_empty((size,)) for n in norm]
    return dense + slopes


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.settings, ctx.keep = inputs[:12], inputs[12:15], inputs[15]
    ctx.present = [t is not None for t in tensors]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *(t for t in tensors if t is not None))


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    kept, *saved = ctx.saved_tensors
    remaining = iter(saved)
    tensors = [next(remaining) if present else None for present in ctx.present]
    if not ctx.keep:
        _, kept = torch.ops.pyvitfast.linear_cross_attention(*tensors, *ctx.settings, True)
    slopes = torch.ops.pyvitfast.linear_cross_attention_backward(grad, kept, *tensors, *ctx.settings)
    wanted = [s if present else None for s, present in zip(slopes, ctx.present, strict=True)]
    return (*wanted, None, None, None, None)


differentiable(
    NAME, fake=_fake, setup_context=_setup_context, backward=_backward, fake_backward=_fake_backward
)
