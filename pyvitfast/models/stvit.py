"""Vision Transformers whose later blocks see a few semantic tokens instead of all image tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from timm.layers import LayerScale, trunc_normal_
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pyvitfast.models.modules import is_plain_layer_norm, is_plain_linear, kernel
from pyvitfast.models.vision_transformer import (
    PrunedVisionTransformer,
    PrunedVisionTransformerDistilled,
    two_width_attention,
)
from pyvitfast.ops.adaptive_window_pool import widest_bin
from pyvitfast.reference.adaptive_window_pool import bins

POOLS = ("avg", "max", "overlap", "multiscale", "learned")
PREFIXES = ("drop", "keys", "carry")
SCOPES = ("window", "grid")


class TokenSettings:
    """What settings of semantic tokens share: dataclasses with a grid ``tokens``."""

    tokens: tuple[int, int]

    def check(self, grid: str, **known: Sequence[str]) -> None:
        """Raise ValueError unless ``tokens`` is a ``grid`` and each named setting one of its known values."""
        name = type(self).__name__
        sides: Any = self.tokens
        if not (
            isinstance(sides, tuple) and len(sides) == 2 and all(type(n) is int and n > 0 for n in sides)
        ):
            raise ValueError(
                f"{name}: `tokens` must be two positive whole numbers, height and width of {grid}, "
                f"got {sides!r}."
            )
        for setting, values in known.items():
            if getattr(self, setting) not in values:
                raise ValueError(
                    f"{name}: `{setting}` must be one of {', '.join(values)}, got {getattr(self, setting)!r}."
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold."""
        settings: Any = self
        return asdict(settings)

    @classmethod
    def from_dict(cls: type[SettingsT], data: dict[str, Any]) -> SettingsT:
        """The inverse of :meth:`to_dict`, also after a trip through JSON."""
        known: Any = cls
        if unknown := set(data) - {f.name for f in fields(known)}:
            raise ValueError(f"{cls.__name__}: unknown settings {', '.join(sorted(unknown))}.")
        return cls(**{**data, **({"tokens": tuple(data["tokens"])} if "tokens" in data else {})})


SettingsT = TypeVar("SettingsT", bound=TokenSettings)


@dataclass(frozen=True)
class TokensConfig(TokenSettings):
    """How many semantic tokens there are, where they come from and what they attend to.

    Args:
        tokens: height and width of the grid of semantic tokens; with ``pool="multiscale"`` of the finer of
            two grids.
        base: blocks that see all image tokens; the semantic token generation module follows.
        layers: blocks in that module, at least 1.
        pool: first cluster centres: ``avg`` or ``max`` over adaptive bins, ``learned`` weights within and
            between them, ``overlap`` for strided windows that overlap, ``multiscale`` for two grids.
            The last two average; the paper does not say.
        global_centers: add learned centres G to the queries from the second layer on.
        concat_keys: from the second layer on, keys are the semantic tokens and the image tokens; False
            leaves the image tokens out.
        residual_includes_g: G also joins the residual stream, as in the released code of STViT-R.
        prefix: what becomes of class, distillation and register tokens: ``drop`` builds the model without
            them, ``keys`` drops them after the module, ``carry`` keeps them as tokens and queries.
        intra_scope: the learned pool's first convolution sees one ``window`` at a time, or the ``grid``.
        layer_scale: first value of LayerScale in the module and all blocks after it; None adds none.

    Raises:
        ValueError: a value out of its range.

    Source:
        STViT (Chang et al., CVPR 2023), section 3.1 and Tables 7 to 9; ``keys``, ``carry`` and
        ``intra_scope`` are ours.
    """

    tokens: tuple[int, int] = (4, 4)
    base: int = 4
    layers: int = 2
    pool: str = "learned"
    global_centers: bool = True
    concat_keys: bool = True
    residual_includes_g: bool = False
    prefix: str = "drop"
    intra_scope: str = "window"
    layer_scale: float | None = None

    def __post_init__(self) -> None:
        self.check("the grid of semantic tokens", pool=POOLS, prefix=PREFIXES, intra_scope=SCOPES)
        if self.base < 0 or self.layers < 1:
            raise ValueError(
                f"TokensConfig: `base` must be at least 0 and `layers` at least 1, got {self.base} and "
                f"{self.layers}."
            )
        if self.pool == "multiscale" and min(self.tokens) < 2:
            raise ValueError(
                f"TokensConfig: `tokens` must be at least 2 by 2 for multiscale, got {self.tokens}."
            )

    @property
    def count(self) -> int:
        """Semantic tokens of an image."""
        down, across = self.tokens
        return down * across + ((down - 1) * (across - 1) if self.pool == "multiscale" else 0)


class AdaptivePool(nn.Module):
    """Average or maximum over adaptive bins: [B, H, W, C] to [B, M, C]."""

    def __init__(self, size: tuple[int, int], mode: str) -> None:
        super().__init__()
        self.size, self.mode = size, mode

    def forward(self, x: Tensor) -> Tensor:
        """Centres in row-major order."""
        check_grid(self.size, x)
        pooled: Tensor = kernel("adaptive_window_pool", x.device)(x, self.size, self.mode)
        return pooled

    def extra_repr(self) -> str:
        """Grid and mode for ``print``."""
        return f"size={self.size}, mode={self.mode}"


class OverlapPool(nn.Module):
    """Average over strided windows that overlap: [B, H, W, C] to [B, M, C].

    For n cells and m windows the stride is n // (m + 2) and a window spans what is left; 14 cells and 5
    windows give the paper's windows of 6 that overlap by 4.

    Source:
        STViT (Chang et al., CVPR 2023), Table 8.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Centres in row-major order."""
        check_grid(self.size, x)
        stride = [max(1, n // (m + 2)) for n, m in zip(x.shape[1:3], self.size, strict=True)]
        kernel = [n - (m - 1) * s for n, m, s in zip(x.shape[1:3], self.size, stride, strict=True)]
        return F.avg_pool2d(x.permute(0, 3, 1, 2), kernel, stride).flatten(2).transpose(1, 2)


class MultiscalePool(nn.Module):
    """Averages over two grids, the coarser first: [B, H, W, C] to [B, M, C].

    Source:
        STViT (Chang et al., CVPR 2023), Table 8: 3 by 3 and 4 by 4 are 25 tokens; the order is ours.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.fine = AdaptivePool(size, "avg")
        self.coarse = AdaptivePool((size[0] - 1, size[1] - 1), "avg")

    def forward(self, x: Tensor) -> Tensor:
        """Centres of the coarse grid, then of the fine one, each in row-major order."""
        return torch.cat([self.coarse(x), self.fine(x)], dim=1)


class _Scorer(nn.Module):
    """Depthwise 3x3 convolution, LayerNorm over channels, GELU, 1x1 convolution: [B, C, H, W] to scores."""

    def __init__(self, dim: int, scores: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.layer_norm = nn.LayerNorm(dim)
        self.score = nn.Conv2d(dim, scores, 1)
        # Equal scores at first: the pool starts as an average.
        for parameter in self.score.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer_norm(self.depthwise(x).permute(0, 2, 3, 1))
        scores: Tensor = self.score(F.gelu(x).permute(0, 3, 1, 2))
        return scores


class LearnedPool(nn.Module):
    r"""Weighted means over adaptive bins, weighted within each bin and then between them.

    :math:`M_i = f_{intra}(X_i)`, :math:`\hat P_i = \sum_j \text{softmax}(M_i)_j X_{ij}`,
    :math:`O = f_{inter}(\hat P)`, :math:`P_i = \sum_j \text{softmax}(M_i + O_i)_j X_{ij}`, where both f are a
    depthwise 3x3 convolution, LayerNorm, GELU and a 1x1 convolution whose weights start at zero.

    Args:
        dim: C.
        size: grid of centres.
        grid: grid of image tokens; the number of scores of a bin depends on it.
        scope: ``window`` lets the first convolution see one bin at a time, padded with zeros; ``grid`` all.

    Source:
        STViT (Chang et al., CVPR 2023), eq. 4 and 5. Kernel sizes, biases, first weights and the bins of a
        grid that does not divide are not in the paper: ours.
    """

    def __init__(self, dim: int, size: tuple[int, int], grid: tuple[int, int], scope: str) -> None:
        super().__init__()
        self.size, self.scope = size, scope
        self.cells = (widest_bin(grid[0], size[0]), widest_bin(grid[1], size[1]))
        self.intra = _Scorer(dim, 1)
        self.inter = _Scorer(dim, self.cells[0] * self.cells[1])

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, M, C], centres in row-major order.

        Raises:
            ValueError: a grid whose bins have another largest size than those the pool was made for.
        """
        check_grid(self.size, x)
        down, across = self.size
        cells = (widest_bin(x.shape[1], down), widest_bin(x.shape[2], across))
        if cells != self.cells:
            raise ValueError(
                f"LearnedPool: bins of {self.cells[0]}x{self.cells[1]} cells were learned, a grid of "
                f"{x.shape[1]}x{x.shape[2]} tokens has bins of {cells[0]}x{cells[1]}. "
                'Use pool="avg" or "max" for images of several sizes.'
            )
        pool = kernel("adaptive_window_pool", x.device)
        within = self._within(x)  # [B, M, KH, KW]
        first = pool(x, self.size, "learned", within)
        between = self.inter(first.transpose(1, 2).unflatten(2, self.size))  # [B, KH KW, down, across]
        between = between.flatten(2).transpose(1, 2).unflatten(2, cells)
        pooled: Tensor = pool(x, self.size, "learned", within, between)
        return pooled

    def _within(self, x: Tensor) -> Tensor:
        rows, row_there = self._index(x.shape[1], 0, x.device)
        columns, column_there = self._index(x.shape[2], 1, x.device)
        if self.scope == "grid":
            scores: Tensor = self.intra(x.permute(0, 3, 1, 2))[:, 0]  # [B, H, W]
            return scores[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(1, 2)
        there = (row_there[:, None, :, None] & column_there[None, :, None, :]).flatten(0, 1)  # [M, KH, KW]
        windows = x[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(1, 2)  # [B, M, KH, KW, C]
        windows = windows * there.unsqueeze(-1)
        found: Tensor = self.intra(windows.flatten(0, 1).permute(0, 3, 1, 2))
        return found.view(x.shape[0], -1, *self.cells)

    def _index(self, cells: int, axis: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cells of each bin [m, k], the last one repeated where a bin is narrower, and which are its own."""
        edges = bins(cells, self.size[axis])
        starts = torch.tensor([start for start, _ in edges], device=device)
        ends = torch.tensor([end for _, end in edges], device=device)
        index = starts[:, None] + torch.arange(self.cells[axis], device=device)
        return index.clamp(max=cells - 1), index < ends[:, None]


def check_grid(size: tuple[int, int], x: Tensor) -> None:
    """Raise ValueError where ``x`` [B, H, W, C] has fewer tokens a side than there are centres."""
    if x.shape[1] < size[0] or x.shape[2] < size[1]:
        raise ValueError(
            f"STViT: {size[0]}x{size[1]} semantic tokens need an image of at least as many patches a side, "
            f"got {x.shape[1]}x{x.shape[2]}."
        )


def make_pool(config: TokensConfig, dim: int, grid: tuple[int, int]) -> nn.Module:
    """The pooling of ``config`` for ``dim`` channels on a ``grid`` of image tokens."""
    if config.pool == "learned":
        return LearnedPool(dim, config.tokens, grid, config.intra_scope)
    if config.pool == "overlap":
        return OverlapPool(config.tokens)
    if config.pool == "multiscale":
        return MultiscalePool(config.tokens)
    return AdaptivePool(config.tokens, config.pool)


class TokenGeneration(nn.Module):
    """What the semantic token generation module has besides the blocks: pooling and learned centres G.

    Args:
        config: settings.
        dim: C.
        grid: grid of image tokens.

    Source:
        STViT (Chang et al., CVPR 2023), section 3.1; G starts from a truncated normal, std 0.02, as in the
        released code.
    """

    def __init__(self, config: TokensConfig, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.config = config
        self.pool = make_pool(config, dim, grid)
        self.G: nn.Parameter | None = None
        if config.global_centers:
            self.G = nn.Parameter(trunc_normal_(torch.empty(1, config.count, dim), std=0.02))


def _runs_on_op(block: Any) -> bool:
    """Whether the op computes what the attention of ``block`` would, without anybody missing keys."""
    attn, norm = block.attn, block.norm1
    if not (is_plain_linear(attn.qkv) and is_plain_linear(attn.proj) and is_plain_layer_norm(norm)):
        return False
    if attn.qkv.out_features != 3 * attn.qkv.in_features or attn.proj.in_features != attn.proj.out_features:
        return False  # pruned: the op wants one width
    if norm.weight is None or (attn.attn_drop.training and attn.attn_drop.p > 0):
        return False
    return all(
        part is None or isinstance(part, nn.Identity)
        for part in (getattr(attn, n, None) for n in ("q_norm", "k_norm", "norm", "gate"))
    )


def _thirds(attn: Any) -> list[int]:
    """Rows of queries, keys and values in the fused projection."""
    splits: list[int] = getattr(attn, "splits", None) or [attn.qkv.out_features // 3] * 3
    return splits


def _projected(
    block: Any, queries: Tensor, keys: Tensor, before: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, H, M, D], keys and values [B, H, K + N, D] of a block; its layers are called."""
    attn, count = block.attn, queries.shape[1]
    rows = torch.cat([t for t in (queries, before, keys) if t is not None], dim=1)
    q, k, v = (
        torch.unflatten(part, 2, (attn.num_heads, -1)).transpose(1, 2)
        for part in attn.qkv(block.norm1(rows)).split(_thirds(attn), dim=-1)
    )
    return q[:, :, :count], k[:, :, count:], v[:, :, count:]


def cross_attention(block: Any, queries: Tensor, keys: Tensor, before: Tensor | None = None) -> Tensor:
    """Attention of a ViT block: ``queries`` [B, M, C] over ``before`` [B, K, C] and ``keys`` [B, N, C].

    The block's own norm and projections; no residual. Returns [B, M, C].
    """
    attn = block.attn
    if _runs_on_op(block):
        q_weight, k_weight, v_weight = attn.qkv.weight.chunk(3)
        biases = (None,) * 3 if attn.qkv.bias is None else attn.qkv.bias.chunk(3)
        mixed = kernel("semantic_pool_attention", keys.device)(
            queries,
            keys,
            q_weight,
            k_weight,
            v_weight,
            attn.proj.weight,
            num_heads=attn.num_heads,
            tokens_before=before,
            q_bias=biases[0],
            k_bias=biases[1],
            v_bias=biases[2],
            proj_bias=attn.proj.bias,
            norm_weight=block.norm1.weight,
            norm_bias=block.norm1.bias,
            eps=block.norm1.eps,
            scale=float(attn.scale),
        )
    else:
        q, k, v = _projected(block, queries, keys, before)
        dropout = attn.attn_drop.p if attn.attn_drop.training else 0.0
        mixed = two_width_attention(q, k, v, float(attn.scale), None, dropout)
        mixed = attn.proj(mixed.transpose(1, 2).flatten(2))
    out: Tensor = attn.proj_drop(mixed)
    return out


class SemanticTokensMixin:
    """The forward pass of a timm ``VisionTransformer`` with a semantic token generation module.

    ``stgm`` is a :class:`TokenGeneration`; the module's blocks are ordinary ones out of ``blocks``.
    """

    stgm: TokenGeneration

    def _reads(
        self, index: int, tokens: Tensor, image: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Queries, keys, keys before these and shortcut of layer ``index`` of the module."""
        config = self.stgm.config
        model: Any = self
        carried = model.num_prefix_tokens if config.prefix == "carry" else 0
        queries, shortcut = tokens, tokens
        before: Tensor | None = None
        if index == 0:
            keys = image
        elif config.concat_keys:
            # Carried tokens are among the semantic ones, so each is there once, as it is by now.
            keys, before = image[:, carried:], tokens
        else:
            keys = tokens
        if index > 0 and self.stgm.G is not None:
            # Inference in 16 bits keeps the stream in 16 bits, whatever G is held in.
            centres = self.stgm.G.to(tokens.dtype)
            queries = tokens + (F.pad(centres, (0, 0, carried, 0)) if carried else centres)
            shortcut = queries if config.residual_includes_g else tokens
        return queries, keys, before, shortcut

    def _generate(self, block: Any, index: int, tokens: Tensor, image: Tensor) -> Tensor:
        """Layer ``index`` of the module: ``tokens`` [B, P + M, C], all of ``image`` [B, P + N, C]."""
        queries, keys, before, shortcut = self._reads(index, tokens, image)
        x = shortcut + block.drop_path1(block.ls1(cross_attention(block, queries, keys, before)))
        out: Tensor = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return out

    def _layer(self, index: int, tokens: Tensor, image: Tensor | None) -> Tensor:
        model: Any = self
        block = model.blocks[index]
        run = (
            block
            if image is None
            else lambda tokens, image: self._generate(block, index - self.stgm.config.base, tokens, image)
        )
        inputs = (tokens,) if image is None else (tokens, image)
        if model.grad_checkpointing and torch.is_grad_enabled():
            found: Tensor = checkpoint(run, *inputs)
            return found
        out: Tensor = run(*inputs)
        return out

    def _states(
        self, x: Tensor, watch: Callable[[Tensor, Tensor], None] | None = None
    ) -> Iterator[tuple[Tensor, tuple[int, int] | None]]:
        """Tokens after each block, with prefix, and their grid; None where they have none.

        ``watch`` is called with the tokens and the image tokens before each layer of the module.
        """
        model: Any = self
        config = self.stgm.config
        x = model.patch_embed(x)
        grid = (x.shape[1], x.shape[2]) if model.dynamic_img_size else tuple(model.patch_embed.grid_size)
        x = model.norm_pre(model._pos_embed(x))
        prefix = model.num_prefix_tokens
        tokens = image = x
        semantic = None if config.pool == "multiscale" else config.tokens
        for i in range(len(model.blocks)):
            if i == config.base:
                image = tokens
                patches = torch.unflatten(image[:, prefix:], 1, grid)
                tokens = self.stgm.pool(patches)
                if config.prefix == "carry" and prefix:
                    tokens = torch.cat([image[:, :prefix], tokens], dim=1)
            generating = config.base <= i < config.base + config.layers
            if generating and watch is not None:
                watch(tokens, image)
            tokens = self._layer(i, tokens, image if generating else None)
            yield tokens, grid if i < config.base else semantic

    @torch.no_grad()
    def token_attention(self, x: Tensor) -> Tensor:
        """How much of each patch each semantic token takes in, in the module's last layer.

        Args:
            x: images [B, 3, H, W].

        Returns:
            [B, M, H / patch, W / patch] in float32: the weights of the softmax, a mean over heads. What is
            missing to a sum of 1 goes to class and semantic tokens.

        Raises:
            ValueError: the module has image tokens as keys in no such layer.
        """
        model: Any = self
        config = self.stgm.config
        if config.layers > 1 and not config.concat_keys:
            raise ValueError("STViT: without `concat_keys` the module's last layer reads no image tokens.")
        last = config.base + config.layers - 1
        seen: list[tuple[Tensor, Tensor]] = []
        for i, _ in enumerate(self._states(x, lambda *given: seen.append(given))):
            if i == last:
                break
        tokens, image = seen[-1]
        carried = model.num_prefix_tokens if config.prefix == "carry" else 0
        grid = model.patch_embed.dynamic_feat_size(x.shape[-2:])
        queries, keys, before, _ = self._reads(config.layers - 1, tokens, image)
        block = model.blocks[last]
        q, k, _ = _projected(block, queries, keys, before)
        scores = float(block.attn.scale) * q[:, :, carried:].float() @ k.float().transpose(2, 3)
        patches = scores.softmax(-1).mean(1)[:, :, -grid[0] * grid[1] :]
        return torch.unflatten(patches, 2, grid)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images [B, 3, H, W] to semantic tokens [B, M, C], normalised as in timm."""
        if attn_mask is not None or is_causal:
            raise NotImplementedError(
                "STViT: masks are not supported; semantic tokens stand for the whole image."
            )
        model: Any = self
        for tokens, _ in self._states(x):  # noqa: B007
            pass
        out: Tensor = model.norm(tokens)
        return out

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        **_: Any,
    ) -> Any:
        """As timm's, where semantic tokens come as a map of their own grid, [B, C, 4, 4] for instance."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"STViT: `output_fmt` must be NCHW or NLC, got {output_fmt!r}.")
        model: Any = self
        config = self.stgm.config
        wanted, last = feature_take_indices(len(model.blocks), indices)
        found = []
        for i, (tokens, grid) in enumerate(self._states(x)):
            if i in wanted:
                held = model.num_prefix_tokens if i < config.base or config.prefix == "carry" else 0
                y = model.norm(tokens) if norm else tokens
                prefix, y = y[:, :held], y[:, held:]
                if output_fmt == "NCHW":
                    if grid is None:
                        raise ValueError(
                            'STViT: tokens of pool="multiscale" have no grid; use output_fmt="NLC".'
                        )
                    y = y.transpose(1, 2).unflatten(2, grid).contiguous()
                found.append((y, prefix) if return_prefix_tokens and held else y)
            if stop_early and i == last:
                break
        if intermediates_only:
            return found
        return model.norm(tokens), found

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """As timm's; under ``prefix="keys"`` no class token is left among the tokens."""
        if self.stgm.config.prefix != "keys":
            pooled: Tensor = super().pool(x, pool_type)  # type: ignore[misc]
            return pooled
        return x.mean(dim=1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take the source model's weights as they are: what fits no parameter here is left out."""
        model: Any = self
        if model.num_prefix_tokens == 0:
            dropped = [state_dict.pop(prefix + name, None) for name in ("cls_token", "reg_token")]
            name = prefix + "pos_embed"
            if model.pos_embed is not None and name in state_dict:
                surplus = state_dict[name].shape[1] - model.pos_embed.shape[1]
                if 0 < surplus == sum(token.shape[1] for token in dropped if token is not None):
                    state_dict[name] = state_dict[name][:, surplus:]
        for name, own in self.stgm.named_parameters():
            # A plain ViT has none of these; our first values stay.
            state_dict.setdefault(f"{prefix}stgm.{name}", own.detach())
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[misc]


class STViT(SemanticTokensMixin, VisionTransformer):  # type: ignore[misc]
    """timm's ``VisionTransformer`` with semantic tokens; made by :class:`STViTConfig`."""


class PrunedSTViT(SemanticTokensMixin, PrunedVisionTransformer):
    """A pruned Vision Transformer with semantic tokens; made by :class:`STViTConfig`."""


class STViTDistilled(SemanticTokensMixin, VisionTransformerDistilled):  # type: ignore[misc]
    """timm's ``VisionTransformerDistilled`` with semantic tokens; made by :class:`STViTConfig`."""


class PrunedSTViTDistilled(SemanticTokensMixin, PrunedVisionTransformerDistilled):
    """A pruned distilled Vision Transformer with semantic tokens; made by :class:`STViTConfig`."""


CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    VisionTransformer: STViT,
    PrunedVisionTransformer: PrunedSTViT,
    VisionTransformerDistilled: STViTDistilled,
    PrunedVisionTransformerDistilled: PrunedSTViTDistilled,
}


def add_semantic_tokens(model: nn.Module, config: TokensConfig) -> nn.Module:
    """Turn ``model``, of a class in :data:`CLASSES`, into its twin with semantic tokens, in place."""
    vit: Any = model
    vit.stgm = TokenGeneration(config, vit.embed_dim, tuple(vit.patch_embed.grid_size)).to(
        vit.blocks[0].norm1.weight
    )
    if config.layer_scale is not None:
        for block in vit.blocks[config.base :]:
            block.ls1 = LayerScale(vit.embed_dim, init_values=config.layer_scale)
            block.ls2 = LayerScale(vit.embed_dim, init_values=config.layer_scale)
    # The twin holds the same modules and one more.
    model.__class__ = CLASSES[type(model)]
    return model
