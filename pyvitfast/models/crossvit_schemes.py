"""The other ways in which CrossViT's ablation lets two branches exchange; no code of them was published."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

SCHEMES = ("all_attention", "class_token", "pairwise", "none")


def _projection(inside: int, outside: int, norm_layer: Any, keep: bool, **dd: Any) -> nn.Module:
    if keep and inside == outside:
        return nn.Identity()
    return nn.Sequential(norm_layer(inside, **dd), nn.GELU(), nn.Linear(inside, outside, **dd))


class SchemeBlock(nn.Module):
    r"""A multi-scale encoder whose branches exchange as ``fusion`` says.

    Tokens are projected to the wider branch's width W by f and back by g, each LayerNorm, GELU and Linear as
    in the released cross-attention. With :math:`a` and :math:`b` the branches after their own blocks:

    - ``all_attention``: :math:`o = y + \mathrm{MSA}(\mathrm{LN}(y))`, :math:`y = [f(a); f(b)]`, each branch
      takes :math:`g` of its part;
    - ``class_token``: both class tokens become :math:`g(f(a_0) + f(b_0))`;
    - ``pairwise``: so do the patches, the other branch's resized bilinearly to one's own grid;
    - ``none``: nothing.

    In ``class_token`` and ``pairwise`` the wider branch has no f and g, in ``all_attention`` it has: the
    published parameters and MACs fit these choices best. Interpolation and widths were not published.

    Args:
        dim: width of each branch.
        grids: patches of each branch, vertically and horizontally.
        depth: blocks of each branch.
        num_heads: heads of each branch; the wider one's also attend over all tokens.
        mlp_ratio: MLP width over ``dim``, for each branch.
        fusion: one of the names above.
        qkv_bias: whether query, key and value have biases.
        proj_drop: dropout rate of projections.
        attn_drop: dropout rate of attention weights.
        drop_path: stochastic depth rates, by block; the last is the exchange's too.
        norm_layer: makes a norm for a width.
        **dd: ``device`` and ``dtype``.

    Source:
        CrossViT (Chen et al., ICCV 2021), section 3.2, eq. 1 to 3, and the table of fusion schemes.
    """

    def __init__(
        self,
        dim: Sequence[int],
        grids: Sequence[tuple[int, int]],
        depth: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratio: Sequence[float],
        fusion: str,
        *,
        qkv_bias: bool,
        proj_drop: float,
        attn_drop: float,
        drop_path: Sequence[float],
        norm_layer: Any,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.scheme, self.grids = fusion, tuple(grids)
        drops = {"proj_drop": proj_drop, "attn_drop": attn_drop}
        common = {"qkv_bias": qkv_bias, "norm_layer": norm_layer, **drops, **dd}
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(Block(width, heads, ratio, drop_path=drop_path[i], **common) for i in range(blocks))
            )
            for width, heads, ratio, blocks in zip(dim, num_heads, mlp_ratio, depth)
        )
        if fusion == "none":
            return
        wide, keep = max(dim), fusion != "all_attention"
        self.projs = nn.ModuleList(_projection(width, wide, norm_layer, keep, **dd) for width in dim)
        self.revert_projs = nn.ModuleList(_projection(wide, width, norm_layer, keep, **dd) for width in dim)
        if fusion == "all_attention":
            heads = num_heads[list(dim).index(wide)]
            self.norm1 = norm_layer(wide, **dd)
            self.attn = Attention(wide, heads, qkv_bias=qkv_bias, norm_layer=norm_layer, **drops, **dd)
            self.drop_path = DropPath(drop_path[-1]) if drop_path[-1] > 0 else nn.Identity()

    def extra_repr(self) -> str:
        """The scheme for ``print``."""
        return f"scheme={self.scheme!r}"

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        """One tensor for each branch, [B, 1 + P_i, C_i], to the same shapes; floating point of any dtype."""
        tokens = [block(branch) for block, branch in zip(self.blocks, x)]
        if self.scheme == "none":
            return tokens
        if self.scheme == "all_attention":
            y = torch.cat([proj(branch) for proj, branch in zip(self.projs, tokens)], dim=1)
            y = y + self.drop_path(self.attn(self.norm1(y)))
            parts = y.split([branch.shape[1] for branch in tokens], dim=1)
            return [revert(part) for revert, part in zip(self.revert_projs, parts)]
        if self.scheme == "class_token":
            total = sum(proj(branch[:, :1]) for proj, branch in zip(self.projs, tokens))
            return [
                torch.cat((revert(total), branch[:, 1:]), dim=1)
                for revert, branch in zip(self.revert_projs, tokens)
            ]
        projected = [proj(branch) for proj, branch in zip(self.projs, tokens)]
        outs = []
        for i, (revert, own) in enumerate(zip(self.revert_projs, projected)):
            others = [self._on_grid(other, j, i) for j, other in enumerate(projected) if j != i]
            outs.append(revert(own + sum(others)))
        return outs

    def _on_grid(self, tokens: Tensor, source: int, target: int) -> Tensor:
        """Tokens [B, 1 + P, W] with the patches resized from one branch's grid to another's."""
        grid = tokens[:, 1:].transpose(1, 2)  # [B, W, P]
        grid = grid.reshape(*grid.shape[:2], *self.grids[source])
        grid = F.interpolate(grid, size=self.grids[target], mode="bilinear", align_corners=False)
        return torch.cat((tokens[:, :1], grid.flatten(2).transpose(1, 2)), dim=1)
