"""ReViT: the widths that NViT's pruning shows as a rule, registered with timm."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from pyvitfast.models.vision_transformer import (
    BlockDims,
    PrunedVisionTransformer,
    PrunedVisionTransformerDistilled,
    ViTDims,
)

READINGS = ("code", "paper")
# The scale of DeiT's heads, from which the widths were pruned; it does not follow the query width.
SCALE = 64**-0.5
_V_DIM = 64
_SIZES = {"tiny": 192, "small": 384, "base": 768}
_SUFFIXES = {"": "code", "_table6": "paper"}


def _nearest(value: float, step: int) -> int:
    """The multiple of ``step`` nearest to ``value``; of two, the larger."""
    return step * math.floor(value / step + 0.5)


def revit_dims(embed_dim: int, reading: str = "code", depth: int = 12) -> ViTDims:
    r"""Widths of ReViT for a residual width E: narrow blocks at both ends, wide ones in the middle.

    Paper and released code part, so the reading has a name. With :math:`\epsilon = 2` in the middle half of
    the blocks and 1 in the quarters before and after it, both have V = 64 and an MLP of :math:`3 \epsilon E`.

    ``"paper"``, its Table 6: :math:`\epsilon E / 100` heads, to the nearest even number, and QK
    :math:`\epsilon E / 20`, to the nearest multiple of 8. At E = 384 that is DeiT-S's number of weights
    exactly.

    ``"code"``: with h = round(E / 200) and k = round(E / 160), :math:`2 \epsilon h` heads and
    :math:`8 \epsilon k` query channels; but the first and last block have 10 heads and the wide 16 k. Only
    this one gives the parameter and FLOP ratios that the paper prints.

    Args:
        embed_dim: width E of the residual stream.
        reading: ``"code"`` or ``"paper"``.
        depth: number of blocks, a multiple of 4; the rule was published for 12.

    Raises:
        ValueError: unknown reading, a depth that is no multiple of 4, or an E so small that a block would
            have no head.

    Source:
        NViT (Yang et al., CVPR 2023), section 5.1 and Table 6, and its released code.
    """
    if reading not in READINGS:
        raise ValueError(f"revit_dims: `reading` must be one of {', '.join(READINGS)}, got {reading!r}.")
    if depth < 4 or depth % 4:
        raise ValueError(f"revit_dims: `depth` must be a multiple of 4, got {depth}.")
    h, k = round(embed_dim / 200), round(embed_dim / 160)
    blocks = []
    for i in range(depth):
        wide = 2 if depth // 4 <= i < depth - depth // 4 else 1
        if reading == "paper":
            heads, qk = _nearest(wide * embed_dim / 100, 2), _nearest(wide * embed_dim / 20, 8)
        elif i in (0, depth - 1):
            heads, qk = 10, 16 * k
        else:
            heads, qk = 2 * wide * h, 8 * wide * k
        if heads < 1 or qk < 1:
            raise ValueError(
                f"revit_dims: `embed_dim` must be above 100, so that each block has a head, got {embed_dim}."
            )
        blocks.append(BlockDims(heads, qk, _V_DIM, 3 * wide * embed_dim))
    return ViTDims(embed_dim, tuple(blocks))


def _names() -> dict[str, tuple[int, str, bool]]:
    """Width, reading and whether there is a distillation token, by model name."""
    return {
        f"nvit_revit_{size}{suffix}{token}": (width, reading, bool(token))
        for size, width in _SIZES.items()
        for suffix, reading in _SUFFIXES.items()
        for token in ("", "_distilled")
    }


default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "fixed_input_size": True,
            "first_conv": "patch_embed.proj",
            "classifier": ("head", "head_dist") if distilled else "head",
        }
        for name, (_, _, distilled) in _names().items()
    }
)


def _entrypoint(name: str, width: int, reading: str, distilled: bool) -> Callable[..., VisionTransformer]:
    kind = PrunedVisionTransformerDistilled if distilled else PrunedVisionTransformer

    def create(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
        dims = revit_dims(width, reading)
        return build_model_with_cfg(
            partial(kind, dims, (SCALE,) * len(dims.blocks)),
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
            **{"patch_size": 16, **kwargs},
        )

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"ReViT of width {width}, reading {reading!r}; untrained. See :func:`revit_dims`."
    return create


for _name, _choice in _names().items():
    register_model(_entrypoint(_name, *_choice))
