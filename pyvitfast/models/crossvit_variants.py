"""CrossViT's published variants and a micro one, registered with timm; loads timm's and IBM's weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg, register_model
from torch import Tensor, nn

from pyvitfast.models.crossvit import CrossViT
from pyvitfast.models.crossvit_config import CrossViTConfig

# Widths of both branches, heads, blocks of the large branch, MLP ratio.
_WIDTHS = {
    "tiny": ((96, 192), 3, 4, 4.0),
    "small": ((192, 384), 6, 4, 4.0),
    "base": ((384, 768), 12, 4, 4.0),
    "9": ((128, 256), 4, 3, 3.0),
    "15": ((192, 384), 6, 5, 3.0),
    "18": ((224, 448), 7, 6, 3.0),
}
# Side of the image, and of what the large branch sees. The paper calls a size by the latter; at 480 the
# former is not written there, and 504 is what its parameters and MACs fit.
_SIDES = {240: 224, 408: 384, 480: 480}
_PUBLISHED = (
    *((size, False, 240) for size in _WIDTHS),
    *((size, True, 240) for size in ("9", "15", "18")),
    *((size, True, 408) for size in ("15", "18")),
    ("18", True, 480),
)
_MICRO = "linear_crossvit_micro_8"


def _arguments() -> dict[str, dict[str, Any]]:
    """Configuration by model name."""
    found: dict[str, dict[str, Any]] = {
        _MICRO: {
            "img_size": 8,
            "img_scale": (1.0, 1.0),
            "patch_size": (2, 4),
            "in_chans": 1,
            "num_classes": 10,
            "embed_dim": (32, 64),
            "depth": ((1, 2, 0),) * 2,
            "num_heads": (2, 4),
            "mlp_ratio": (2.0, 2.0, 1.0),
        }
    }
    for size, stem, side in _PUBLISHED:
        widths, heads, blocks, ratio = _WIDTHS[size]
        pixels = 504 if side == 480 else side
        found[f"linear_crossvit_{size}{'_dagger' if stem else ''}_{side}"] = {
            "img_size": pixels,
            "img_scale": (1.0, _SIDES[side] / pixels),
            "embed_dim": widths,
            "depth": ((1, blocks, 0),) * 3,
            "num_heads": (heads, heads),
            "mlp_ratio": (ratio, ratio, 1.0),
            "multi_conv": stem,
        }
    return found


def _pretrained_cfg(name: str, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """timm's settings of the model whose weights fit, under our name; else settings without weights."""
    theirs = get_pretrained_cfg(name.removeprefix("linear_"), allow_unregistered=True)
    if theirs is not None:
        settings = theirs.to_dict(remove_source=False, remove_null=True)
        settings = {k: v for k, v in settings.items() if k not in ("architecture", "tag")}
        return f"{name}.{theirs.tag}", settings
    stem = ".0" if arguments.get("multi_conv") else ""
    settings = {
        "num_classes": arguments.get("num_classes", 1000),
        "input_size": (arguments.get("in_chans", 3), *[arguments["img_size"]] * 2),
        "crop_pct": 1.0,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "fixed_input_size": True,
        "first_conv": (f"patch_embed.0.proj{stem}", f"patch_embed.1.proj{stem}"),
        "classifier": ("head.0", "head.1"),
    }
    if name == _MICRO:
        settings |= {"mean": (0.5,), "std": (0.5,), "interpolation": "bilinear"}
    return f"{name}.untrained", settings


def crossvit_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A CrossViT state dict of timm or IBM, made to fit the image size of ``model``.

    IBM's names ``pos_embed.0`` become timm's ``pos_embed_0``. Position embeddings of another grid are resized
    bicubically, each branch for itself, and the row of the class token is kept. Everything else stays.

    Args:
        state_dict: weights, or a checkpoint that holds them as ``model`` or ``state_dict``.
        model: a CrossViT, ours or timm's.

    Returns:
        What ``model.load_state_dict`` takes. The tensors given are not changed.

    Source:
        CrossViT (Chen et al., ICCV 2021), section 4.1, on finetuning at a higher resolution.
    """
    for key in ("model", "state_dict"):
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
    found: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        name = re.sub(r"^(pos_embed|cls_token)\.(\d+)$", r"\1_\2", name)
        if match := re.match(r"pos_embed_(\d+)$", name):
            embed: Any = model.get_submodule(f"patch_embed.{match[1]}")
            size, patch = embed.img_size, embed.patch_size
            grid = [size[0] // patch[0], size[1] // patch[1]]
            if value.shape[1] != 1 + grid[0] * grid[1]:
                value = resample_abs_pos_embed(value, grid, num_prefix_tokens=1)
        found[name] = value
    return found


def _make(device: torch.device | None = None, dtype: torch.dtype | None = None, **arguments: Any) -> CrossViT:
    return CrossViT(CrossViTConfig(**arguments), device, dtype)


def _entrypoint(name: str, arguments: dict[str, Any]) -> Callable[..., CrossViT]:
    def create(pretrained: bool = False, **kwargs: Any) -> CrossViT:
        encoders = len(kwargs.get("depth", arguments["depth"]))
        model: CrossViT = build_model_with_cfg(
            _make,
            name,
            pretrained,
            pretrained_filter_fn=crossvit_filter_fn,
            feature_cfg={
                # The last output of each branch, as the classifiers see it.
                "out_indices": kwargs.pop("out_indices", (encoders - 1, 2 * encoders - 1)),
                "feature_cls": "getter",
            },
            **{**arguments, **kwargs},
        )
        return model

    create.__name__ = create.__qualname__ = name
    twin = name.removeprefix("linear_")
    create.__doc__ = (
        f"timm's {twin} on the op linear_cross_attention."
        if name != _MICRO
        else ("CrossViT for 8x8 grey images: patches 2 and 4, widths 32 and 64, 2 encoders.")
    )
    return create


default_cfgs = generate_default_cfgs(
    dict(_pretrained_cfg(name, arguments) for name, arguments in _arguments().items())
)

for _name, _given in _arguments().items():
    register_model(_entrypoint(_name, _given))
