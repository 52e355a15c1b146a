"""Plain-torch reference of ``structured_zero_``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def structured_zero_(
    tensors: Sequence[Tensor],
    row_alive: Sequence[Tensor | None],
    col_alive: Sequence[Tensor | None],
) -> None:
    """Store 0 in dead rows and columns; see :func:`pyvitfast.ops.structured_zero_`."""
    for tensor, rows, cols in zip(tensors, row_alive, col_alive, strict=True):
        target = tensor.detach() if tensor.ndim > 1 else tensor.detach().unsqueeze(1)  # [O, ...]
        if rows is not None:
            target[~rows] = 0
        if cols is not None:
            target[..., ~cols] = 0
