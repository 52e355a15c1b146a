"""The settings of a timm CrossViT, read from the model."""

from __future__ import annotations

from typing import Any

from timm.layers import DropPath, Mlp
from timm.models.crossvit import CrossAttention, CrossAttentionBlock, MultiScaleBlock, PatchEmbed
from timm.models.vision_transformer import Attention, Block
from torch import nn

from pyvitfast.models.crossvit_fusion import LinearMultiScaleBlock
from pyvitfast.models.crossvit_schemes import SchemeBlock
from pyvitfast.models.modules import plain_class

# All that our class and timm's are made of; anything else would be lost in a description.
_PARTS = (
    *(nn.ModuleList, nn.Sequential, nn.Identity, nn.Linear, nn.LayerNorm, nn.GELU, nn.Dropout),
    *(nn.Conv2d, nn.ReLU, DropPath, Mlp, Attention, Block),
    *(PatchEmbed, CrossAttention, CrossAttentionBlock, MultiScaleBlock, LinearMultiScaleBlock, SchemeBlock),
)


def need(where: str, rule: str, good: bool, got: object) -> None:
    """Raise NotImplementedError about ``where`` unless ``good``."""
    if not good:
        raise NotImplementedError(
            f"CrossViTConfig.from_model: {where}: must be {rule}, got {got}. Supported are timm's CrossVit "
            "and ours with plain blocks."
        )


def check_parts(model: Any) -> None:
    """Raise NotImplementedError for the first module of ``model`` that is not one of timm's or ours."""
    for name, module in model.named_modules():
        if name:
            need(name, "a module of timm's CrossVit", plain_class(module) in _PARTS, type(module).__name__)
        if isinstance(module, nn.GELU):
            need(f"{name}.approximate", "none", module.approximate == "none", module.approximate)
        if isinstance(module, Attention | CrossAttention):
            width = (module.qkv if isinstance(module, Attention) else module.wq).in_features
            scale = (width // module.num_heads) ** -0.5
            need(f"{name}.scale", str(scale), module.scale == scale, module.scale)


def _modules_of(fusion: nn.Module) -> int:
    """L' of a fusion: 0 without, else the length of its Sequential."""
    return len(fusion) if isinstance(fusion, nn.Sequential) else 0


def timm_arguments(model: Any) -> dict[str, Any]:
    """The arguments that would make timm's ``CrossVit`` like ``model``, read from its modules.

    Raises:
        NotImplementedError: a part that timm's arguments cannot describe; the message names it.
    """
    for name, embed in model.patch_embed.named_children():
        good = plain_class(embed) is PatchEmbed
        need(f"patch_embed.{name}", "timm's PatchEmbed", good, type(embed).__name__)
    for name, norm in model.named_modules():
        if isinstance(norm, nn.LayerNorm):
            need(name, f"of eps {model.norm[0].eps}", norm.eps == model.norm[0].eps, norm.eps)
    for i, encoder in enumerate(model.blocks):
        good = plain_class(encoder) in (MultiScaleBlock, LinearMultiScaleBlock)
        need(f"blocks.{i}", "timm's MultiScaleBlock", good, type(encoder).__name__)
        for name, block in encoder.blocks.named_modules():
            if name.count(".") != 1:
                continue
            good = plain_class(block) is Block and type(block.attn) is Attention and type(block.mlp) is Mlp
            need(f"blocks.{i}.blocks.{name}", "timm's Block", good, type(block).__name__)
    embeds, first, last = model.patch_embed, model.blocks[0], model.blocks[-1]
    fusions = [fusion if isinstance(fusion, nn.Sequential) else None for fusion in last.fusion]
    path = (last.fusion[0] if fusions[0] is None else fusions[0][-1]).drop_path
    stem = isinstance(embeds[0].proj, nn.Sequential)
    scales = []
    for embed in embeds:
        scale = embed.img_size[0] / model.img_size[0]
        # timm cuts the product off, so a quotient rounded down would lose a pixel.
        exact = int(model.img_size[0] * scale) == embed.img_size[0]
        scales.append(scale if exact else (embed.img_size[0] + 0.5) / model.img_size[0])
    own = [branch[0] for branch in first.blocks]
    return {
        "img_size": tuple(model.img_size),
        "img_scale": tuple(scales),
        "patch_size": tuple(embed.patch_size[0] for embed in embeds),
        "in_chans": (embeds[0].proj[0] if stem else embeds[0].proj).in_channels,
        "num_classes": model.num_classes,
        "embed_dim": tuple(model.embed_dim),
        "depth": tuple((len(e.blocks[0]), len(e.blocks[1]), _modules_of(e.fusion[0])) for e in model.blocks),
        "num_heads": tuple(block.attn.num_heads for block in own),
        # Half a unit more, so that int(width * ratio) cannot round below the true width.
        "mlp_ratio": tuple((b.mlp.fc1.out_features + 0.5) / w for b, w in zip(own, model.embed_dim)),
        "multi_conv": stem,
        "crop_scale": model.crop_scale,
        "qkv_bias": own[0].attn.qkv.bias is not None,
        "drop_rate": float(model.head_drop.p),
        "pos_drop_rate": float(model.pos_drop.p),
        "proj_drop_rate": float(own[0].attn.proj_drop.p),
        "attn_drop_rate": float(own[0].attn.attn_drop.p),
        "drop_path_rate": float(path.drop_prob) if isinstance(path, DropPath) else 0.0,
        "norm_eps": float(model.norm[0].eps),
        "global_pool": model.global_pool,
    }
