"""Plain-torch reference of ``scaled_sqnorm``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyvitfast.reference._quantizer import compute_dtype, spread


def scaled_sqnorm(grads: Sequence[Tensor], scales: Sequence[Tensor], *, group_size: int = 0) -> Tensor:
    """Sum of squares of ``scale * grad``; see :func:`pyvitfast.ops.scaled_sqnorm`."""
    total = torch.zeros((), dtype=torch.float64, device=grads[0].device if grads else None)
    for grad, scale in zip(grads, scales, strict=True):
        compute = compute_dtype([grad])
        scaled = spread(scale.detach().to(compute), grad, group_size) * grad.detach().to(compute)
        total = total + scaled.double().square().sum()
    return total
