"""Sum of squares of many scaled gradients, by a fixed tree in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyvitfast.ops import _checks, _quantizer

NAME = "scaled_sqnorm"


def _check(grads: Sequence[Tensor], scales: Sequence[Tensor], group_size: int) -> None:
    _quantizer.scaled(NAME, "grads", grads, scales, group_size)
    for i, grad in enumerate(grads):
        _checks.dtype_in(NAME, f"grads[{i}]", grad, _checks.FLOATS)


def scaled_sqnorm(grads: Sequence[Tensor], scales: Sequence[Tensor], *, group_size: int = 0) -> Tensor:
    r"""Squared norm of all gradients in scaled coordinates, :math:`\sum_k \lVert s_k \odot g_k \rVert^2`.

    Args:
        grads: n tensors of any shape, float32, bfloat16, float16 or float64. Any strides; what is not
            contiguous is copied once.
        scales: n tensors, float32 (float64 for float64 gradients): one entry, one a row [O], or
            [O, ceil(I / group_size)], where a gradient counts as [O, I].
        group_size: columns that share a scale in the last form; 0 allows the first two only.

    Returns:
        Float64 tensor [] on the gradients' device; no host sync. 0 for an empty list.

    Raises:
        TypeError: not lists of float tensors, or scales of another dtype.
        ValueError: lengths, shapes or devices that do not match.

    Products are rounded to the gradient's precision (float32 at least), their squares are exact and added in
    float64 by one tree: 128 lanes of a chunk of 1024 elements, then the chunks, 1024 at a time. CPU and CUDA
    give the same bits, for any number of threads. NaN and Inf propagate. Not differentiable.

    Source:
        The global norm of FOGZO (Yang and Aamodt, NeurIPS 2025), Algorithm 1. Scaled coordinates and the tree
        are our choices.

    Example:
        >>> pyvitfast.ops.scaled_sqnorm([torch.tensor([3.0, 0.0, -4.0, 0.0])], [torch.tensor(0.25)])
        tensor(1.5625, dtype=torch.float64)
    """
    op = _checks.call(NAME)
    _check(grads, scales, group_size)
    if not grads:
        return torch.zeros((), dtype=torch.float64)
    result: Tensor = op([g.detach() for g in grads], [s.detach() for s in scales], group_size)
    return result


def _fake(grads: list[Tensor], scales: list[Tensor], group_size: int) -> Tensor:
    _check(grads, scales, group_size)
    return grads[0].new_empty((), dtype=torch.float64)


if _checks.defined():
    torch.library.register_fake(f"pyvitfast::{NAME}", _fake)
