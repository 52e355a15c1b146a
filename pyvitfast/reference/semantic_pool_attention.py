"""Plain-torch reference of ``semantic_pool_attention``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def semantic_pool_attention(
    query: Tensor,
    tokens: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    proj_weight: Tensor,
    *,
    num_heads: int,
    tokens_before: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    proj_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    scale: float | None = None,
) -> Tensor:
    """M queries an image over ``[tokens_before; tokens]``; see :func:`pyvitfast.ops.semantic_pool_attention`.

    Keys and values are computed for every token, as the formula reads.
    """
    if tokens_before is not None:
        tokens = torch.cat([tokens_before, tokens], dim=1)  # [B, K + N, C]
    channels = tokens.shape[2]
    if norm_weight is not None:
        query = F.layer_norm(query, (channels,), norm_weight, norm_bias, eps)
        tokens = F.layer_norm(tokens, (channels,), norm_weight, norm_bias, eps)
    width = channels // num_heads
    scale = width**-0.5 if scale is None else scale

    def heads(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.unflatten(F.linear(x, weight, bias), 2, (num_heads, width)).transpose(1, 2)

    q, k, v = heads(query, q_weight, q_bias), heads(tokens, k_weight, k_bias), heads(tokens, v_weight, v_bias)
    attention = (q @ k.transpose(-2, -1) * scale).softmax(dim=-1)  # [B, H, M, K + N]
    mixed = (attention @ v).transpose(1, 2).flatten(2)  # [B, M, C]
    return F.linear(mixed, proj_weight, proj_bias)
