"""Per-unit squared saliency, accumulated in place."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvitfast.ops import _checks

NAME = "saliency_commit_"
_INTS = (torch.int32, torch.int64)


def _check(
    acc: Tensor, counts: Tensor, workspace: Tensor, indptr: Tensor, indices: Tensor, coeff: Tensor | None
) -> None:
    named = [
        ("acc", acc),
        ("counts", counts),
        ("workspace", workspace),
        ("indptr", indptr),
        ("indices", indices),
    ]
    if coeff is not None:
        named.append(("coeff", coeff))
    for name, tensor in named:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{NAME}: `{name}` must be a tensor, got {type(tensor).__name__}.")
    _checks.same_device(NAME, named)
    for name, tensor in named:
        _checks.dense(NAME, name, tensor)
    floats = (torch.float32, torch.float64)
    _checks.dtype_in(NAME, "acc", acc, floats)
    _checks.dtype_in(NAME, "counts", counts, (torch.int64,))
    _checks.dtype_in(NAME, "workspace", workspace, (acc.dtype,))
    _checks.dtype_in(NAME, "indptr", indptr, _INTS)
    _checks.dtype_in(NAME, "indices", indices, (indptr.dtype,))
    if coeff is not None:
        _checks.dtype_in(NAME, "coeff", coeff, (acc.dtype,))
    for name, tensor in named:
        if tensor.ndim != 1:
            raise ValueError(f"{NAME}: `{name}` must have rank 1, got shape {list(tensor.shape)}.")
        if name in ("acc", "counts") and not tensor.is_contiguous():
            raise ValueError(f"{NAME}: `{name}` is written in place and must be contiguous.")
    if counts.shape[0] != 2:
        raise ValueError(
            f"{NAME}: `counts` must have shape [2] (committed, skipped), got {list(counts.shape)}."
        )
    if indptr.shape[0] != acc.shape[0] + 1:
        raise ValueError(
            f"{NAME}: `indptr` must have shape [{acc.shape[0] + 1}], one more than `acc`, "
            f"got {list(indptr.shape)}."
        )
    if coeff is not None and coeff.shape != acc.shape:
        raise ValueError(f"{NAME}: `coeff` must have shape {list(acc.shape)}, got {list(coeff.shape)}.")


def saliency_commit_(
    acc: Tensor,
    counts: Tensor,
    workspace: Tensor,
    indptr: Tensor,
    indices: Tensor,
    *,
    coeff: Tensor | None = None,
) -> None:
    r"""Add the squared saliency of each structural unit to ``acc``, unless the minibatch is not finite.

    :math:`s_u = c_u \sum_k \text{workspace}[\text{indices}_k]` for k from :math:`\text{indptr}_u` up to
    :math:`\text{indptr}_{u+1}`, then :math:`\text{acc}_u \mathrel{+}= s_u^2`. If any workspace entry or any
    square is NaN or Inf the whole minibatch is left out: ``acc`` stays as it is and ``counts[1]`` grows by
    one instead of ``counts[0]``.

    Args:
        acc: float32 or float64 [U], written in place.
        counts: int64 [2], (committed, skipped) minibatches, written in place.
        workspace: [W] of ``acc``'s dtype, from :func:`saliency_rowcol`.
        indptr: int32 or int64 [U + 1], non-decreasing, from 0 to nnz.
        indices: [nnz] of ``indptr``'s dtype, each in [0, W).
        coeff: [U] of ``acc``'s dtype, the factor of each unit's sum; 1 when left out.

    Raises:
        TypeError: wrong dtype or not a tensor.
        ValueError: wrong rank, size or device.
        RuntimeError: an index outside the workspace or a descending ``indptr``; nothing is written then.
            Checked on the CPU; the CUDA kernel counts such a minibatch as skipped, as checking would
            cost a host sync a step.

    Not differentiable. No host sync. Sums run in index order in float64 on the CPU, in float32 on CUDA.

    Source:
        NViT (Yang et al., CVPR 2023), eq. 6, with the square after the full sum of the structural group.

    Example:
        >>> acc, counts = torch.zeros(2), torch.zeros(2, dtype=torch.int64)
        >>> workspace = torch.tensor([1.0, 2.0, 3.0])
        >>> indptr, indices = torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1])
        >>> pyvitfast.ops.saliency_commit_(acc, counts, workspace, indptr, indices)
        >>> acc, counts
        (tensor([16.,  4.]), tensor([1, 0]))
    """
    op = _checks.call(NAME)
    _check(acc, counts, workspace, indptr, indices, coeff)
    op(acc, counts, workspace.detach(), indptr, indices, coeff)


def _fake(
    acc: Tensor,
    counts: Tensor,
    workspace: Tensor,
    indptr: Tensor,
    indices: Tensor,
    coeff: Tensor | None = None,
) -> None:
    _check(acc, counts, workspace, indptr, indices, coeff)


if _checks.defined():
    torch.library.register_fake(f"pyvitfast::{NAME}", _fake)
