"""Which family a model belongs to."""

from __future__ import annotations

from typing import TypeAlias

from timm.models.crossvit import CrossVit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pyvitfast.models.config import ViTConfig
from pyvitfast.models.crossvit import CrossViT
from pyvitfast.models.crossvit_config import CrossViTConfig
from pyvitfast.models.modules import plain_class, unwrap
from pyvitfast.models.stvit import SemanticTokensMixin
from pyvitfast.models.stvit_config import STViTConfig
from pyvitfast.models.stvit_swin import STViTSwin
from pyvitfast.models.stvit_swin_config import STViTSwinConfig
from pyvitfast.models.swin_config import SwinConfig
from pyvitfast.models.swin_transformer import PrunedSwinTransformer, SwinDims
from pyvitfast.models.vision_transformer import ViTDims

PrunableConfig: TypeAlias = ViTConfig | SwinConfig
Config: TypeAlias = PrunableConfig | CrossViTConfig | STViTConfig | STViTSwinConfig
Dims: TypeAlias = ViTDims | SwinDims


def config_of(model: nn.Module) -> Config:
    """The architecture of a model.

    Raises:
        TypeError: neither a timm Vision Transformer, nor a Swin Transformer, nor a CrossViT.
        NotImplementedError: it has a part that we cannot describe; the message names it.
    """
    model = unwrap(model)
    if plain_class(model) in (SwinTransformer, PrunedSwinTransformer):
        return SwinConfig.from_model(model)
    if plain_class(model) in (CrossVit, CrossViT):
        return CrossViTConfig.from_model(model)
    if isinstance(model, STViTSwin):
        return STViTSwinConfig.from_model(model)
    if isinstance(model, SemanticTokensMixin):
        return STViTConfig.from_model(model)
    if not isinstance(model, VisionTransformer):
        raise TypeError(
            "architecture: `model` must be a timm VisionTransformer, VisionTransformerDistilled, "
            "CrossVit or SwinTransformer; no supported attention was found in "
            f"{type(model).__module__}.{type(model).__name__}."
        )
    return ViTConfig.from_model(model)


def prunable_config_of(model: nn.Module) -> PrunableConfig:
    """The architecture of a model that pruning knows.

    Raises:
        TypeError: as :func:`config_of`.
        NotImplementedError: as :func:`config_of`, or a family that is not pruned yet.
    """
    config = config_of(model)
    if isinstance(config, CrossViTConfig):
        raise NotImplementedError(
            "prune: CrossViT is not pruned yet: its two residual streams meet in the projections between the "
            "branches, and no structure ties their channels. Supported are timm's VisionTransformer, "
            "VisionTransformerDistilled and SwinTransformer; 2:4 sparsity takes a CrossViT."
        )
    if isinstance(config, STViTConfig | STViTSwinConfig):
        raise NotImplementedError(
            "prune: a model with semantic tokens is not pruned: its scores would be summed over two kinds of "
            "tokens, and centres and pooling tied to the stream. Prune first, then convert: tokens.to_stvit "
            "takes what compact() returns."
        )
    return config
