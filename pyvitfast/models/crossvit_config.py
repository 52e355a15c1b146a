"""The architecture of a CrossViT as plain data: checked, counted, read from a model, rebuilt without it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

from timm.layers import calculate_drop_path_rates
from timm.models.crossvit import CrossVit
from torch import nn

from pyvitfast.models.crossvit import CrossViT
from pyvitfast.models.crossvit_fusion import LinearMultiScaleBlock, swap_blocks
from pyvitfast.models.crossvit_reading import check_parts, need, timm_arguments
from pyvitfast.models.crossvit_schemes import SCHEMES
from pyvitfast.models.modules import plain_class, unwrap
from pyvitfast.models.vision_transformer import BlockDims

FUSIONS = ("cross_attention", *SCHEMES)
# Kernel, stride and padding of the convolutions of the dagger stem, by patch size.
_STEMS = {12: ((7, 4, 3), (3, 3, 0), (3, 1, 1)), 16: ((7, 4, 3), (3, 2, 1), (3, 2, 1))}
_RATES = ("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class CrossViTDims:
    """Width of the residual stream of each branch; blocks by encoder, its small branch's first."""

    embed_dims: tuple[int, ...]
    blocks: tuple[BlockDims, ...]


@dataclass(frozen=True)
class CrossViTConfig:
    r"""Everything needed to build a CrossViT; field names are timm's arguments, the defaults CrossViT-15's.

    The first branch is the small one (fine patches), the second the large one.

    Args:
        img_size: image height and width in pixels; one number for both.
        img_scale: side of what each branch sees, as a fraction of the image. Our class rounds it to the
            nearest multiple of the branch's patch, which leaves all published sizes as they are.
        patch_size: patch side of each branch.
        embed_dim: width of each branch.
        depth: for each encoder :math:`(N, M, L')`: blocks of the small and of the large branch, and fusion
            modules. L' = 0 is one module under the published names, 1 the same module in a Sequential. From
            the second on a module sees one token only, so it adds parameters but no look at the patches.
        num_heads: heads of each branch; a fusion has those of the branch whose tokens it reads.
        mlp_ratio: MLP width over ``embed_dim``, for each branch; a third number, as in published settings,
            has no effect.
        multi_conv: convolutional patch embedding, the models marked with a dagger; patches of 12 and 16 only.
        crop_scale: crop where a branch sees less than the image, rather than resize.
        fusion: ``cross_attention``, or of the ablation ``all_attention``, ``class_token``, ``pairwise``,
            ``none``.
        linear: run the cross-attention on the op ``linear_cross_attention``; False for the other fusions.
        norm_eps: epsilon of all norms.
        timm_class: build timm's ``CrossVit`` rather than ours. It needs 1 <= N <= M, sides that are multiples
            of the patch, and cross-attention.

    The other fields are passed to timm as they are.

    Raises:
        ValueError: a value that no model can be built from; the message says which and what to do.
    """

    img_size: tuple[int, int] = (240, 240)
    img_scale: tuple[float, float] = (1.0, 224 / 240)
    patch_size: tuple[int, int] = (12, 16)
    in_chans: int = 3
    num_classes: int = 1000
    embed_dim: tuple[int, int] = (192, 384)
    depth: tuple[tuple[int, int, int], ...] = ((1, 5, 0), (1, 5, 0), (1, 5, 0))
    num_heads: tuple[int, int] = (6, 6)
    mlp_ratio: tuple[float, ...] = (3.0, 3.0, 1.0)
    multi_conv: bool = False
    crop_scale: bool = False
    qkv_bias: bool = True
    drop_rate: float = 0.0
    pos_drop_rate: float = 0.0
    proj_drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    norm_eps: float = 1e-6
    global_pool: str = "token"
    fusion: str = "cross_attention"
    linear: bool = True
    timm_class: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _tuples(getattr(self, field.name)))
        if isinstance(self.img_size, int):
            object.__setattr__(self, "img_size", (self.img_size, self.img_size))
        if self.fusion != "cross_attention":
            object.__setattr__(self, "linear", False)
        for name in ("img_size", "img_scale", "patch_size", "embed_dim", "num_heads"):
            value = getattr(self, name)
            good = isinstance(value, tuple) and len(value) == 2 and all(v > 0 for v in value)
            self._check(name, "two positive numbers", good)
        good = isinstance(self.mlp_ratio, tuple) and len(self.mlp_ratio) in (2, 3)
        good = good and all(int(w * r) >= 1 for w, r in zip(self.embed_dim, self.mlp_ratio))
        self._check("mlp_ratio", "two or three numbers that give each branch an MLP", good)
        good = isinstance(self.depth, tuple) and len(self.depth) > 0
        good = good and all(isinstance(e, tuple) and len(e) == 3 and min(e) >= 0 for e in self.depth)
        self._check("depth", "an (N, M, L') of whole numbers for each encoder", good)
        self._check("depth", "at least one block in each encoder", all(max(e[:2]) for e in self.depth))
        for width, heads in zip(self.embed_dim, self.num_heads):
            self._check("embed_dim", f"multiples of the heads, here {self.num_heads}", width % heads == 0)
        self._check("in_chans", "at least 1", self.in_chans >= 1)
        self._check("num_classes", "at least 0", self.num_classes >= 0)
        for name in _RATES:
            self._check(name, "at least 0 and below 1", 0 <= getattr(self, name) < 1)
        self._check("norm_eps", "positive", self.norm_eps > 0)
        self._check("global_pool", "token or avg", self.global_pool in ("token", "avg"))
        self._check("fusion", f"one of {', '.join(FUSIONS)}", self.fusion in FUSIONS)
        if self.multi_conv:
            rule = "12 or 16 with `multi_conv`: the convolutional stem exists for these only"
            self._check("patch_size", rule, all(patch in _STEMS for patch in self.patch_size))
            self._check("embed_dim", "at least 4 with `multi_conv`", min(self.embed_dim) >= 4)
        if self.timm_class:
            self._check_timm()

    def _check(self, name: str, rule: str, good: bool) -> None:
        if not good:
            raise ValueError(f"CrossViTConfig: `{name}` must be {rule}, got {getattr(self, name)!r}.")

    def _check_timm(self) -> None:
        """What timm's class does not check: it would fail later, with a message about something else."""
        ours = "with `timm_class`; our class takes it, build with timm_class=False"
        self._check("fusion", f"cross_attention {ours}", self.fusion == "cross_attention")
        self._check("depth", f"1 <= N <= M {ours}", all(1 <= n <= m for n, m, _ in self.depth))
        for (height, width), patch in zip(self.branch_sizes(), self.patch_size):
            rule = f"such that each branch sees a multiple of its patch {ours}"
            # timm rounds the product of both sides down, its convolution each side.
            counted = height // patch * width // patch
            self._check("img_size", rule, counted == (height // patch) * (width // patch) > 0)

    def branch_sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of what each branch sees."""

        def side(pixels: int, scale: float, patch: int) -> int:
            if self.timm_class:
                return int(pixels * scale)
            return patch * max(1, math.floor(pixels * scale / patch + 0.5))

        (height, width), pairs = self.img_size, zip(self.img_scale, self.patch_size)
        return tuple((side(height, s, p), side(width, s, p)) for s, p in pairs)

    def grids(self) -> tuple[tuple[int, int], ...]:
        """Patches of each branch, vertically and horizontally."""
        return tuple((h // p, w // p) for (h, w), p in zip(self.branch_sizes(), self.patch_size))

    def tokens(self) -> tuple[int, ...]:
        """Tokens of each branch, its class token included."""
        return tuple(1 + rows * columns for rows, columns in self.grids())

    def hidden(self) -> tuple[int, ...]:
        """MLP width of each branch."""
        return tuple(int(width * ratio) for width, ratio in zip(self.embed_dim, self.mlp_ratio))

    def drop_path_rates(self) -> list[list[float]]:
        """Stochastic depth of each encoder: by block, and last of its exchange, as timm hands them out."""
        counts = [max(n, m) + fusions for n, m, fusions in self.depth]
        rates = calculate_drop_path_rates(self.drop_path_rate, sum(counts))
        return [rates[sum(counts[:k]) : sum(counts[: k + 1])] for k in range(len(counts))]

    @property
    def dims(self) -> CrossViTDims:
        """Widths of the branches and of all their blocks."""
        blocks = []
        for encoder in self.depth:
            for count, width, heads, mlp in zip(encoder, self.embed_dim, self.num_heads, self.hidden()):
                blocks += [BlockDims(heads, width // heads, width // heads, mlp)] * count
        return CrossViTDims(self.embed_dim, tuple(blocks))

    def _stem(self, branch: int) -> Iterator[tuple[int, int, int]]:
        """Inputs of an output value, outputs and places of each convolution of a patch embedding."""
        width, (rows, columns) = self.embed_dim[branch], self.branch_sizes()[branch]
        patch, chans = self.patch_size[branch], self.in_chans
        if not self.multi_conv:
            yield chans * patch * patch, width, (rows // patch) * (columns // patch)
            return
        for (kernel, stride, pad), out in zip(_STEMS[patch], (width // 4, width // 2, width)):
            rows, columns = ((side + 2 * pad - kernel) // stride + 1 for side in (rows, columns))
            yield chans * kernel * kernel, out, rows * columns
            chans = out

    def _exchanges(self) -> Iterator[tuple[int, int, int]]:
        """Inputs, outputs and tokens of each f and g of an encoder; all are LayerNorm, GELU, Linear."""
        widths, tokens = self.embed_dim, self.tokens()
        if self.fusion == "cross_attention":
            for own, other in (widths, widths[::-1]):
                yield own, other, 1
                yield other, own, 1
        elif self.fusion != "none":
            for width, count in zip(widths, tokens):
                if self.fusion == "all_attention" or width != max(widths):
                    seen = 1 if self.fusion == "class_token" else count
                    yield width, max(widths), seen
                    yield max(widths), width, seen

    def params(self) -> int:
        """Exact number of parameters."""
        bias, total = int(self.qkv_bias), 0
        for i, (width, tokens) in enumerate(zip(self.embed_dim, self.tokens())):
            total += sum((inputs + 1) * out for inputs, out, _ in self._stem(i))
            total += width * (tokens + 1) + 2 * width + self.num_classes * (width + 1)
        attention = [4 * width * width + 3 * bias * width + width for width in self.embed_dim]
        for encoder in self.depth:
            for count, width, mlp, own in zip(encoder, self.embed_dim, self.hidden(), attention):
                total += count * (4 * width + own + (width + 1) * mlp + (mlp + 1) * width)
            total += sum(2 * inside + (inside + 1) * outside for inside, outside, _ in self._exchanges())
            if self.fusion == "cross_attention":
                modules = max(1, encoder[2])
                total += modules * sum(2 * w + own for w, own in zip(self.embed_dim, attention))
            elif self.fusion == "all_attention":
                total += 2 * max(self.embed_dim) + max(attention)
        return total

    def macs(self, img_size: tuple[int, int] | None = None, folded: bool | None = None) -> int:
        r"""Multiply-accumulates of one image: matrix products and convolutions, nothing else.

        A cross-attention of N tokens, h heads and width C has :math:`2 N C^2 + 2 N C + 2 C^2` of them, folded
        onto the tokens :math:`2 N C h + 4 C^2`.

        Args:
            img_size: without effect: the model resizes an image of any size to what it was built for.
            folded: count the cross-attention as the op computes it; by default if the model runs on it.

        Source:
            CrossViT (Chen et al., ICCV 2021), Table 2, where they are called FLOPs; the published figures
            are those with ``folded=False``.
        """
        folded, total = self.linear if folded is None else folded, 0
        tokens, widths = self.tokens(), self.embed_dim
        for i, width in enumerate(widths):
            total += sum(inputs * out * places for inputs, out, places in self._stem(i))
            total += self.num_classes * width
        for encoder in self.depth:
            for count, width, n, mlp in zip(encoder, widths, tokens, self.hidden()):
                total += count * (4 * n * width**2 + 2 * n * n * width + 2 * n * width * mlp)
            total += sum(inside * outside * seen for inside, outside, seen in self._exchanges())
            if self.fusion == "cross_attention":
                for width, n, heads in zip(widths, tokens, self.num_heads):
                    whole = 2 * n * width**2 + 2 * n * width + 2 * width**2
                    total += 2 * n * width * heads + 4 * width**2 if folded else whole
                    # The modules after the first see one token.
                    total += max(0, encoder[2] - 1) * (4 * width**2 + 2 * width)
            elif self.fusion == "all_attention":
                total += 4 * sum(tokens) * max(widths) ** 2 + 2 * sum(tokens) ** 2 * max(widths)
        return total

    def build(self) -> nn.Module:
        """A new model of this architecture, freshly initialised."""
        if not self.timm_class:
            return CrossViT(self)
        arguments = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("norm_eps", "fusion", "linear", "timm_class"):
            del arguments[name]
        model: nn.Module = CrossVit(norm_layer=partial(nn.LayerNorm, eps=self.norm_eps), **arguments)
        swap_blocks(model, self.linear)
        return model

    @classmethod
    def from_model(cls, model: nn.Module) -> CrossViTConfig:
        """Read the architecture from a model.

        Raises:
            TypeError: the model is no CrossViT.
            NotImplementedError: it has a part that we cannot describe; the message names it.
        """
        model = unwrap(model)
        kind = plain_class(model)
        if kind not in (CrossVit, CrossViT):
            raise TypeError(
                "CrossViTConfig.from_model: `model` must be timm's CrossVit or ours, got "
                f"{type(model).__module__}.{type(model).__name__}."
            )
        parts: Any = model
        linear = {plain_class(e) is LinearMultiScaleBlock for e in parts.blocks}
        need("blocks", "all of one class", len(linear) == 1, [type(e).__name__ for e in parts.blocks])
        if kind is CrossViT:
            config: CrossViTConfig = replace(
                parts.config,
                num_classes=parts.num_classes,
                global_pool=parts.global_pool,
                linear=linear.pop(),
            )
        else:
            try:
                config = cls(**timm_arguments(parts), linear=linear.pop(), timm_class=True)
            except ValueError as error:
                raise NotImplementedError(f"CrossViTConfig.from_model: {error}") from error
        check_parts(parts)
        held = sum(p.numel() for p in parts.parameters())
        need(
            "parameters",
            f"{config.params()} for these widths (added modules?)",
            held == config.params(),
            held,
        )
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CrossViTConfig:
        """The inverse of :meth:`to_dict`, also after a trip through JSON."""
        return cls(**data)
