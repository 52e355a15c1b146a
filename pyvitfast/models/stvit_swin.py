"""Swin Transformers with semantic tokens: STViT-Swin keeps them, STViT-R-Swin recovers the image tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, trunc_normal_
from timm.models._manipulate import checkpoint
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, SwinTransformerStage
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from pyvitfast.models.modules import is_plain_linear, kernel
from pyvitfast.models.stvit import TokenSettings, cross_attention

STEMS = ("conv", "patch")
WINDOW_POOLS = ("max", "avg")
LAYOUTS = ("auto", "global", "windows")
COMPATS = ("none", "cls")
UNIT = 6  # blocks of a dumbbell unit
STAGE = 2  # the stage whose tokens become semantic ones


@dataclass(frozen=True)
class WindowTokensConfig(TokenSettings):
    """How each window of a Swin Transformer gets its semantic tokens, and what they attend to.

    Args:
        tokens: semantic tokens of a window, height and width.
        recover: STViT-R: the third stage is made of units that end with the image tokens recovered. False
            is STViT: tokens replace them to the end.
        base: ordinary blocks of the third stage before the module; without ``recover`` only.
        pool: ``max`` or ``avg`` over the window: the first centres.
        global_centers: learned centres G, one for each semantic token of the image size the model is built
            for, resized for others; added to the queries of the module's second block.
        layout: what is attended to. ``global``: a window of 10 and the window's own tokens, then the whole
            map, as in the classification code. ``windows``: windows of 14 and 21 image tokens, and 27
            semantic tokens to recover, as in the detection code, at a cost linear in the image. ``auto``
            takes the first for a third stage of at most 2 by 2 windows.
        compat: ``cls`` leaves out the residual of the module's first block, as the classification code does;
            ``none`` has it. There is no switch for the detection code's masks of padding, which are wrong for
            most sizes.
        layer_scale: first value of LayerScale in all blocks on semantic tokens; None has none.

    Raises:
        ValueError: a value out of its range.

    Source:
        STViT (Chang et al., CVPR 2023), sections 3.2 and 3.3; the released code of STViT-R.
    """

    tokens: tuple[int, int] = (3, 3)
    recover: bool = True
    base: int = 2
    pool: str = "max"
    global_centers: bool = False
    layout: str = "auto"
    compat: str = "none"
    layer_scale: float | None = 1e-5

    def __post_init__(self) -> None:
        self.check("the tokens of a window", pool=WINDOW_POOLS, layout=LAYOUTS, compat=COMPATS)
        if self.base < 0:
            raise ValueError(f"WindowTokensConfig: `base` must be at least 0, got {self.base}.")

    @property
    def count(self) -> int:
        """Semantic tokens of a window."""
        return self.tokens[0] * self.tokens[1]


class ConvEmbed(PatchEmbed):  # type: ignore[misc]
    """Patch embedding by two 3x3 convolutions of stride 2, each with batch norm and Hardswish; no LayerNorm.

    Source:
        The released code of STViT-R. The paper does not mention it, but all its counts for Swin contain it.
    """

    def __init__(self, *args: Any, in_chans: int = 3, embed_dim: int = 96, **kwargs: Any) -> None:
        super().__init__(*args, in_chans=in_chans, embed_dim=embed_dim, **{**kwargs, "norm_layer": None})
        half = embed_dim // 2
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, half, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(half),
            nn.Hardswish(),
            nn.Conv2d(half, embed_dim, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(embed_dim),
            nn.Hardswish(),
        )


@dataclass(frozen=True)
class Reach:
    """Which keys a window of queries reads: side of the key window, its stride and its offset, in keys."""

    window: tuple[int, int]
    stride: tuple[int, int]
    offset: tuple[int, int]


def centred(window: tuple[int, int], stride: tuple[int, int]) -> Reach:
    """Key windows around the query windows, whose side is ``stride`` in keys."""
    first = [-((w - s) // 2) for w, s in zip(window, stride, strict=True)]
    return Reach(window, stride, (first[0], first[1]))


class SemanticBlock(Block):  # type: ignore[misc]
    """A timm ``Block`` that can also read windows of a grid; it has no relative position bias."""

    def gather(
        self, queries: Tensor, grid: Tensor, reach: Reach, own: bool = False, shortcut: Tensor | None = None
    ) -> Tensor:
        """``queries`` [B, Wh, Ww, M, C] of each window over its part of ``grid`` [B, H, W, C].

        Args:
            queries: rows of each window.
            grid: keys; projected once, whatever the number of windows that read them.
            reach: which keys a window reads.
            own: the queries of a window are among its keys.
            shortcut: what the attention is added to; None for nothing.

        Returns:
            [B, Wh, Ww, M, C] after attention and MLP.
        """
        attn: Any = self.attn
        heads, width = attn.num_heads, attn.head_dim
        channels = queries.shape[-1]
        normed = self.norm1(queries)
        q = self._projected(normed, slice(None, channels))

        def keys_values(x: Tensor) -> tuple[Tensor, Tensor]:
            both = self._projected(x, slice(channels, None))
            k, v = torch.unflatten(both, -1, (2, heads, width)).unbind(-3)
            return k, v

        k, v = keys_values(self.norm1(grid))
        k_before, v_before = keys_values(normed) if own else (None, None)
        mixed = kernel("window_gather_attention", grid.device)(
            torch.unflatten(q, -1, (heads, width)),
            k,
            v,
            reach.window,
            reach.stride,
            reach.offset,
            k_before=k_before,
            v_before=v_before,
            scale=float(attn.scale),
        )
        return self.finish(shortcut, attn.proj_drop(attn.proj(mixed.flatten(-2))))

    def _projected(self, x: Tensor, rows: slice) -> Tensor:
        """``x`` times some rows of the fused projection; a layer that does more than multiply is called."""
        qkv: Any = self.attn.qkv
        if is_plain_linear(qkv):
            return F.linear(x, qkv.weight[rows], None if qkv.bias is None else qkv.bias[rows])
        whole: Tensor = qkv(x)
        return whole[..., rows]

    def everywhere(
        self, queries: Tensor, keys: Tensor, before: Tensor | None = None, shortcut: Tensor | None = None
    ) -> Tensor:
        """``queries`` [B, M, C] over all of ``before`` [B, K, C] and ``keys`` [B, N, C]; [B, M, C]."""
        return self.finish(shortcut, cross_attention(self, queries, keys, before))

    def finish(self, shortcut: Tensor | None, mixed: Tensor) -> Tensor:
        """Residuals and MLP; without a shortcut the attention has no DropPath either."""
        x = self.ls1(mixed) if shortcut is None else shortcut + self.drop_path1(self.ls1(mixed))
        out: Tensor = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return out


def pool_windows(x: Tensor, window: tuple[int, int], tokens: tuple[int, int], mode: str) -> Tensor:
    """Tokens of each window of ``x`` [B, H, W, C]; [B, Wh, Ww, M, C].

    Windows at the right and lower border are pooled over the cells they have, so padding is never seen; a
    window with fewer cells a side than tokens repeats cells.
    """
    pool = kernel("adaptive_window_pool", x.device)
    rows, columns = (_parts(n, w) for n, w in zip(x.shape[1:3], window, strict=True))
    bands = []
    for top, bottom, height in rows:
        band = []
        for left, right, breadth in columns:
            part = to_windows(x[:, top:bottom, left:right], (height, breadth))  # [B, Wh, Ww, h w, C]
            cells = torch.unflatten(part.flatten(0, 2), 1, (height, breadth))
            band.append(torch.unflatten(pool(cells, tokens, mode), 0, part.shape[:3]))
        bands.append(torch.cat(band, dim=2) if len(band) > 1 else band[0])
    return torch.cat(bands, dim=1) if len(bands) > 1 else bands[0]


def _parts(cells: int, window: int) -> list[tuple[int, int, int]]:
    """Start, end and window side of the whole windows and of what remains."""
    whole = cells // window * window
    found = [(0, whole, window)] if whole else []
    return found if whole == cells else [*found, (whole, cells, cells - whole)]


def to_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """[B, H, W, C], padded with zeros to whole windows, to [B, Wh, Ww, h w, C]."""
    down, across = (-n % w for n, w in zip(x.shape[1:3], window, strict=True))
    if down or across:
        x = F.pad(x, (0, 0, 0, across, 0, down))
    x = torch.unflatten(torch.unflatten(x, 1, (-1, window[0])), 3, (-1, window[1]))
    return x.transpose(2, 3).flatten(3, 4)


def from_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """[B, Wh, Ww, h w, C] to [B, Wh h, Ww w, C]."""
    return torch.unflatten(x, 3, window).transpose(2, 3).flatten(3, 4).flatten(1, 2)


class SemanticStage(nn.Module):
    """The third stage of a Swin Transformer with semantic tokens.

    Args:
        stage: timm's stage, which gives its downsampling and its ordinary blocks.
        config: settings.
        drop_path: stochastic depth rate of each block.

    Source:
        STViT (Chang et al., CVPR 2023), section 3.2 (STViT-Swin) and 3.3 (STViT-R).
    """

    def __init__(
        self, stage: SwinTransformerStage, config: WindowTokensConfig, drop_path: Sequence[float]
    ) -> None:
        super().__init__()
        self.config = config
        self.downsample = stage.downsample
        self.input_resolution, self.output_resolution = stage.input_resolution, stage.output_resolution
        self.grad_checkpointing = False
        first = stage.blocks[0]
        self.window = tuple(first.window_size)
        blocks = []
        for i, block in enumerate(stage.blocks):
            if self.is_plain(i):
                if config.recover:
                    block.shift_size = block.target_shift_size = (0, 0)
                    block._init_buffers()
                blocks.append(block)
            else:
                blocks.append(semantic_twin(block, drop_path[i], config.layer_scale))
        self.blocks = nn.ModuleList(blocks)
        self.G: nn.Parameter | None = None
        if config.global_centers:
            down, across = self._windows(self.output_resolution)
            shape = (1, down * config.tokens[0], across * config.tokens[1], first.dim)
            self.G = nn.Parameter(trunc_normal_(torch.empty(shape), std=0.02))

    def is_plain(self, index: int) -> bool:
        """Whether block ``index`` is an ordinary Swin block."""
        return index % UNIT == 0 if self.config.recover else index < self.config.base

    def set_input_size(
        self, feat_size: tuple[int, int], window_size: Any, always_partition: bool | None = None
    ) -> None:
        """As timm's stage: for other image sizes, and so other windows."""
        self.input_resolution = feat_size
        merges = not isinstance(self.downsample, nn.Identity)
        self.output_resolution = tuple((n + 1) // 2 for n in feat_size) if merges else feat_size
        blocks: Any = self.blocks
        for i, block in enumerate(blocks):
            if self.is_plain(i):
                block.set_input_size(self.output_resolution, window_size, always_partition)
                self.window = tuple(block.window_size)

    def _windows(self, grid: Sequence[int]) -> tuple[int, int]:
        down, across = (-(-n // w) for n, w in zip(grid, self.window, strict=True))
        return down, across

    def is_global(self, grid: Sequence[int]) -> bool:
        """Whether semantic tokens attend to the whole map of a ``grid``."""
        return is_global(self.config, self._windows(grid))

    def _centres(self, tokens: Tensor) -> Tensor:
        """``tokens`` [B, Wh, Ww, M, C] plus G."""
        if self.G is None:
            return tokens
        size = self.config.tokens
        grid = (tokens.shape[1] * size[0], tokens.shape[2] * size[1])
        centres = self.G.to(tokens.dtype)
        if tuple(centres.shape[1:3]) != grid:
            resized = F.interpolate(centres.permute(0, 3, 1, 2).float(), grid, mode="bicubic")
            centres = resized.permute(0, 2, 3, 1).to(tokens.dtype)
        return tokens + to_windows(centres, size)

    def generate(self, first: Any, second: Any, x: Tensor, centred_on_g: bool) -> Tensor:
        """The module's two blocks: ``x`` [B, H, W, C] to [B, Wh, Ww, M, C]."""
        config = self.config
        tokens = pool_windows(x, self.window, config.tokens, config.pool)
        shortcut = None if config.compat == "cls" else tokens
        if self.is_global(x.shape[1:3]):
            tokens = first.gather(tokens, x, self._ten(x.shape[1:3]), own=True, shortcut=shortcut)
            queries = self._centres(tokens) if centred_on_g else tokens
            flat = tokens.flatten(1, 3)
            found: Tensor = second.everywhere(
                queries.flatten(1, 3), x.flatten(1, 2), before=flat, shortcut=flat
            )
            return found.view_as(tokens)
        doubled, tripled = (tuple(k * w for w in self.window) for k in (2, 3))
        tokens = first.gather(tokens, x, centred(doubled, self.window), shortcut=shortcut)
        queries = self._centres(tokens) if centred_on_g else tokens
        out: Tensor = second.gather(queries, x, centred(tripled, self.window), shortcut=tokens)
        return out

    def _ten(self, grid: Sequence[int]) -> Reach:
        """Key windows of 10 for windows of 7, moved so far inward that they lie within a map of 14."""
        side = tuple(w + 3 if w > 3 else w for w in self.window)
        inward = [
            (s, n - s, 0) if n == 2 * w and s > w else (s, w, -((s - w) // 2))
            for s, w, n in zip(side, self.window, grid, strict=True)
        ]
        window, stride, offset = zip(*inward, strict=True)
        return Reach(window, stride, offset)

    def recover(self, block: Any, x: Tensor, tokens: Tensor) -> Tensor:
        """Image tokens ``x`` [B, H, W, C] read the semantic ones."""
        if self.is_global(x.shape[1:3]):
            flat: Tensor = block.everywhere(x.flatten(1, 2), tokens.flatten(1, 3), shortcut=x.flatten(1, 2))
            return flat.view_as(x)
        size = self.config.tokens
        windows = to_windows(x, self.window)
        reach = centred((9 * size[0], 9 * size[1]), size)
        windows = block.gather(windows, from_windows(tokens, size), reach, shortcut=windows)
        return from_windows(windows, self.window)[:, : x.shape[1], : x.shape[2]].contiguous()

    def _unit(self, x: Tensor, blocks: Sequence[Any], first: bool) -> Tensor:
        x = blocks[0](x)
        tokens = self.generate(blocks[1], blocks[2], x, first)
        tokens = mix(self.config, blocks[3], True, tokens)
        tokens = mix(self.config, blocks[4], False, tokens)
        return self.recover(blocks[5], x, tokens)

    def _tail(self, x: Tensor) -> Tensor:
        blocks: Any = self.blocks[self.config.base :]
        tokens = self.generate(blocks[0], blocks[1], x, True)
        for i, block in enumerate(blocks[2:]):
            tokens = mix(self.config, block, i % 2 == 0, tokens)
        return from_windows(tokens, self.config.tokens)

    def _steps(self) -> Iterator[Any]:
        """What gradient checkpointing keeps the inputs of."""
        if self.config.recover:
            for start in range(0, len(self.blocks), UNIT):
                blocks, first = list(self.blocks[start : start + UNIT]), start == 0
                yield lambda x, blocks=blocks, first=first: self._unit(x, blocks, first)
            return
        yield from self.blocks[: self.config.base]
        yield self._tail

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to the stage's map: image tokens, or without recovery the grid of semantic tokens."""
        x = self.downsample(x)
        for step in self._steps():
            x = checkpoint(step, x) if self.grad_checkpointing and torch.is_grad_enabled() else step(x)
        return x


def is_global(config: WindowTokensConfig, windows: tuple[int, int]) -> bool:
    """Whether ``config`` lets semantic tokens attend to a whole map of so many windows."""
    return config.layout == "global" or (config.layout == "auto" and max(windows) <= 2)


def mix(config: WindowTokensConfig, block: Any, local: bool, tokens: Tensor) -> Tensor:
    """A block on the tokens [B, Wh, Ww, M, C] alone: within windows, or across them."""
    size = config.tokens
    if local:
        flat = tokens.flatten(0, 2)
    elif config.recover or is_global(config, (tokens.shape[1], tokens.shape[2])):
        flat = tokens.flatten(1, 3)
    else:
        reach = centred((4 * size[0], 4 * size[1]), size)
        around: Tensor = block.gather(tokens, from_windows(tokens, size), reach, shortcut=tokens)
        return around
    mixed: Tensor = block(flat).view_as(tokens)
    return mixed


class TokenStage(nn.Module):
    """The last stage of STViT-Swin: a linear layer instead of patch merging, then blocks on tokens alone.

    Source:
        STViT (Chang et al., CVPR 2023), section 3.2.
    """

    def __init__(
        self, stage: SwinTransformerStage, config: WindowTokensConfig, drop_path: Sequence[float]
    ) -> None:
        super().__init__()
        merging = stage.downsample
        self.downsample = nn.Linear(merging.dim, merging.out_dim)
        self.config = config
        self.grad_checkpointing = False
        self.blocks = nn.ModuleList(
            semantic_twin(block, rate, config.layer_scale)
            for block, rate in zip(stage.blocks, drop_path, strict=True)
        )

    def set_input_size(self, feat_size: Any, window_size: Any, always_partition: bool | None = None) -> None:
        """Nothing to do: tokens have no windows of pixels."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, 2 C]."""
        tokens = to_windows(self.downsample(x), self.config.tokens)
        for i, block in enumerate(self.blocks):
            step = partial(mix, self.config, block, i % 2 == 0)
            saves = self.grad_checkpointing and torch.is_grad_enabled()
            tokens = checkpoint(step, tokens) if saves else step(tokens)
        return from_windows(tokens, self.config.tokens)


def semantic_twin(block: SwinTransformerBlock, drop_path: float, layer_scale: float | None) -> SemanticBlock:
    """A block on semantic tokens of the widths of ``block``, without its relative position bias."""
    attn = block.attn
    twin = SemanticBlock(
        block.dim,
        attn.num_heads,
        qkv_bias=attn.qkv.bias is not None,
        proj_drop=attn.proj_drop.p,
        attn_drop=attn.attn_drop.p,
        init_values=layer_scale,
        drop_path=drop_path,
        norm_layer=type(block.norm1),
    )
    twin.norm1.eps = twin.norm2.eps = block.norm1.eps
    twin.norm1, twin.attn.qkv, twin.attn.proj = block.norm1, attn.qkv, attn.proj
    twin.norm2, twin.mlp = block.norm2, block.mlp
    return twin


class STViTSwin(SwinTransformer):  # type: ignore[misc]
    """timm's ``SwinTransformer`` with semantic tokens in its third stage; made by :class:`STViTSwinConfig`.

    Args:
        config: semantic tokens.
        stem: ``conv`` for two convolutions, ``patch`` for timm's patch embedding.
        **kwargs: arguments of timm's class; images of any size go.

    Raises:
        ValueError: stages or blocks that do not fit the settings.
    """

    def __init__(self, config: WindowTokensConfig, stem: str = "conv", **kwargs: Any) -> None:
        depths = tuple(kwargs.get("depths", (2, 2, 6, 2)))
        check_depths(config, stem, depths)
        layers = {"embed_layer": ConvEmbed} if stem == "conv" else {}
        super().__init__(**layers, strict_img_size=False, **kwargs)
        rates = [[getattr(b.drop_path2, "drop_prob", 0.0) for b in stage.blocks] for stage in self.layers]
        self.layers[STAGE] = SemanticStage(self.layers[STAGE], config, rates[STAGE])
        if not config.recover and len(self.layers) > STAGE + 1:
            self.layers[STAGE + 1] = TokenStage(self.layers[STAGE + 1], config, rates[STAGE + 1])
            # Tokens are not merged again.
            self.feature_info[STAGE + 1]["reduction"] = self.feature_info[STAGE]["reduction"]
        self.semantic, self.stem, self.arguments = config, stem, dict(kwargs)


def check_depths(config: WindowTokensConfig, stem: str, depths: Sequence[int]) -> None:
    """Raise ValueError where the blocks do not fit the settings."""
    if stem not in STEMS:
        raise ValueError(f"STViTSwin: `stem` must be one of {', '.join(STEMS)}, got {stem!r}.")
    if len(depths) <= STAGE or (not config.recover and len(depths) != STAGE + 2):
        raise ValueError(f"STViTSwin: `depths` must name 4 stages, got {tuple(depths)}.")
    if config.recover and depths[STAGE] % UNIT:
        raise ValueError(
            f"STViTSwin: with recovery the third stage is units of {UNIT} blocks, got {depths[STAGE]}."
        )
    if not config.recover and depths[STAGE] < config.base + 2:
        raise ValueError(
            f"STViTSwin: the third stage needs {config.base + 2} blocks for `base` {config.base}, got "
            f"{depths[STAGE]}."
        )
