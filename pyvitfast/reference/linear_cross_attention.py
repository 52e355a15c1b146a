"""Plain-torch reference of ``linear_cross_attention``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_attention(
    query: Tensor,
    tokens: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    proj_weight: Tensor,
    *,
    num_heads: int,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    proj_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    scale: float | None = None,
) -> Tensor:
    """One query per image over itself and ``tokens``; see :func:`pyvitfast.ops.linear_cross_attention`.

    Keys and values are computed for every token, as the formula reads.
    """
    x = torch.cat([query.unsqueeze(1), tokens], dim=1)  # [B, 1 + N, C]
    batch, rows, channels = x.shape
    if norm_weight is not None:
        x = F.layer_norm(x, (channels,), norm_weight, norm_bias, eps)
    width = channels // num_heads
    scale = width**-0.5 if scale is None else scale
    q = F.linear(x[:, :1], q_weight, q_bias).view(batch, 1, num_heads, width).transpose(1, 2)  # [B, H, 1, D]
    k = F.linear(x, k_weight, k_bias).view(batch, rows, num_heads, width).transpose(1, 2)  # [B, H, 1 + N, D]
    v = F.linear(x, v_weight, v_bias).view(batch, rows, num_heads, width).transpose(1, 2)  # [B, H, 1 + N, D]
    attention = (q @ k.transpose(-2, -1) * scale).softmax(dim=-1)  # [B, H, 1, 1 + N]
    heads = (attention @ v).transpose(1, 2).reshape(batch, channels)  # [B, C]
    return F.linear(heads, proj_weight, proj_bias)  # [B, C]
