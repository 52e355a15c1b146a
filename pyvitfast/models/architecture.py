"""Which family a model belongs to."""

from __future__ import annotations

from typing import TypeAlias

from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pyvitfast.models.config import ViTConfig
from pyvitfast.models.modules import plain_class, unwrap
from pyvitfast.models.swin_config import SwinConfig
from pyvitfast.models.swin_transformer import PrunedSwinTransformer, SwinDims
from pyvitfast.models.vision_transformer import ViTDims

Config: TypeAlias = ViTConfig | SwinConfig
Dims: TypeAlias = ViTDims | SwinDims


def config_of(model: nn.Module) -> Config:
    """The architecture of a model.

    Raises:
        TypeError: neither a timm Vision Transformer nor a Swin Transformer.
        NotImplementedError: it has a part that we cannot describe; the message names it.
    """
    model = unwrap(model)
    if plain_class(model) in (SwinTransformer, PrunedSwinTransformer):
        return SwinConfig.from_model(model)
    if not isinstance(model, VisionTransformer):
        raise TypeError(
            "architecture: `model` must be a timm VisionTransformer, VisionTransformerDistilled or "
            "SwinTransformer; no supported attention was found in "
            f"{type(model).__module__}.{type(model).__name__}."
        )
    return ViTConfig.from_model(model)
