"""Plain-torch reference of ``saliency_rowcol``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def saliency_rowcol(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    inv_scale: Tensor | None = None,
    abs: bool = False,
) -> Tensor:
    """Row and column sums of ``weight * grad``; see :func:`pyvitfast.ops.saliency_rowcol`."""
    wide = any(w.dtype == torch.float64 for w in weights)
    compute = torch.float64 if wide else torch.float32
    sums = []
    for weight, grad in zip(weights, grads, strict=True):
        rows = weight.shape[0]
        cols = weight.numel() // rows if rows else weight[:0].flatten(1).shape[1] if weight.ndim > 1 else 1
        product = weight.to(compute) * grad.to(compute)  # [O, ...]
        if abs:
            product = product.abs()
        product = product.reshape(rows, cols)  # [O, I]
        sums += [product.sum(1), product.sum(0)]  # [O], [I]
    workspace = torch.cat(sums)  # [sum_k (O_k + I_k)]
    return workspace if inv_scale is None else workspace * inv_scale.to(compute)
