"""Growth by width and depth factors in plain torch: see :mod:`pyvitfast.ops.kron_grow`."""

from __future__ import annotations

import torch
from torch import Tensor


def kron_grow(weight: Tensor, a: Tensor, b: Tensor, d: Tensor, *, factors: str = "source") -> Tensor:
    """As :func:`pyvitfast.ops.kron_grow`."""
    if a.ndim == 3 and factors == "target":
        return torch.einsum("mpo,tml,tloi,mji->tmpj", b, d, weight, a)
    layers = weight.shape[1]
    a, b = (f if f.ndim == 3 else f.expand(layers, *f.shape) for f in (a, b))
    return torch.einsum("lpo,tml,tloi,lji->tmpj", b, d, weight, a)
