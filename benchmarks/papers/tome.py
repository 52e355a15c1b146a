"""Token merging, as a peer: tokens of a ViT are merged by bipartite matching in every block."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor


def merge(metric: Tensor, x: Tensor, size: Tensor, r: int, protected: int) -> tuple[Tensor, Tensor]:
    """Merge the ``r`` tokens of ``x`` [B, N, C] that are most like another one.

    Every other token looks for the most similar one among the rest; the ``r`` best pairs become one token,
    a mean weighted by how many patches each stands for. The first ``protected`` tokens stay.

    Args:
        metric: [B, N, D], what is compared.
        x: tokens.
        size: [B, N, 1] patches that each token stands for.
        r: pairs; at most half of the tokens.
        protected: 0 or 1 class token.

    Returns:
        Tokens [B, N - r, C] and their sizes.

    Source:
        Token Merging (Bolya et al., ICLR 2023), section 3.
    """
    count = x.shape[1]
    r = min(r, (count - protected) // 2)
    if r <= 0:
        return x, size
    metric = F.normalize(metric, dim=-1)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    if protected:
        scores[:, 0] = -torch.inf
    best, partner = scores.max(dim=-1)
    order = best.argsort(dim=-1, descending=True)
    gone, kept = order[:, :r], order[:, r:].sort(dim=-1).values
    partner = partner.gather(1, gone).unsqueeze(-1)

    def rows(t: Tensor, index: Tensor) -> Tensor:
        return t.gather(1, index.unsqueeze(-1).expand(-1, -1, t.shape[-1]))

    def combined(t: Tensor) -> Tensor:
        sources, targets = t[:, ::2], t[:, 1::2]
        moved = rows(sources, gone)
        targets = targets.scatter_add(1, partner.expand_as(moved), moved)
        return torch.cat([rows(sources, kept), targets], dim=1)

    new_size = combined(size)
    return combined(x * size) / new_size, new_size


class MergingViT(VisionTransformer):  # type: ignore[misc]
    """timm's ViT with ``r`` tokens fewer after the attention of each block."""

    r = 0

    def forward_features(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        x = self.norm_pre(self._pos_embed(self.patch_embed(x)))
        size = torch.ones_like(x[..., :1])
        for block in self.blocks:
            attn: Any = block.attn
            q, k, v = (
                part.unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
                for part in attn.qkv(block.norm1(x)).chunk(3, dim=-1)
            )
            bias = size.log().transpose(1, 2).unsqueeze(1)  # a token of many patches counts as many
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(-1, 1, q.shape[2], -1))
            x = x + attn.proj(mixed.transpose(1, 2).flatten(2))
            x, size = merge(k.mean(dim=1), x, size, self.r, self.num_prefix_tokens)
            x = x + block.mlp(block.norm2(x))
        out: Tensor = self.norm(x)
        return out


def macs(model: VisionTransformer, r: int) -> int:
    """Multiply-accumulates of one image with ``r`` tokens fewer in each block; matching is not counted."""
    width, count = model.embed_dim, model.pos_embed.shape[1]
    total = model.patch_embed.num_patches * model.patch_embed.proj.weight.numel()
    for _ in model.blocks:
        fewer = count - min(r, (count - model.num_prefix_tokens) // 2)
        total += 4 * count * width**2 + 2 * count**2 * width + 8 * fewer * width**2
        count = fewer
    return total + model.num_classes * width


def rate_for(model: VisionTransformer, target: int) -> int:
    """The ``r`` whose count comes nearest to ``target``."""
    return min(range(model.pos_embed.shape[1] // 2), key=lambda r: abs(macs(model, r) - target))
