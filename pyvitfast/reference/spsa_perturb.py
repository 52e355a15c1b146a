"""Plain-torch reference of ``spsa_perturb``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyvitfast.reference._quantizer import compute_dtype, fused_multiply_add, quantize, spread
from pyvitfast.reference._spsa import direction_of, direction_sign, noise


@torch.no_grad()
def spsa_perturb(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    scales: Sequence[Tensor],
    sqnorm: Tensor,
    *,
    seed: int,
    one_minus_beta: float,
    eps_bar: float,
    bits: int,
    grid: str = "integer",
    kind: str = "uniform",
    direction: int = 0,
    directions: int = 1,
    group_size: int = 0,
    tensor_ids: Sequence[int] | None = None,
    offsets: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Quantised weights on both sides of each direction; see :func:`pyvitfast.ops.spsa_perturb`."""
    ids = range(len(weights)) if tensor_ids is None else tensor_ids
    starts = [0] * len(weights) if offsets is None else offsets
    plus: list[Tensor] = []
    minus: list[Tensor] = []
    for weight, grad, scale, tensor_id, start in zip(weights, grads, scales, ids, starts, strict=True):
        compute = compute_dtype([weight])
        w = weight.to(compute)
        alpha = spread(scale.to(compute), weight, group_size)
        scaled = alpha * grad.to(compute)
        radius = torch.tensor(eps_bar, dtype=compute, device=w.device) * alpha
        sides: tuple[list[Tensor], list[Tensor]] = ([], [])
        for i in range(direction, direction + directions):
            drawn = noise(seed, tensor_id, i, start, weight.numel(), kind, weight.device)
            v = direction_of(scaled, sqnorm, direction_sign(seed, i), one_minus_beta, drawn)
            for side, sign in zip(sides, (1, -1), strict=True):
                moved = fused_multiply_add(sign * radius, v, w)
                side.append(quantize(moved / alpha, alpha, grid, bits).to(dtype or weight.dtype))
        for out, side in zip((plus, minus), sides, strict=True):
            out.append(torch.stack(side) if side else w.new_empty((0, *w.shape), dtype=dtype))
    return plus, minus
