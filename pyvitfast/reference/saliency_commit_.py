"""Plain-torch reference of ``saliency_commit_``."""

from __future__ import annotations

import torch
from torch import Tensor


def saliency_commit_(
    acc: Tensor,
    counts: Tensor,
    workspace: Tensor,
    indptr: Tensor,
    indices: Tensor,
    *,
    coeff: Tensor | None = None,
) -> None:
    """Add each unit's squared sum to ``acc``; see :func:`pyvitfast.ops.saliency_commit_`."""
    values = workspace.to(acc.dtype)[indices.long()]  # [nnz]
    lengths = indptr[1:].long() - indptr[:-1].long()  # [U]
    units = torch.repeat_interleave(torch.arange(acc.numel(), device=acc.device), lengths)  # [nnz]
    sums = torch.zeros_like(acc).index_add_(0, units, values)  # [U]
    if coeff is not None:
        sums = sums * coeff.to(acc.dtype)
    squares = sums.square()
    clean = workspace.isfinite().all() & squares.isfinite().all()  # []
    acc.add_(torch.where(clean, squares, torch.zeros_like(squares)))
    counts.add_(torch.stack([clean, ~clean]).to(counts.dtype))
