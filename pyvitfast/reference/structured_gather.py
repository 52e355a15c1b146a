"""Plain-torch reference of ``structured_gather``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def structured_gather(
    tensors: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    cols: Sequence[Tensor | None],
    *,
    row_scale: Sequence[Tensor | None] | None = None,
    col_scale: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """Gather kept rows and columns; see :func:`pyvitfast.ops.structured_gather`."""
    none = [None] * len(tensors)
    out = []
    for tensor, row, col, rscale, cscale in zip(
        tensors, rows, cols, row_scale or none, col_scale or none, strict=True
    ):
        kept = tensor  # [O, ...]
        if row is not None:
            kept = kept.index_select(0, row)  # [O', ...]
        if col is not None:
            kept = kept.index_select(-1, col)  # [O', I']
        if rscale is not None or cscale is not None:
            wide = kept.to(rscale.dtype if rscale is not None else cscale.dtype)  # type: ignore[union-attr]
            if rscale is not None:
                wide = wide * rscale.view(-1, *[1] * (kept.ndim - 1))
            if cscale is not None:
                wide = wide * cscale
            kept = wide.to(tensor.dtype)
        out.append(kept.clone() if kept is tensor else kept)
    return out
