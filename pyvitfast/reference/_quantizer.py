"""Grids, scales and rounding, shared by the references of the quantisation ops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

GRIDS = ("integer", "half_integer", "sign")
MASKS = ("lsq", "rounded", "identity", "hardtanh", "tanh", "approx_sign")


def bounds(grid: str, bits: int) -> tuple[int, int]:
    """Least and greatest code Qn, Qp; of the sign grid -1 and 1."""
    return (-1, 1) if grid == "sign" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def compute_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """float64 if any tensor is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def spread(scale: Tensor, like: Tensor, group_size: int) -> Tensor:
    """The scale of each element of ``like``: one number, or a tensor of its shape.

    ``scale`` holds one entry, one a row [O], or one for each ``group_size`` columns of a row
    [O, ceil(I / group_size)], where ``like`` counts as [O, I].
    """
    if scale.numel() == 1 or like.numel() == 0:
        return scale.reshape(-1)[:1].reshape(()) if scale.numel() else scale.new_ones(())
    rows = like.shape[0]
    columns = like.numel() // rows
    groups = scale.reshape(rows, -1)  # [O, G]
    each = columns if groups.shape[1] == 1 else group_size
    return groups.repeat_interleave(each, dim=1)[:, :columns].reshape(like.shape)


def fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c`` rounded once.

    float32 goes through float64 rounded to odd, from which the second rounding gives what one would; float64
    is rounded twice, as its uses need no bits.
    """
    if compute_dtype([a, b, c]) == torch.float64:
        return a * b + c
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.contiguous().view(torch.int64)
    inexact = (error != 0) & (bits & 1 == 0) & total.isfinite()
    away = (error > 0) == (total > 0)
    bits = torch.where(inexact, torch.where(away, bits + 1, bits - 1), bits)
    return bits.view(torch.float64).float()


def quantize(ratio: Tensor, scale: Tensor, grid: str, bits: int) -> Tensor:
    """The level next to ``ratio * scale``, ties to even codes; NaN stays NaN."""
    if grid == "sign":
        return torch.where(ratio.isnan(), ratio, torch.where(ratio >= 0, 1.0, -1.0).to(ratio.dtype)) * scale
    low, high = bounds(grid, bits)
    shift = 0.5 if grid == "half_integer" else 0.0
    code = (ratio - shift).round().clamp(low, high)
    return (code + shift + 0.0) * scale


def gradient_factor(count: int, grid: str, bits: int) -> float:
    """LSQ's factor of a scale's gradient, 1 / sqrt(N Qp); Qp counts as 1 where it is 0."""
    return 1 / math.sqrt(max(count, 1) * max(bounds(grid, bits)[1], 1))
