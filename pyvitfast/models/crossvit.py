"""CrossViT as a family: any patches, widths and depths, on timm's class."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import trunc_normal_
from timm.models import checkpoint_seq
from timm.models.crossvit import CrossVit, MultiScaleBlock, PatchEmbed
from torch import Tensor, nn

from pyvitfast.models.crossvit_fusion import LinearMultiScaleBlock
from pyvitfast.models.crossvit_schemes import SchemeBlock

if TYPE_CHECKING:
    from pyvitfast.models.crossvit_config import CrossViTConfig


def _encoder(config: CrossViTConfig, index: int, rates: list[float], norm_layer: Any, **dd: Any) -> nn.Module:
    """One multi-scale encoder; an empty branch stays in its place, where timm would shift the other one."""
    depth = config.depth[index]
    common = {
        "qkv_bias": config.qkv_bias,
        "proj_drop": config.proj_drop_rate,
        "attn_drop": config.attn_drop_rate,
        "drop_path": rates,
        "norm_layer": norm_layer,
        **dd,
    }
    widths, heads, ratios = config.embed_dim, config.num_heads, config.mlp_ratio
    if config.fusion != "cross_attention":
        return SchemeBlock(widths, config.grids(), depth, heads, ratios, config.fusion, **common)
    kind = LinearMultiScaleBlock if config.linear else MultiScaleBlock
    made = (max(1, depth[0]), max(1, depth[1]), depth[2])
    encoder: nn.Module = kind(widths, config.tokens(), made, heads, ratios, **common)
    branches: Any = encoder.blocks
    for branch, blocks in enumerate(depth[:2]):
        if not blocks:
            branches[branch] = nn.Sequential()
    return encoder


class CrossViT(CrossVit):  # type: ignore[misc]
    """A timm ``CrossVit`` built from a checked configuration.

    State-dict keys and all methods are timm's. Beyond timm's class it takes image sizes that are no multiple
    of the patches, any depth of either branch, the fusion schemes of the ablation, and gradient
    checkpointing; its cross-attention runs on :func:`pyvitfast.ops.linear_cross_attention`.

    Args:
        config: the architecture.
        device: where parameters are made.
        dtype: of the parameters.

    Source:
        CrossViT (Chen et al., ICCV 2021).
    """

    def __init__(
        self, config: CrossViTConfig, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        norm_layer = partial(nn.LayerNorm, eps=config.norm_eps)
        # timm makes tokens, norms and heads; what depends on image size or depth is replaced below.
        super().__init__(
            img_size=config.patch_size,
            img_scale=(1.0, 1.0),
            patch_size=config.patch_size,
            in_chans=config.in_chans,
            num_classes=config.num_classes,
            embed_dim=config.embed_dim,
            depth=((1, 1, 0),),
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            crop_scale=config.crop_scale,
            drop_rate=config.drop_rate,
            pos_drop_rate=config.pos_drop_rate,
            norm_layer=norm_layer,
            global_pool=config.global_pool,
            **dd,
        )
        self.config = config
        self.grad_checkpointing = False
        self.img_size, self.img_size_scaled = config.img_size, list(config.branch_sizes())
        branches = list(zip(self.img_size_scaled, config.patch_size, config.embed_dim))
        self.patch_embed = nn.ModuleList(
            PatchEmbed(size, patch, config.in_chans, width, config.multi_conv, **dd)
            for size, patch, width in branches
        )
        for i, (tokens, width) in enumerate(zip(config.tokens(), config.embed_dim)):
            position = nn.Parameter(torch.zeros(1, tokens, width, **dd))
            setattr(self, f"pos_embed_{i}", trunc_normal_(position, std=0.02))
        rates = config.drop_path_rates()
        self.blocks = nn.ModuleList(
            _encoder(config, k, rates[k], norm_layer, **dd) for k in range(len(config.depth))
        )
        self.num_feature_blocks = len(self.blocks)
        self.feature_info = [
            {
                "num_chs": width,
                "reduction": round(patch * config.img_size[0] / size[0]),
                "module": f"blocks.{k}",
            }
            for size, patch, width in branches
            for k in range(len(self.blocks))
        ]
        self.apply(self._init_weights)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the tokens between encoders for the backward, and compute the rest again there."""
        self.grad_checkpointing = enable

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Normalised tokens of both branches, [B, N_i, C_i], of images [B, C, H, W]."""
        if not self.grad_checkpointing:
            features: list[Tensor] = super().forward_features(x)
            return features
        xs = checkpoint_seq(self.blocks, self._embed(x))
        return [norm(branch) for norm, branch in zip(self.norm, xs)]
