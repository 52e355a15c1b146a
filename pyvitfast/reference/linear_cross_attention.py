"""Plain-torch reference of ``linear_cross_attention``."""

from __future__ import annotations

from torch import Tensor

from pyvitfast.reference.semantic_pool_attention import semantic_pool_attention


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
    row = query.unsqueeze(1)  # [B, 1, C]
    return semantic_pool_attention(
        row,
        tokens,
        q_weight,
        k_weight,
        v_weight,
        proj_weight,
        num_heads=num_heads,
        tokens_before=row,
        q_bias=q_bias,
        k_bias=k_bias,
        v_bias=v_bias,
        proj_bias=proj_bias,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        eps=eps,
        scale=scale,
    ).squeeze(1)
