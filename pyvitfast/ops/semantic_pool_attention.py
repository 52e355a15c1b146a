"""Attention of a few queries an image over all tokens, without keys and values."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvitfast.ops import _attention, _checks
from pyvitfast.ops._registration import differentiable
from pyvitfast.ops.few_query_attention import few_query_attention

NAME = "semantic_pool_attention"
NAMES = (
    "query", "tokens_before", "tokens", "q_weight", "k_weight", "v_weight", "proj_weight",
    "q_bias", "k_bias", "v_bias", "proj_bias", "norm_weight", "norm_bias",
)  # fmt: skip
_REQUIRED = (0, 2, 3, 4, 5, 6)
_MOST_CUDA_CHANNELS = {torch.float64: 352}  # that shared memory holds
_MOST_CUDA_CHANNELS_ELSE = 768


def absorbed_macs(queries: int, rows: int, channels: int, num_heads: int) -> int:
    """Multiply-accumulates an image without keys and values: 4 M C^2 + 2 H M R C for R rows."""
    return 4 * queries * channels**2 + 2 * num_heads * queries * rows * channels


def plain_macs(queries: int, rows: int, channels: int) -> int:
    """Multiply-accumulates an image with keys and values: 2 M C^2 + 2 R C^2 + 2 M R C."""
    return 2 * (queries + rows) * channels**2 + 2 * queries * rows * channels


def absorbs(queries: int, rows: int, channels: int, num_heads: int) -> bool:
    """Whether keys and values of ``rows`` rows would take more arithmetic than the absorbed form."""
    absorbed = absorbed_macs(queries, rows, channels, num_heads)
    return rows > 0 and absorbed <= plain_macs(queries, rows, channels)


def _fits(tokens: Tensor) -> bool:
    """Whether the CUDA kernels can hold their rows in shared memory; the CPU has no such limit."""
    most = _MOST_CUDA_CHANNELS.get(tokens.dtype, _MOST_CUDA_CHANNELS_ELSE)
    return tokens.device.type != "cuda" or tokens.shape[2] <= most


def _check(inputs: tuple[Tensor | None, ...], num_heads: int) -> None:
    named = [
        (n, t) for i, (n, t) in enumerate(zip(NAMES, inputs, strict=True)) if t is not None or i in _REQUIRED
    ]
    _checks.float_tensors(NAME, named)
    present: dict[str, Any] = dict(named)
    query = present["query"]
    if query.ndim != 3:
        raise ValueError(f"{NAME}: `query` must have shape [B, M, C], got {list(query.shape)}.")
    _attention.projected(NAME, query, present, num_heads)


def _adjacent(first: Tensor, second: Tensor) -> bool:
    """Whether ``second`` lies right behind ``first`` in memory, as parts of a fused projection do."""
    return (
        first.is_contiguous()
        and second.is_contiguous()
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and bool(first.storage_offset() + first.numel() == second.storage_offset())
    )


def _plain(inputs: tuple[Tensor | None, ...], num_heads: int, scale: float, eps: float) -> Tensor:
    """Keys and values after all, by torch's own products."""
    query, before, tokens, q_weight, k_weight, v_weight, proj_weight, *rest = inputs
    q_bias, k_bias, v_bias, proj_bias, norm_weight, norm_bias = rest
    assert query is not None
    assert tokens is not None
    assert k_weight is not None
    assert v_weight is not None
    assert proj_weight is not None
    channels = query.shape[2]

    def normal(x: Tensor) -> Tensor:
        if norm_weight is None:
            return x
        bias = None if norm_bias is None else norm_bias.to(x.dtype)
        return F.layer_norm(x, (channels,), norm_weight.to(x.dtype), bias, eps)

    def heads(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        rows = torch.unflatten(F.linear(x, weight, bias), 2, (num_heads, channels // num_heads))
        return rows.transpose(1, 2)

    rows = normal(tokens if before is None else torch.cat([before, tokens], dim=1))
    q = heads(normal(query), q_weight, q_bias)
    biases = [b for b in (k_bias, v_bias) if b is not None]
    # One product is 3 % faster than two; gradients have no way through such a view.
    if (
        not (torch.compiler.is_compiling() or torch.is_grad_enabled())
        and len(biases) != 1
        and _adjacent(k_weight, v_weight)
    ):
        weight = k_weight.as_strided((2 * channels, channels), (channels, 1))
        both = F.linear(rows, weight, torch.cat(biases) if biases else None)
        k, v = torch.unflatten(both, 2, (2, num_heads, -1)).permute(2, 0, 3, 1, 4)
    else:
        k, v = heads(rows, k_weight, k_bias), heads(rows, v_weight, v_bias)
    if q.device.type == "cpu" and q.dtype == torch.float32:
        mixed = few_query_attention(q, k, v, scale=scale)[0]
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return F.linear(mixed.transpose(1, 2).flatten(2), proj_weight, proj_bias)


def semantic_pool_attention(
    query: Tensor,
    tokens: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    proj_weight: Tensor,
    *,
    num_heads: int,
    tokens_before: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    proj_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    scale: float | None = None,
) -> Tensor:
    r"""Multi-head attention of M queries an image over the rows [tokens_before; tokens].

    With P the queries and X the rows, after one shared LayerNorm where ``norm_weight`` is given, and
    :math:`W_j` the rows of head j:

    :math:`U_j = s\,(P W_q^\top + b_q)_j W_{k,j}`, :math:`A_j = \text{softmax}(U_j X^\top)`,
    :math:`O_j = (A_j X) W_{v,j}^\top + b_{v,j}`, result :math:`O W_o^\top + b_o`.

    That is ordinary cross-attention with the key and value layers moved to the side of the M queries: neither
    keys, values nor normalised rows exist beyond a tile, and the rows are never concatenated.

    Args:
        query: [B, M, C], float32, bfloat16, float16 or float64.
        tokens: [B, N, C] of the same dtype; any strides, and no copy where the channels are neighbours.
        q_weight: [C, C], rows are outputs, head after head.
        k_weight: [C, C].
        v_weight: [C, C].
        proj_weight: [C, C] of the output layer.
        num_heads: H, a divisor of C.
        tokens_before: [B, K, C] further rows that stand before the tokens, or None.
        q_bias: [C] or None.
        k_bias: [C] or None. It shifts all scores of a query alike, so it has no effect and, where keys are
            not computed, a gradient of exact zeros.
        v_bias: [C] or None.
        proj_bias: [C] or None.
        norm_weight: [C], or None for rows and queries that are normalised already. May be float32 beside
            16-bit tokens.
        norm_bias: [C] or None.
        eps: added to the variance in LayerNorm.
        scale: softmax scale s, by default :math:`(C / H)^{-1/2}`.

    Returns:
        [B, M, C] in the dtype of ``query``, or of autocast where that is active, without the residual;
        differentiable once with respect to all tensors.

    Raises:
        TypeError: not float tensors, or dtypes that differ outside autocast.
        ValueError: shapes or devices that do not match, or heads that do not divide C.

    Sums are float32 for 16-bit inputs. The order of all sums depends on the shapes alone, so the bits do not
    depend on threads or runs. NaN and Inf spread as in softmax. There is no dropout and no mask. Where keys
    and values take less arithmetic, about M above C / (H - 1), they are computed, by torch's
    products, in the dtype of the inputs; on CUDA also above 768 channels, or 352 in float64.

    Source:
        STViT (Chang et al., CVPR 2023), section 3.2, eq. 1 and 2; the order of the products is ours.

    Example:
        >>> eye, zero = torch.eye(4), torch.zeros(4, 4)
        >>> query, tokens = torch.ones(1, 1, 4), torch.arange(16.0).view(1, 4, 4)
        >>> pyvitfast.ops.semantic_pool_attention(query, tokens, zero, eye, eye, eye, num_heads=1)
        tensor([[[6., 7., 8., 9.]]])
    """
    inputs = (
        query, tokens_before, tokens, q_weight, k_weight, v_weight, proj_weight,
        q_bias, k_bias, v_bias, proj_bias, norm_weight, norm_bias,
    )  # fmt: skip
    _check(inputs, num_heads)
    channels = query.shape[2]
    scale = (channels // num_heads) ** -0.5 if scale is None else scale
    rows = tokens.shape[1] + (0 if tokens_before is None else tokens_before.shape[1])
    op = _checks.call(NAME)
    if not (absorbs(query.shape[1], rows, channels, num_heads) and _fits(tokens)):
        return _plain(inputs, num_heads, scale, eps)
    keep = torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in inputs])
    result: Tensor = op(*inputs, num_heads, eps, scale, keep)[0]
    if _attention.autocast(query) and result.dtype != torch.float64:
        result = result.to(torch.get_autocast_dtype(query.device.type))
    return result


def _fake(query: Tensor, before: Tensor | None, tokens: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _check((query, before, tokens, *rest[:10]), rest[10])
    norm_weight, num_heads, keep = rest[8], rest[10], rest[13]
    batch, queries, channels = query.shape
    rows = tokens.shape[1] + (0 if before is None else before.shape[1])
    sums = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    wide = num_heads * queries
    shapes: list[tuple[int, ...]] = [
        (batch, queries, channels), (batch, queries, channels), (batch, wide, channels), (2, batch, wide),
        (0 if norm_weight is None else 2, batch, rows),
    ]  # fmt: skip
    kept = [query.new_empty(shape if keep else (0,), dtype=sums) for shape in shapes]
    return query.new_empty((batch, queries, channels)), *kept


def _fake_backward(grad: Tensor, *saved: Any) -> list[Tensor]:
    query, before, tokens, *parameters = saved[5:18]
    weights, biases, norm = parameters[:4], parameters[4:8], parameters[8:]
    channels = query.shape[2]
    dense = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, tokens, *weights)]
    none = tokens.new_empty((0, 0, channels))
    first = none if before is None else torch.empty_like(before, memory_format=torch.contiguous_format)
    slopes = [(w if b is None else b).new_empty((channels,)) for w, b in zip(weights, biases, strict=True)]
    size = 0 if norm[0] is None else channels
    slopes += [(weights[0] if n is None else n).new_empty((size,)) for n in norm]
    return [dense[0], first, *dense[1:], *slopes]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.settings, ctx.keep = inputs[:13], inputs[13:16], inputs[16]
    ctx.present = [t is not None for t in tensors]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:], *(t for t in tensors if t is not None))


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    kept, remaining = ctx.saved_tensors[:5], iter(ctx.saved_tensors[5:])
    tensors = [next(remaining) if present else None for present in ctx.present]
    if not ctx.keep:
        _, *kept = torch.ops.pyvitfast.semantic_pool_attention(*tensors, *ctx.settings, True)
    slopes = torch.ops.pyvitfast.semantic_pool_attention_backward(grad, *kept, *tensors, *ctx.settings)
    wanted = [s if present else None for s, present in zip(slopes, ctx.present, strict=True)]
    return (*wanted, None, None, None, None)


def _sizes(query: Any, before: Any, tokens: Any) -> tuple[int, int, int, int]:
    return query[0], query[1], tokens[1] + (0 if before is None else before[1]), query[2]


def _flops(query: Any, before: Any, tokens: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Of the absorbed form; a multiply-accumulate counts as two, LayerNorm and softmax not at all."""
    batch, queries, rows, channels = _sizes(query, before, tokens)
    return 2 * batch * absorbed_macs(queries, rows, channels, rest[10])


def _flops_backward(grad: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Scores and queries against W_k once more, and two products for each of the forward's."""
    batch, queries, rows, channels = _sizes(*rest[5:8])
    num_heads: int = rest[18]
    return 2 * batch * (9 * queries * channels**2 + 5 * num_heads * queries * rows * channels)


differentiable(
    NAME,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    fake_backward=_fake_backward,
    flops=_flops,
    flops_backward=_flops_backward,
)
