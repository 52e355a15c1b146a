"""The architecture of a Swin Transformer as plain data: read from a model, rebuilt without it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from timm.layers import ClassifierHead, DropPath, Mlp, PatchEmbed
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformer,
    SwinTransformerBlock,
    WindowAttention,
)
from torch import nn

from pyvitfast.models.modules import layer_class, layer_name, plain_class, unwrap
from pyvitfast.models.swin_transformer import PrunedSwinTransformer, PrunedWindowAttention, SwinDims
from pyvitfast.models.vision_transformer import BlockDims


def _need(where: str, rule: str, good: bool, got: object) -> None:
    if not good:
        raise NotImplementedError(
            f"SwinConfig.from_model: {where}: must be {rule}, got {got}. Supported is timm's SwinTransformer "
            "with plain blocks."
        )


def _block_dims(name: str, block: Any) -> BlockDims:
    _need(name, "a SwinTransformerBlock", plain_class(block) is SwinTransformerBlock, type(block).__name__)
    attn, mlp = block.attn, block.mlp
    known = plain_class(attn) in (WindowAttention, PrunedWindowAttention)
    _need(f"{name}.attn", "timm's WindowAttention", known, type(attn).__name__)
    plain = plain_class(mlp) is Mlp and isinstance(mlp.norm, nn.Identity) and isinstance(mlp.act, nn.GELU)
    _need(f"{name}.mlp", "timm's Mlp with GELU and without a norm", plain, type(mlp).__name__)
    if isinstance(attn, PrunedWindowAttention):
        return BlockDims(attn.num_heads, attn.qk_dim, attn.v_dim, mlp.fc1.out_features)
    width = attn.qkv.out_features // 3 // attn.num_heads
    return BlockDims(attn.num_heads, width, width, mlp.fc1.out_features)


def _check_windows(name: str, index: int, block: Any, first: Any) -> None:
    """Windows must be those that timm lays out for the stage of ``first``: every other block is shifted."""
    for part in ("window_size", "always_partition", "dynamic_mask"):
        expected, got = getattr(first, part), getattr(block, part)
        _need(f"{name}.{part}", f"{expected} as in the first block", got == expected, got)
    shift = tuple(
        0 if index % 2 == 0 or (side <= window and not first.always_partition) else window // 2
        for side, window in zip(first.input_resolution, first.window_size, strict=True)
    )
    _need(f"{name}.shift_size", str(shift), tuple(block.shift_size) == shift, block.shift_size)


@dataclass(frozen=True)
class SwinConfig:
    """Everything needed to build a timm or pruned Swin Transformer; field names are timm's arguments.

    Args:
        dims: widths of stages and blocks.
        scales: softmax scale of each block.
        pruned: build our class rather than timm's own.
        img_size: image height and width in pixels.
        patch_size: patch height and width in pixels.
        window_size: window height and width in tokens, by stage.
        norm_layer: qualified name of the norm, from ``torch.nn`` or ``timm.layers``.
        norm_eps: epsilon of all norms.

    The other fields are passed to timm as they are.
    """

    dims: SwinDims
    scales: tuple[float, ...]
    pruned: bool
    img_size: tuple[int, int]
    patch_size: tuple[int, int]
    window_size: tuple[tuple[int, int], ...]
    always_partition: bool
    strict_img_size: bool
    in_chans: int
    num_classes: int
    global_pool: str
    qkv_bias: bool
    drop_rate: float
    proj_drop_rate: float
    attn_drop_rate: float
    drop_path_rate: float
    norm_layer: str
    norm_eps: float

    @classmethod
    def from_model(cls, model: nn.Module) -> SwinConfig:
        """Read the architecture from a model.

        Raises:
            TypeError: the model is not a timm Swin Transformer.
            NotImplementedError: it has a part that we cannot describe; the message names it.
        """
        model = unwrap(model)
        if plain_class(model) not in (SwinTransformer, PrunedSwinTransformer):
            raise TypeError(
                "SwinConfig.from_model: `model` must be a timm SwinTransformer, got "
                f"{type(model).__module__}.{type(model).__name__}."
            )
        parts: Any = model
        embed = parts.patch_embed
        _need("patch_embed", "timm's PatchEmbed", plain_class(embed) is PatchEmbed, type(embed).__name__)
        _need("patch_embed.img_size", "set", embed.img_size is not None, None)
        head = parts.head
        _need("head", "timm's ClassifierHead", plain_class(head) is ClassifierHead, type(head).__name__)
        _need("global_pool", "avg, max or none", parts.global_pool in ("avg", "max", ""), parts.global_pool)
        stages, scales, windows = [], [], []
        for i, stage in enumerate(parts.layers):
            merges = isinstance(stage.downsample, PatchMerging)
            _need(f"layers.{i}.downsample", "PatchMerging after the first stage", merges == (i > 0), i)
            named = [(f"layers.{i}.blocks.{j}", block) for j, block in enumerate(stage.blocks)]
            _need(f"layers.{i}.blocks", "at least one block", bool(named), 0)
            stages.append(tuple(_block_dims(name, block) for name, block in named))
            scales += [float(block.attn.scale) for _, block in named]
            for j, (name, block) in enumerate(named):
                _check_windows(name, j, block, stage.blocks[0])
            windows.append(tuple(stage.blocks[0].window_size))
        first = parts.layers[0].blocks[0]
        for name, norm in parts.named_modules():
            if name.rpartition(".")[2] in ("norm", "norm1", "norm2") and not isinstance(norm, nn.Identity):
                good = isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None
                _need(name, "a LayerNorm with weight and bias", good, type(norm).__name__)
                same = type(norm) is type(first.norm1) and norm.eps == first.norm1.eps
                _need(name, "equal to layers.0.blocks.0.norm1 in class and eps", same, norm)
        path = parts.layers[-1].blocks[-1].drop_path2
        widths = tuple(stage.blocks[0].norm1.normalized_shape[0] for stage in parts.layers)
        config = cls(
            dims=SwinDims(widths, tuple(stages)),
            scales=tuple(scales),
            pruned=isinstance(parts, PrunedSwinTransformer),
            img_size=tuple(embed.img_size),
            patch_size=tuple(embed.patch_size),
            window_size=tuple(windows),
            always_partition=first.always_partition,
            strict_img_size=not first.dynamic_mask,
            in_chans=embed.proj.in_channels,
            num_classes=parts.num_classes,
            global_pool=parts.global_pool,
            qkv_bias=first.attn.qkv.bias is not None,
            drop_rate=float(head.drop.p),
            proj_drop_rate=float(first.attn.proj_drop.p),
            attn_drop_rate=float(first.attn.attn_drop.p),
            drop_path_rate=float(path.drop_prob) if isinstance(path, DropPath) else 0.0,
            norm_layer=layer_name(first.norm1),
            norm_eps=float(first.norm1.eps),
        )
        held = sum(p.numel() for p in parts.parameters())
        _need("parameters", f"{config.params()} for these widths", held == config.params(), held)
        return config

    def build(self) -> nn.Module:
        """A new model of this architecture, freshly initialised."""
        passed = set(asdict(self)) - {"dims", "scales", "pruned", "norm_eps"}
        arguments = {name: getattr(self, name) for name in passed}
        arguments["norm_layer"] = partial(layer_class(self.norm_layer), eps=self.norm_eps)
        if self.pruned:
            return PrunedSwinTransformer(self.dims, self.scales, **arguments)
        stages = self.dims.stages
        model: nn.Module = SwinTransformer(
            embed_dim=self.dims.embed_dims[0],
            depths=tuple(len(stage) for stage in stages),
            num_heads=tuple(stage[0].heads for stage in stages),
            head_dim=tuple(stage[0].qk_dim for stage in stages),
            # Half a unit more, so that timm's int(width * ratio) cannot round below the true width.
            mlp_ratio=tuple((s[0].mlp + 0.5) / e for s, e in zip(stages, self.dims.embed_dims, strict=True)),
            **arguments,
        )
        return model

    def prune(self, dims: SwinDims) -> SwinConfig:
        """The same architecture with other widths, as our class; the softmax scales stay."""
        return replace(self, dims=dims, pruned=True)

    def grids(self) -> list[tuple[int, int]]:
        """Height and width in tokens of each stage."""
        found = [tuple(pixels // patch for pixels, patch in zip(self.img_size, self.patch_size, strict=True))]
        while len(found) < len(self.dims.stages):
            found.append(tuple((side + 1) // 2 for side in found[-1]))
        return [(grid[0], grid[1]) for grid in found]

    def params(self) -> int:
        """Number of parameters, in closed form."""
        widths = self.dims.embed_dims
        total = widths[0] * (self.in_chans * self.patch_size[0] * self.patch_size[1] + 1) + 2 * widths[0]
        for i, (width, blocks) in enumerate(zip(widths, self.dims.stages, strict=True)):
            if i:
                total += 4 * widths[i - 1] * (width + 2)
            rows, columns = self.window_size[i]
            for d in blocks:
                total += 4 * width + d.heads * (2 * rows - 1) * (2 * columns - 1)
                total += (width + int(self.qkv_bias)) * d.heads * (2 * d.qk_dim + d.v_dim)
                total += (d.heads * d.v_dim + 1) * width + (width + 1) * d.mlp + (d.mlp + 1) * width
        return total + 2 * widths[-1] + self.num_classes * (widths[-1] + 1)

    def macs(self, img_size: tuple[int, int] | None = None) -> int:
        """Multiply-accumulates of one image: matrix products and the patch convolution, nothing else.

        Attention runs over whole windows, tokens of padding included.
        """
        config = self if img_size is None else replace(self, img_size=img_size)
        widths, grids = self.dims.embed_dims, config.grids()
        total = (
            grids[0][0] * grids[0][1] * self.in_chans * self.patch_size[0] * self.patch_size[1] * widths[0]
        )
        for i, (width, blocks, grid) in enumerate(zip(widths, self.dims.stages, grids, strict=True)):
            tokens, window = grid[0] * grid[1], self.window_size[i]
            if i:
                total += tokens * 4 * widths[i - 1] * width
            area = window[0] * window[1]
            windows = (-(-grid[0] // window[0])) * (-(-grid[1] // window[1]))
            for d in blocks:
                total += windows * area * width * d.heads * 2 * (d.qk_dim + d.v_dim)
                total += windows * area * area * d.heads * (d.qk_dim + d.v_dim)
                total += 2 * tokens * width * d.mlp
        pooled = 1 if self.global_pool else grids[-1][0] * grids[-1][1]
        return total + pooled * self.num_classes * widths[-1]

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold."""
        return {**asdict(self), "dims": self.dims.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SwinConfig:
        """The inverse of :meth:`to_dict`, also after a trip through JSON."""
        data = dict(data)
        data["dims"] = SwinDims.from_dict(data["dims"])
        for name in ("scales", "img_size", "patch_size"):
            data[name] = tuple(data[name])
        data["window_size"] = tuple(tuple(window) for window in data["window_size"])
        return cls(**data)
