"""Plain-torch reference of ``spsa_update_``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyvitfast.reference._quantizer import compute_dtype, fused_multiply_add, spread
from pyvitfast.reference._spsa import direction_of, direction_sign, noise


@torch.no_grad()
def spsa_update_(
    grads: Sequence[Tensor],
    scales: Sequence[Tensor],
    slopes: Tensor,
    sqnorm: Tensor,
    *,
    seed: int,
    one_minus_beta: float,
    kind: str = "uniform",
    direction: int = 0,
    group_size: int = 0,
    tensor_ids: Sequence[int] | None = None,
    offsets: Sequence[int] | None = None,
) -> None:
    """The SPSA estimate in place of each gradient; see :func:`pyvitfast.ops.spsa_update_`."""
    ids = range(len(grads)) if tensor_ids is None else tensor_ids
    starts = [0] * len(grads) if offsets is None else offsets
    count = slopes.numel()
    for grad, scale, tensor_id, start in zip(grads, scales, ids, starts, strict=True):
        compute = compute_dtype([grad])
        alpha = spread(scale.to(compute), grad, group_size)
        scaled = alpha * grad.to(compute)
        total = torch.zeros_like(scaled)
        for i in range(count):
            drawn = noise(seed, tensor_id, direction + i, start, grad.numel(), kind, grad.device)
            v = direction_of(scaled, sqnorm, direction_sign(seed, direction + i), one_minus_beta, drawn)
            factor = (slopes.flatten()[i].double() / (count * alpha.double())).to(compute)
            total = fused_multiply_add(factor, v, total)
        grad.copy_(total)
