"""Plain-torch reference of ``few_query_attention``."""

from __future__ import annotations

import torch
from torch import Tensor


def few_query_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    k_before: Tensor | None = None,
    v_before: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """A few queries over many keys, with the log of the softmax's sum; see
    :func:`pyvitfast.ops.few_query_attention`.

    Keys, values and scores are made whole, as the formula reads.
    """
    if k_before is not None and v_before is not None:
        k, v = torch.cat([k_before, k], dim=2), torch.cat([v_before, v], dim=2)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * (q.to(wide) @ k.to(wide).transpose(-2, -1))  # [B, H, M, N]
    if bias is not None:
        scores = scores + bias.to(wide)
    lse = scores.logsumexp(dim=-1)  # [B, H, M]
    # A row without a key that may be attended gives zeros, not NaN.
    empty = (scores == -torch.inf).all(dim=-1, keepdim=True)
    weights = (scores - lse.unsqueeze(-1).masked_fill(empty, 0.0)).exp()
    return (weights @ v.to(wide)).to(q.dtype), lse
