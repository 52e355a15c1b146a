"""The architecture of a Vision Transformer with semantic tokens as plain data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from pyvitfast.models.config import ViTConfig
from pyvitfast.models.modules import unwrap
from pyvitfast.models.stvit import SemanticTokensMixin, TokensConfig, add_semantic_tokens
from pyvitfast.models.vision_transformer import BlockDims, ViTDims
from pyvitfast.ops.adaptive_window_pool import widest_bin

NORM = 5  # multiply-accumulates of a value in a LayerNorm, as the paper's counter has it


@dataclass(frozen=True)
class STViTConfig:
    """Everything needed to build a Vision Transformer with semantic tokens.

    Args:
        vit: the Vision Transformer, with the prefix tokens and the head that remain.
        semantic: the semantic tokens.

    Raises:
        ValueError: the module does not fit the blocks, or the model's tokens have no grid.
    """

    vit: ViTConfig
    semantic: TokensConfig

    def __post_init__(self) -> None:
        vit, semantic = self.vit, self.semantic
        depth, needed = len(vit.dims.blocks), semantic.base + semantic.layers
        if needed > depth:
            raise ValueError(
                f"STViT: `base` {semantic.base} and `layers` {semantic.layers} need {needed} blocks, got a "
                f"model of {depth}."
            )
        if vit.patch_drop_rate:
            raise ValueError(
                "STViT: `patch_drop_rate` must be 0: pooling needs every patch of the grid, got "
                f"{vit.patch_drop_rate}."
            )
        if any(n < m for n, m in zip(self.grid(), semantic.tokens, strict=True)):
            raise ValueError(
                f"STViT: `tokens` {semantic.tokens} must not exceed the grid of patches, {self.grid()}."
            )
        if vit.distilled and semantic.prefix != "carry":
            raise ValueError(
                'STViT: a distilled model has a head for each of two tokens, so `prefix` must be "carry", '
                f"got {semantic.prefix!r}."
            )
        if semantic.prefix == "keys" and vit.global_pool != "avg":
            raise ValueError(
                'STViT: prefix="keys" drops the class token, so `global_pool` must be "avg", got '
                f"{vit.global_pool!r}."
            )

    @property
    def dims(self) -> ViTDims:
        """Widths of the blocks."""
        return self.vit.dims

    @property
    def in_chans(self) -> int:
        """Channels of an image."""
        return self.vit.in_chans

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return self.vit.img_size

    @classmethod
    def from_model(cls, model: nn.Module) -> STViTConfig:
        """Read the architecture from a model.

        Raises:
            TypeError: no Vision Transformer with semantic tokens.
            NotImplementedError: it has a part that we cannot describe; the message names it.
        """
        model = unwrap(model)
        if not isinstance(model, SemanticTokensMixin):
            raise TypeError(f"STViTConfig.from_model: `model` must be an STViT, got {type(model).__name__}.")
        vit: Any = model
        semantic = model.stgm.config
        added = sum(p.numel() for p in model.stgm.parameters())
        if semantic.layer_scale is not None:
            added += _layer_scales(semantic, len(vit.blocks), vit.embed_dim)
        return cls(ViTConfig.from_model(model, added=added), semantic)

    def build(self) -> nn.Module:
        """A new model of this architecture, freshly initialised."""
        return add_semantic_tokens(self.vit.build(), self.semantic)

    def prune(self, dims: ViTDims) -> STViTConfig:
        """The same architecture with other widths; the softmax scales stay."""
        return replace(self, vit=self.vit.prune(dims))

    def grid(self, img_size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Height and width of the grid of patches."""
        sides = zip(img_size or self.vit.img_size, self.vit.patch_size, strict=True)
        down, across = (-(-p // q) if self.vit.dynamic_img_pad else p // q for p, q in sides)
        return down, across

    def params(self) -> int:
        """Exact number of parameters."""
        semantic, width = self.semantic, self.vit.dims.embed_dim
        total = self.vit.params()
        if semantic.global_centers:
            total += semantic.count * width
        if semantic.pool == "learned":
            grid = self.grid()
            cells = 1
            for n, m in zip(grid, semantic.tokens, strict=True):
                cells *= widest_bin(n, m)
            # Depthwise convolution and norm of either network, and their scores.
            total += 2 * (9 + 1 + 2) * width + (1 + cells) * (width + 1)
        if semantic.layer_scale is not None:
            total += _layer_scales(semantic, len(self.vit.dims.blocks), width)
        return total

    def macs(self, img_size: tuple[int, int] | None = None) -> int:
        """Multiply-accumulates of one image: matrix products, the patch convolution, and 5 a value in a norm.

        The paper counts so, which sets this apart from our other models, where norms are left out (0.2 to
        0.4 % of the whole). Cross-attention is counted with keys and values; the op may need fewer. Pooling
        is not counted.

        Source:
            Fitted to STViT (Chang et al., CVPR 2023), Tables 1, 6 and 10, to all digits printed.
        """
        semantic, vit = self.semantic, self.vit
        width, blocks = vit.dims.embed_dim, vit.dims.blocks
        patches, rows = vit.tokens(img_size)
        few = semantic.count + (rows - patches if semantic.prefix == "carry" else 0)
        total = patches * vit.in_chans * vit.patch_size[0] * vit.patch_size[1] * width
        for i, d in enumerate(blocks):
            layer = i - semantic.base
            if layer < 0:
                total += block_macs(d, width, rows)
            elif layer >= semantic.layers or (layer and not semantic.concat_keys):
                total += block_macs(d, width, few)
            elif layer and semantic.prefix == "carry":
                total += block_macs(d, width, few, few + patches)
            else:
                total += block_macs(d, width, few, rows + (few if layer else 0))
        total += NORM * width * few
        pooled = 1 if vit.global_pool else few
        return total + (1 + int(vit.distilled)) * pooled * vit.num_classes * width

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold."""
        return {"vit": self.vit.to_dict(), "semantic": self.semantic.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> STViTConfig:
        """The inverse of :meth:`to_dict`, also after a trip through JSON."""
        return cls(ViTConfig.from_dict(data["vit"]), TokensConfig.from_dict(data["semantic"]))


def _layer_scales(semantic: TokensConfig, depth: int, width: int) -> int:
    return 2 * width * (depth - semantic.base)


def block_macs(d: BlockDims, width: int, queries: int, keys: int | None = None) -> int:
    """Multiply-accumulates of a block whose ``queries`` rows attend to ``keys`` rows, or to themselves."""
    both = d.heads * (d.qk_dim + d.v_dim)
    normed = 2 * queries + (keys or 0)
    keys = queries if keys is None else keys
    products = (queries + keys) * width * both + queries * keys * both + 2 * queries * width * d.mlp
    return products + NORM * width * normed


def vit_macs(vit: ViTConfig) -> int:
    """Multiply-accumulates of a Vision Transformer without semantic tokens, its norms counted too."""
    _, rows = vit.tokens()
    return vit.macs() + NORM * vit.dims.embed_dim * rows * (2 * len(vit.dims.blocks) + 1)


def with_semantic_tokens(vit: ViTConfig, semantic: TokensConfig) -> STViTConfig:
    """``vit`` with the prefix tokens and the head that its semantic tokens leave.

    Raises:
        ValueError: as :class:`STViTConfig`.
    """
    if semantic.prefix == "drop" and not vit.distilled:
        # Position embeddings of prefix tokens go with them; a norm stays where it was, before the mean.
        vit = replace(vit, class_token=False, reg_tokens=0, global_pool=_pool(vit))
    elif semantic.prefix == "keys":
        vit = replace(vit, global_pool=_pool(vit))
    return STViTConfig(vit, semantic)


def _pool(vit: ViTConfig) -> str:
    return "avg" if vit.global_pool in ("token", "avg") else vit.global_pool
