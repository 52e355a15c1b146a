"""Growth by width and depth factors in plain torch: see :mod:`pyvitfast.ops.kron_grow`."""

from __future__ import annotations

import torch
from torch import Tensor


def kron_grow(
    weight: Tensor, a: Tensor, b: Tensor, d: Tensor, *, factors: str = "source", identity: bool = False
) -> Tensor:
    """As :func:`pyvitfast.ops.kron_grow`."""
    layers = weight.shape[1]
    if identity:
        eyes = [torch.eye(f.shape[-1], dtype=f.dtype, device=f.device) for f in (a, b)]
        a, b = (
            torch.cat([e.expand(*f.shape[:-2], -1, -1), f], -2) for e, f in zip(eyes, (a, b), strict=True)
        )
    if a.ndim == 3 and factors == "target":
        return torch.einsum("mpo,tml,tloi,mji->tmpj", b, d, weight, a)
    a, b = (f if f.ndim == 3 else f.expand(layers, *f.shape) for f in (a, b))
    return torch.einsum("lpo,tml,tloi,lji->tmpj", b, d, weight, a)
