"""The micro Vision Transformers of the built-in digits data set, registered with timm."""

from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled, _create_deit
from timm.models.vision_transformer import VisionTransformer, _create_vision_transformer

_CFG = {
    "num_classes": 10,
    "input_size": (1, 8, 8),
    "mean": (0.5,),
    "std": (0.5,),
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}
default_cfgs = generate_default_cfgs(
    {
        "vit_micro_patch2_8.untrained": _CFG,
        "vit_micro_wide_patch2_8.untrained": _CFG,
        "deit_micro_distilled_patch2_8.untrained": {**_CFG, "classifier": ("head", "head_dist")},
    }
)


_SHAPE = {
    "img_size": 8,
    "patch_size": 2,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 48,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 4.0,
}


@register_model  # type: ignore[untyped-decorator]
def vit_micro_patch2_8(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT for 8x8 grey images: patch 2, width 48, depth 4, 4 heads; 0.12 M parameters, 2 M MACs."""
    return _micro("vit_micro_patch2_8", 48, 4, pretrained, kwargs)


@register_model  # type: ignore[untyped-decorator]
def vit_micro_wide_patch2_8(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Twice as wide: width 96, depth 4, 8 heads; 0.45 M parameters. What the micro ViT grows into."""
    return _micro("vit_micro_wide_patch2_8", 96, 8, pretrained, kwargs)


@register_model  # type: ignore[untyped-decorator]
def deit_micro_distilled_patch2_8(pretrained: bool = False, **kwargs: Any) -> VisionTransformerDistilled:
    """The micro ViT with a distillation token and a head for it; 0.12 M parameters."""
    model = _create_deit(
        "deit_micro_distilled_patch2_8", pretrained=pretrained, distilled=True, **{**_SHAPE, **kwargs}
    )
    return model


def _micro(name: str, width: int, heads: int, pretrained: bool, given: dict[str, Any]) -> VisionTransformer:
    arguments = {**_SHAPE, "embed_dim": width, "num_heads": heads}
    return _create_vision_transformer(name, pretrained=pretrained, **{**arguments, **given})
