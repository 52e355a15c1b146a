"""Row and column sums of ``weight * grad`` for many matrices in one launch."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyvitfast.ops import _checks
from pyvitfast.ops._registration import differentiable

NAME = "saliency_rowcol"


def _check(weights: Sequence[Tensor], grads: Sequence[Tensor], inv_scale: Tensor | None) -> None:
    _checks.tensor_list(NAME, "weights", weights)
    _checks.tensor_list(NAME, "grads", grads, weights)
    named = [(f"weights[{i}]", w) for i, w in enumerate(weights)]
    named += [(f"grads[{i}]", g) for i, g in enumerate(grads)]
    if inv_scale is not None:
        if not isinstance(inv_scale, Tensor):
            raise TypeError(
                f"{NAME}: `inv_scale` must be a float32 tensor of one element, "
                f"got {type(inv_scale).__name__}."
            )
        named.append(("inv_scale", inv_scale))
    _checks.same_device(NAME, named)
    for name, tensor in named:
        _checks.dense(NAME, name, tensor)
        _checks.dtype_in(NAME, name, tensor, _checks.FLOATS)
    doubles = sum(t.dtype == torch.float64 for t in (*weights, *grads))
    if doubles not in (0, len(weights) + len(grads)):
        raise TypeError(f"{NAME}: float64 cannot be mixed with other dtypes in one call; cast or call twice.")
    for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
        if w.ndim == 0:
            raise ValueError(f"{NAME}: `weights[{i}]` must have rank 1 or more, got a scalar.")
        if w.shape != g.shape:
            raise ValueError(
                f"{NAME}: `grads[{i}]` must have the shape of `weights[{i}]` {list(w.shape)}, "
                f"got {list(g.shape)}."
            )
    if inv_scale is not None and inv_scale.numel() != 1:
        raise ValueError(f"{NAME}: `inv_scale` must have one element, got shape {list(inv_scale.shape)}.")


def saliency_rowcol(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    inv_scale: Tensor | None = None,
    abs: bool = False,
) -> Tensor:
    r"""Row and column sums of the elementwise product of each weight with its gradient.

    For matrix k with :math:`P = W_k \odot G_k`, the result holds
    :math:`r_o = \sum_i P_{oi}` and then :math:`c_i = \sum_o P_{oi}`; the matrices follow one another.

    Args:
        weights: n tensors [O, I], float32, bfloat16, float16 or float64. Rank 1 counts as [O, 1], rank 3 and
            more as [O, rest]. Any strides; what is not row-contiguous is copied once.
        grads: n tensors of the same shapes; the dtype of each may differ from its weight's, except that
            float64 does not mix with the others.
        inv_scale: one float element that multiplies every sum: 1 / loss scale under AMP.
        abs: sum the absolute values of the products instead.

    Returns:
        Float32 tensor [sum of O_k + I_k] (float64 for float64 inputs), differentiable once with respect
        to ``weights`` and ``grads``; second derivatives are refused.

    Raises:
        TypeError: not lists of float tensors, or float64 mixed with others.
        ValueError: lengths, shapes or devices that do not match.

    Each matrix is read once. CPU kernels add exact products in float64, the CUDA kernel adds in float32; the
    order is fixed, so the bits do not depend on threads or runs. NaN and Inf propagate. Autocast changes
    nothing: the inputs keep their dtypes and the sums are float32.

    Source:
        NViT (Yang et al., CVPR 2023), eq. 6: every structural sum is a sum of these.

    Example:
        >>> w, g = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2, 2)
        >>> pyvitfast.ops.saliency_rowcol([w], [g])
        tensor([3., 7., 4., 6.])
    """
    op = _checks.call(NAME)
    _check(weights, grads, inv_scale)
    if not weights:
        return torch.zeros(0)
    matrices = [w if w.ndim <= 2 else w.flatten(1) for w in weights]
    slopes = [g if g.ndim <= 2 else g.flatten(1) for g in grads]
    result: Tensor = op(matrices, slopes, inv_scale, abs)
    return result


def _fake(
    weights: list[Tensor], grads: list[Tensor], inv_scale: Tensor | None = None, abs: bool = False
) -> Tensor:
    _check(weights, grads, inv_scale)
    size = sum(w.shape[0] + (w.shape[1] if w.ndim == 2 else 1) for w in weights)
    wide = any(w.dtype == torch.float64 for w in weights)
    return weights[0].new_empty((size,), dtype=torch.float64 if wide else torch.float32)


def _fake_backward(
    grad: Tensor, weights: list[Tensor], grads: list[Tensor], inv_scale: Tensor | None, abs: bool
) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (*weights, *grads)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, grads, inv_scale, abs_ = inputs
    if inv_scale is not None and inv_scale.requires_grad:
        raise NotImplementedError(f"{NAME}: `inv_scale` is a constant; detach it.")
    ctx.count, ctx.abs, ctx.scaled = len(weights), abs_, inv_scale is not None
    ctx.save_for_backward(*weights, *grads, *([inv_scale] if inv_scale is not None else []))


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    n = ctx.count
    out = torch.ops.pyvitfast.saliency_rowcol_backward(
        grad.contiguous(),
        list(saved[:n]),
        list(saved[n : 2 * n]),
        saved[2 * n] if ctx.scaled else None,
        ctx.abs,
    )
    return builtins.list(out[:n]), builtins.list(out[n:]), None, None


differentiable(
    NAME, fake=_fake, setup_context=_setup_context, backward=_backward, fake_backward=_fake_backward
)
