"""Plain-torch reference of ``fake_quantize``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyvitfast.reference._quantizer import bounds, compute_dtype, gradient_factor, quantize, spread


def _ratio(weight: Tensor, scale: Tensor, mask: str) -> Tensor:
    # torch's own fake quantisation multiplies by the inverse; the rounded mask stands for it.
    return weight * (1 / scale) if mask == "rounded" else weight / scale


def _slopes(ratio: Tensor, grid: str, bits: int, mask: str) -> tuple[Tensor, Tensor]:
    """Derivatives of the level with respect to the weight and to the scale, straight through."""
    one, zero = torch.ones_like(ratio), torch.zeros_like(ratio)
    if grid == "sign":
        size = ratio.abs()
        surrogate = {
            "identity": one,
            "hardtanh": torch.where(size <= 1, one, zero),
            "tanh": 1 - ratio.tanh().square(),
            "approx_sign": torch.where(size <= 1, 2 - 2 * size, zero),
        }[mask]
        level = quantize(ratio, one, grid, bits)
        return torch.where(ratio.isnan(), ratio, surrogate), level
    low, high = bounds(grid, bits)
    shift = 0.5 if grid == "half_integer" else 0.0
    z = ratio - shift
    code = z.round()
    if mask == "rounded":
        inside = (code >= low) & (code <= high)
    elif shift:
        inside = (z > low) & (z < high)
    else:
        inside = (z >= low) & (z <= high)
    for_weight = one if mask == "identity" else torch.where(inside, one, zero)
    clipped = torch.where(z < 0, low + shift, high + shift).to(ratio.dtype)
    for_scale = torch.where(inside, code - z, clipped)
    return torch.where(z.isnan(), z, for_weight), torch.where(z.isnan(), z, for_scale)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, options: tuple[Any, ...]) -> Tensor:
        bits, grid, mask, group_size, _, dtype = options
        ctx.save_for_backward(weight, scale)
        ctx.options = options
        compute = compute_dtype([weight])
        each = spread(scale.to(compute), weight, group_size)
        return quantize(_ratio(weight.to(compute), each, mask), each, grid, bits).to(dtype or weight.dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, scale = ctx.saved_tensors
        bits, grid, mask, group_size, scale_gradient, _ = ctx.options
        compute = compute_dtype([weight])
        each = spread(scale.to(compute), weight, group_size)
        for_weight, for_scale = _slopes(_ratio(weight.to(compute), each, mask), grid, bits, mask)
        given = upstream[0].to(compute)
        rows = weight.shape[0] if weight.ndim else 1
        products = (given * for_scale).double().reshape(rows if scale.numel() > 1 else 1, -1)
        ones = torch.ones_like(products)
        if scale.numel() > 1 and scale.numel() != rows:
            groups = scale.numel() // rows
            missing = groups * group_size - products.shape[1]
            products, ones = (
                torch.nn.functional.pad(t, (0, missing)).view(rows, groups, group_size)
                for t in (products, ones)
            )
        sums, counts = products.sum(-1), ones.sum(-1)
        if scale_gradient:
            sums = sums * counts.apply_(lambda n: gradient_factor(int(n), grid, bits))
        return (given * for_weight).to(weight.dtype), sums.reshape(scale.shape).to(scale.dtype), None


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
    """Weights rounded to a grid, straight-through; see :func:`pyvitfast.ops.fake_quantize`."""
    options = (bits, grid, mask, group_size, scale_gradient, dtype)
    out = []
    for weight, scale in zip(weights, scales, strict=True):
        quantised: Tensor = _StraightThrough.apply(weight, scale, options)
        out.append(quantised)
    return out
