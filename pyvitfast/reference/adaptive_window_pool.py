"""Plain-torch reference of ``adaptive_window_pool``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bins(cells: int, count: int) -> list[tuple[int, int]]:
    """First cell and end of each of ``count`` bins over ``cells`` cells, by torch's rule."""
    return [(i * cells // count, -(-(i + 1) * cells // count)) for i in range(count)]


def adaptive_window_pool(
    x: Tensor,
    size: tuple[int, int],
    mode: str = "avg",
    intra: Tensor | None = None,
    inter: Tensor | None = None,
) -> Tensor:
    """One row for each of ``size`` windows of a grid; see :func:`pyvitfast.ops.adaptive_window_pool`."""
    _, height, width, _ = x.shape
    if mode in ("avg", "max"):
        pool = F.adaptive_avg_pool2d if mode == "avg" else F.adaptive_max_pool2d
        return pool(x.permute(0, 3, 1, 2), size).flatten(2).transpose(1, 2)
    if intra is None:
        raise ValueError("adaptive_window_pool: mode 'learned' needs `intra`.")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    logits = intra.to(wide) if inter is None else intra.to(wide) + inter.to(wide)  # [B, S, KH, KW]
    rows = []
    windows = [(r, c) for r in bins(height, size[0]) for c in bins(width, size[1])]
    for i, ((top, bottom), (left, right)) in enumerate(windows):
        cells = x[:, top:bottom, left:right].flatten(1, 2).to(wide)
        weights = logits[:, i, : bottom - top, : right - left].flatten(1).softmax(dim=-1).unsqueeze(1)
        rows.append(weights @ cells)  # [B, 1, C]
    return torch.cat(rows, dim=1).to(x.dtype)
