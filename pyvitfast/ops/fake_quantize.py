"""Weights or activations rounded to a grid, with a straight-through gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyvitfast.ops import _checks, _quantizer
from pyvitfast.ops._registration import differentiable

NAME = "fake_quantize"


def _check(
    weights: Sequence[Tensor], scales: Sequence[Tensor], group_size: int, dtype: torch.dtype | None
) -> None:
    _quantizer.scaled(NAME, "weights", weights, scales, group_size)
    for i, weight in enumerate(weights):
        _checks.dtype_in(NAME, f"weights[{i}]", weight, _checks.FLOATS)
    doubles = sum(w.dtype == torch.float64 for w in weights)
    if doubles not in (0, len(weights)):
        raise TypeError(f"{NAME}: float64 cannot be mixed with other dtypes in one call; cast or call twice.")
    allowed = (torch.float64,) if doubles else _quantizer.NARROW
    if dtype is not None and weights and dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(
            f"{NAME}: `dtype` must be {names} for {str(weights[0].dtype).removeprefix('torch.')} weights, "
            f"got {str(dtype).removeprefix('torch.')}."
        )


def fake_quantize(
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    *,
    bits: int,
    grid: str = "integer",
    mask: str = "lsq",
    group_size: int = 0,
    scale_gradient: bool = False,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    r"""Round many tensors to the levels of their scales, in one pass.

    On the integer grid :math:`q = s\,\mathrm{clip}(\lfloor w/s \rceil, Q_n, Q_p)` with
    :math:`Q_n = -2^{b-1}, Q_p = 2^{b-1}-1`, ties to even; the half-integer one rounds w/s - 1/2 and adds 1/2,
    ``sign`` gives s or -s.

    Args:
        weights: n tensors of any shape, float32, bfloat16, float16 or float64. Any strides; what is not
            contiguous is copied once.
        scales: n tensors, float32 (float64 for float64 weights): one entry, one a row [O], or
            [O, ceil(I / group_size)], where a tensor counts as [O, I].
        bits: 1 to 8.
        grid: ``integer`` (two bits at least), ``half_integer`` or ``sign`` (one bit).
        mask: what stands in for the derivative of rounding. ``lsq``: 1 where w/s lies within the levels.
            ``rounded``: 1 where the rounded code does, as torch's own fake quantisation, which multiplies by
            1/s instead of dividing. ``identity``: 1. For the sign grid ``identity``, ``hardtanh``,
            ``tanh`` or ``approx_sign``.
        group_size: columns that share a scale; 0 where none do.
        scale_gradient: multiply the gradient of a scale by 1 / sqrt(N Qp), N the elements that share it (Qp
            counts as 1 where it is 0).
        dtype: of the results, by default the weights'.

    Returns:
        n contiguous tensors of the weights' shapes. Differentiable once with respect to weights and scales,
        straight through; the gradient of a scale is LSQ's, added in float64 by a fixed tree.

    Raises:
        TypeError: not lists of float tensors, or dtypes that do not go together.
        ValueError: shapes, devices or values that do not fit, such as a mask that belongs to another grid.

    Saves nothing for backward but its inputs. NaN stays NaN. A scale of 0 divides by it, as the formula says.
    Under autocast the dtypes are as given.

    Source:
        LSQ (Esser et al., ICLR 2020), eq. 1-3; the half-integer grid and the surrogates of sign are those of
        FOGZO (Yang and Aamodt, NeurIPS 2025).

    Example:
        >>> w = torch.tensor([0.37, 0.2, -0.62])
        >>> pyvitfast.ops.fake_quantize([w], [torch.tensor(0.25)], bits=2)
        [tensor([ 0.2500,  0.2500, -0.5000])]
    """
    op = _checks.call(NAME)
    _check(weights, scales, group_size, dtype)
    codes = _quantizer.grid(NAME, grid, bits), _quantizer.mask(NAME, mask, grid)
    if not weights:
        return []
    out: list[Tensor] = op(list(weights), list(scales), bits, *codes, group_size, scale_gradient, dtype)
    return out


def _fake(
    weights: list[Tensor],
    scales: list[Tensor],
    bits: int,
    grid: int,
    mask: int,
    group_size: int,
    scale_gradient: bool,
    dtype: torch.dtype | None,
) -> list[Tensor]:
    _check(weights, scales, group_size, dtype)
    return [w.new_empty(w.shape, dtype=dtype) for w in weights]


def _fake_backward(
    grads: list[Tensor],
    weights: list[Tensor],
    scales: list[Tensor],
    bits: int,
    grid: int,
    mask: int,
    group_size: int,
    scale_gradient: bool,
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (*weights, *scales)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    weights, scales, *ctx.options, _ = inputs
    ctx.count = len(weights)
    ctx.save_for_backward(*weights, *scales)


def _backward(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    weights, scales = list(ctx.saved_tensors[: ctx.count]), list(ctx.saved_tensors[ctx.count :])
    out = torch.ops.pyvitfast.fake_quantize_backward(
        [g.contiguous() for g in grads], weights, scales, *ctx.options
    )
    return list(out[: ctx.count]), list(out[ctx.count :]), None, None, None, None, None, None


differentiable(
    NAME, fake=_fake, setup_context=_setup_context, backward=_backward, fake_backward=_fake_backward
)
