"""Growth by a ring of four cores in plain torch: see :mod:`pyvitfast.ops.tensor_ring_grow`."""

from __future__ import annotations

import torch
from torch import Tensor


def tensor_ring_grow(
    weight: Tensor, s_b: Tensor, s_o: Tensor, s_l: Tensor, s_i: Tensor, *, columns: int = 0
) -> Tensor | tuple[Tensor, Tensor]:
    """As :func:`pyvitfast.ops.tensor_ring_grow`, core after core."""
    out = torch.einsum("lboi,xopy->lbipxy", weight, s_o)
    out = torch.einsum("lbipxy,wbcx->lcipyw", out, s_b)
    out = torch.einsum("lcipyw,ylmz->mcipzw", out, s_l)
    out = torch.einsum("mcipzw,zijw->mcpj", out, s_i)
    if not columns:
        return out
    kept = out.shape[1] - columns
    return out[:, :kept], out[:, kept:].transpose(1, 2).flatten(2)
