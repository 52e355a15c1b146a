"""Plain-torch reference of ``window_gather_attention``."""

from __future__ import annotations

import torch
from torch import Tensor


def window_gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_window: tuple[int, int],
    key_stride: tuple[int, int],
    key_offset: tuple[int, int],
    valid_hw: tuple[int, int] | None = None,
    *,
    k_before: Tensor | None = None,
    v_before: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Windows of queries over windows of a grid of keys; see :func:`pyvitfast.ops.window_gather_attention`.

    A window at a time, as the formula reads.
    """
    down, across, width = q.shape[1], q.shape[2], q.shape[5]
    height, breadth = (k.shape[1], k.shape[2]) if valid_hw is None else valid_hw
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = width**-0.5 if scale is None else scale
    rows = []
    for a in range(down):
        top = a * key_stride[0] + key_offset[0]
        for b in range(across):
            left = b * key_stride[1] + key_offset[1]
            down_to, right_to = min(top + key_window[0], height), min(left + key_window[1], breadth)
            within = slice(max(top, 0), max(down_to, 0)), slice(max(left, 0), max(right_to, 0))
            keys = k[:, within[0], within[1]].flatten(1, 2)
            values = v[:, within[0], within[1]].flatten(1, 2)
            if k_before is not None and v_before is not None:
                keys = torch.cat([k_before[:, a, b], keys], dim=1)
                values = torch.cat([v_before[:, a, b], values], dim=1)
            scores = scale * torch.einsum("bmhd,bnhd->bhmn", q[:, a, b].to(wide), keys.to(wide))
            # Without a key the sum is over nothing: zeros.
            rows.append(torch.einsum("bhmn,bnhd->bmhd", scores.softmax(dim=-1), values.to(wide)))
    if not rows:
        return torch.empty_like(q)
    return torch.stack(rows, dim=1).view(q.shape).to(q.dtype)
