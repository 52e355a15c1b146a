"""The published STViT variants, registered with timm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from timm import create_model
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pyvitfast.models.stvit import TokensConfig, add_semantic_tokens
from pyvitfast.models.stvit_config import STViTConfig
from pyvitfast.models.stvit_swin import STViTSwin, WindowTokensConfig

create = create_model

_DEIT = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
_SIDES = (4, 6, 8, 10)
# Width, layers of the third stage, ordinary ones of these before the module.
_SWIN = {"tiny": (96, 6, 2), "small": (96, 18, 10), "base": (128, 18, 10)}
_WINDOW_SIDES = (2, 3, 4)
_TOKENS = {f.name for f in fields(TokensConfig)}
_WINDOW_TOKENS = {f.name for f in fields(WindowTokensConfig)}


def _split(given: dict[str, Any], names: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of the tokens, and the others."""
    ours = {k: v for k, v in given.items() if k in names}
    if isinstance(side := ours.get("tokens"), int):
        ours["tokens"] = (side, side)
    return ours, {k: v for k, v in given.items() if k not in names}


def _make_vit(**given: Any) -> nn.Module:
    ours, theirs = _split(given, _TOKENS)
    config = TokensConfig(**ours)
    if config.prefix != "drop":
        theirs = {"class_token": True, "global_pool": "token" if config.prefix == "carry" else "avg"} | theirs
    else:
        theirs = {"class_token": False, "global_pool": "avg"} | theirs
    model = add_semantic_tokens(VisionTransformer(fc_norm=False, **theirs), config)
    STViTConfig.from_model(model)  # refuses what does not fit
    return model


def _make_swin(stem: str = "conv", **given: Any) -> STViTSwin:
    ours, theirs = _split(given, _WINDOW_TOKENS)
    return STViTSwin(WindowTokensConfig(**ours), stem, **theirs)


def _arguments() -> dict[str, tuple[Callable[..., nn.Module], dict[str, Any], str]]:
    """Factory, arguments and description of each variant by name."""
    found: dict[str, tuple[Callable[..., nn.Module], dict[str, Any], str]] = {}
    for size, (width, heads) in _DEIT.items():
        for side in _SIDES:
            arguments = {"embed_dim": width, "num_heads": heads, "tokens": (side, side), "base": 4}
            text = f"DeiT-{size} whose blocks 7 to 12 see {side * side} semantic tokens."
            found[f"stvit_deit_{size}_{side * side}"] = (_make_vit, arguments, text)
    for size, (width, depth, base) in _SWIN.items():
        shape = {
            "embed_dim": width,
            "depths": (2, 2, depth, 2),
            "num_heads": tuple(width // 32 * 2**i for i in range(4)),
        }
        for side in _WINDOW_SIDES:
            tokens = {"tokens": (side, side), "recover": False, "base": base, "global_centers": True}
            suffix = "" if side == 3 else f"_{side * side}"
            text = f"Swin-{size} with {side * side} tokens a window from block {base + 1} of stage 3 on."
            found[f"stvit_swin_{size}{suffix}"] = (_make_swin, shape | tokens, text)
        text = f"Swin-{size} whose third stage makes semantic tokens and recovers the image tokens."
        found[f"stvit_r_swin_{size}"] = (_make_swin, shape | {"recover": True}, text)
    return found


def _cfg(name: str) -> dict[str, Any]:
    swin = "swin" in name
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj.0" if swin else "patch_embed.proj",
        "classifier": "head.fc" if swin else "head",
    }


def _entrypoint(name: str, factory: Callable[..., nn.Module], arguments: dict[str, Any], text: str) -> Any:
    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        last = 4 if factory is _make_swin else 3
        model: nn.Module = build_model_with_cfg(
            factory,
            name,
            pretrained,
            feature_cfg={
                "out_indices": kwargs.pop("out_indices", tuple(range(last))),
                "feature_cls": "getter",
            },
            **{**arguments, **kwargs},
        )
        return model

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = text
    return entry


default_cfgs = generate_default_cfgs({f"{name}.untrained": _cfg(name) for name in _arguments()})

for _name, _given in _arguments().items():
    register_model(_entrypoint(_name, *_given))
