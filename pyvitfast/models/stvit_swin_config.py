"""The architecture of a Swin Transformer with semantic tokens as plain data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from torch import nn

from pyvitfast.models.modules import unwrap
from pyvitfast.models.stvit_config import NORM
from pyvitfast.models.stvit_swin import STAGE, UNIT, STViTSwin, WindowTokensConfig, check_depths, is_global
from pyvitfast.models.swin_transformer import SwinDims
from pyvitfast.models.vision_transformer import BlockDims


@dataclass(frozen=True)
class STViTSwinConfig:
    """Everything needed to build an STViT-Swin or STViT-R-Swin; field names are timm's, defaults Swin-T's.

    Args:
        semantic: the semantic tokens.
        stem: ``conv``, two convolutions as in the released code, or ``patch``, timm's patch embedding.
        img_size: image height and width in pixels; other sizes go too.
        window_size: window side in tokens.

    The other fields are passed to timm as they are.

    Raises:
        ValueError: stages or blocks that do not fit the settings.
    """

    semantic: WindowTokensConfig = field(default_factory=WindowTokensConfig)
    stem: str = "conv"
    img_size: tuple[int, int] = (224, 224)
    in_chans: int = 3
    num_classes: int = 1000
    global_pool: str = "avg"
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    drop_rate: float = 0.0
    proj_drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.1

    def __post_init__(self) -> None:
        check_depths(self.semantic, self.stem, self.depths)
        if self.attn_drop_rate:
            raise ValueError(
                "STViTSwin: `attn_drop_rate` must be 0: attention over gathered windows has no dropout, got "
                f"{self.attn_drop_rate}."
            )

    @property
    def dims(self) -> SwinDims:
        """Widths of stages and blocks."""
        widths = self._widths()
        stages = tuple(
            (BlockDims(heads, width // heads, width // heads, int(width * self.mlp_ratio)),) * depth
            for width, heads, depth in zip(widths, self.num_heads, self.depths, strict=True)
        )
        return SwinDims(widths, stages)

    @classmethod
    def from_model(cls, model: nn.Module) -> STViTSwinConfig:
        """Read the architecture from a model.

        Raises:
            TypeError: no Swin Transformer with semantic tokens.
            NotImplementedError: parameters were added to it or taken away.
        """
        model = unwrap(model)
        if not isinstance(model, STViTSwin):
            raise TypeError(
                f"STViTSwinConfig.from_model: `model` must be an STViTSwin, got {type(model).__name__}."
            )
        config = replace(
            cls(**model.arguments, semantic=model.semantic, stem=model.stem),
            num_classes=model.num_classes,
            global_pool=model.global_pool,
            img_size=tuple(model.patch_embed.img_size),
        )
        held = sum(p.numel() for p in model.parameters())
        if held != config.params():
            raise NotImplementedError(
                f"STViTSwinConfig.from_model: {type(model).__name__}: parameters: must be {config.params()} "
                f"for these widths, got {held} (added modules?)."
            )
        return config

    def build(self) -> nn.Module:
        """A new model of this architecture, freshly initialised."""
        passed = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("semantic", "stem")}
        return STViTSwin(self.semantic, self.stem, **passed)

    def _widths(self) -> tuple[int, ...]:
        return tuple(self.embed_dim * 2**i for i in range(len(self.depths)))

    def grids(self, img_size: tuple[int, int] | None = None) -> list[tuple[int, int]]:
        """Height and width in image tokens of each stage."""
        found = [tuple(-(-n // 4) for n in img_size or self.img_size)]
        while len(found) < len(self.depths):
            found.append(tuple((n + 1) // 2 for n in found[-1]))
        return [(grid[0], grid[1]) for grid in found]

    def params(self) -> int:
        """Exact number of parameters."""
        widths, grids = self._widths(), self.grids()
        first = widths[0]
        if self.stem == "conv":
            half = first // 2
            total = half * (9 * self.in_chans + 2) + first * (9 * half + 2)
        else:
            total = first * (16 * self.in_chans + 1) + 2 * first
        for i, (width, heads, depth) in enumerate(zip(widths, self.num_heads, self.depths, strict=True)):
            tail = i > STAGE and not self.semantic.recover
            if i:
                total += widths[i - 1] * width + width if tail else 4 * widths[i - 1] * (width + 2)
            for j in range(depth):
                hidden = int(width * self.mlp_ratio)
                total += 4 * width + 3 * width * (width + int(self.qkv_bias)) + width * (width + 1)
                total += (width + 1) * hidden + (hidden + 1) * width
                if tail or (i == STAGE and not self._plain(j)):
                    total += 0 if self.semantic.layer_scale is None else 2 * width
                else:
                    sides = [min(n, self.window_size) for n in grids[i]]
                    total += heads * (2 * sides[0] - 1) * (2 * sides[1] - 1)
        if self.semantic.global_centers:
            down, across = self._windows(grids[STAGE])
            total += down * across * self.semantic.count * widths[STAGE]
        return total + 2 * widths[-1] + self.num_classes * (widths[-1] + 1)

    def _plain(self, index: int) -> bool:
        return index % UNIT == 0 if self.semantic.recover else index < self.semantic.base

    def _windows(self, grid: tuple[int, int]) -> tuple[int, int]:
        down, across = (-(-n // min(n, self.window_size)) for n in grid)
        return down, across

    def macs(self, img_size: tuple[int, int] | None = None, unfolded: bool = False) -> int:
        """Multiply-accumulates of one image, norms counted at 5 a value, as the paper counts.

        Rows of padding are counted. Key windows of 10 are counted with keys and values projected in each
        window, as the paper's figures have them, though the op projects once; all other windows as the op
        does it.

        Args:
            img_size: height and width in pixels, by default the model's.
            unfolded: all windows cut out and projected one by one, as in the released detection code.

        Source:
            Fitted to STViT (Chang et al., CVPR 2023), Tables 2, 4 and 5, to 0.5 %.
        """
        semantic, widths, grids = self.semantic, self._widths(), self.grids(img_size)
        first, (down, across) = widths[0], img_size or self.img_size
        cells = grids[0][0] * grids[0][1]
        if self.stem == "conv":
            half, quarter = first // 2, -(-down // 2) * -(-across // 2)
            total = quarter * half * (9 * self.in_chans + 1) + cells * first * (9 * half + 1)
        else:
            total = cells * first * (16 * self.in_chans + NORM)
        few = 0
        for i, (width, depth, grid) in enumerate(zip(widths, self.depths, grids, strict=True)):
            cells, windows = grid[0] * grid[1], self._windows(grid)
            area = math.prod(min(n, self.window_size) for n in grid)
            padded = windows[0] * windows[1] * area
            tail = i > STAGE and not semantic.recover
            if i:
                total += few * widths[i - 1] * width if tail else cells * 4 * widths[i - 1] * (width + NORM)
            plain = 4 * padded * width**2 + 2 * area * padded * width + self._mlp(cells, width)
            plain += 2 * NORM * cells * width
            if i == STAGE:
                few = windows[0] * windows[1] * semantic.count
                total += self._stage(width, depth, cells, padded, windows, plain, unfolded)
            elif tail:
                total += sum(self._tokens(few, width, windows, local=j % 2 == 0) for j in range(depth))
            else:
                total += depth * plain
        pooled = few or grids[-1][0] * grids[-1][1]
        pooled = pooled if not semantic.recover else grids[-1][0] * grids[-1][1]
        heads = 1 if self.global_pool else pooled
        return total + NORM * pooled * widths[-1] + heads * self.num_classes * widths[-1]

    def _mlp(self, rows: int, width: int) -> int:
        return 2 * rows * width * int(width * self.mlp_ratio)

    def _attend(
        self, width: int, queries: int, rows: int, reach: int, finished: int | None = None, own: int = 0
    ) -> int:
        """A block whose ``queries`` see ``reach`` keys each, out of ``rows`` projected ones."""
        finished = queries if finished is None else finished
        products = 2 * queries * width**2 + 2 * rows * width**2 + 2 * queries * reach * width
        return products + self._mlp(finished, width) + NORM * width * (2 * finished + rows - own)

    def _tokens(self, few: int, width: int, windows: tuple[int, int], local: bool) -> int:
        """A block of semantic tokens among themselves."""
        reach = few
        if local:
            reach = self.semantic.count
        elif not self.semantic.recover and not is_global(self.semantic, windows):
            reach = min(few, 16 * self.semantic.count)
        return self._attend(width, few, few, reach, own=few)

    def _stage(
        self,
        width: int,
        depth: int,
        cells: int,
        padded: int,
        windows: tuple[int, int],
        plain: int,
        unfolded: bool,
    ) -> int:
        """The third stage, of ``cells`` image tokens, ``padded`` in whole windows."""
        semantic, many = self.semantic, windows[0] * windows[1]
        few, area = many * semantic.count, padded // many
        if is_global(semantic, windows):
            keys = 100 + semantic.count
            generate = self._attend(width, few, many * keys, keys)
            generate += self._attend(width, few, few + cells, few + cells)
            recover = self._attend(width, cells, few, few)
        else:
            generate = 0
            for side in (4, 9):
                rows = many * side * area if unfolded else padded
                generate += self._attend(width, few, rows, side * area)
            reach = 81 * semantic.count
            rows = many * reach if unfolded else few
            recover = self._attend(width, padded, rows, reach, finished=cells)
        mixed = [self._tokens(few, width, windows, local) for local in (True, False)]
        if semantic.recover:
            return depth // UNIT * (plain + generate + sum(mixed) + recover)
        rest = depth - semantic.base - 2
        return semantic.base * plain + generate + sum(mixed[j % 2] for j in range(rest))

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold."""
        return {**asdict(self), "semantic": self.semantic.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> STViTSwinConfig:
        """The inverse of :meth:`to_dict`, also after a trip through JSON."""
        data = dict(data)
        data["semantic"] = WindowTokensConfig.from_dict(data["semantic"])
        for name in ("img_size", "depths", "num_heads"):
            data[name] = tuple(data[name])
        return cls(**data)
