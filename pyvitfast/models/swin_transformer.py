"""timm Swin Transformers whose stages and blocks have their own widths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from timm.layers import ClassifierHead, Mlp
from timm.models.swin_transformer import PatchMerging, SwinTransformer, WindowAttention
from torch import Tensor, nn

from pyvitfast.models.vision_transformer import BlockDims, two_width_attention


@dataclass(frozen=True)
class SwinDims:
    """Width of the residual stream of each stage, and the widths of each stage's blocks."""

    embed_dims: tuple[int, ...]
    stages: tuple[tuple[BlockDims, ...], ...]

    @property
    def blocks(self) -> tuple[BlockDims, ...]:
        """The blocks of all stages in order."""
        return tuple(block for stage in self.stages for block in stage)

    def one_fewer(self) -> Iterator[SwinDims]:
        """These widths with one unit fewer in each structure in turn: stages, then block by block."""
        for i, embed in enumerate(self.embed_dims):
            yield replace(self, embed_dims=(*self.embed_dims[:i], embed - 1, *self.embed_dims[i + 1 :]))
        for s, stage in enumerate(self.stages):
            for i, block in enumerate(stage):
                for smaller in block.one_fewer():
                    changed = (*stage[:i], smaller, *stage[i + 1 :])
                    yield replace(self, stages=(*self.stages[:s], changed, *self.stages[s + 1 :]))

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold."""
        return {
            "embed_dims": list(self.embed_dims),
            "stages": [[asdict(block) for block in stage] for stage in self.stages],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SwinDims:
        """The inverse of :meth:`to_dict`."""
        stages = tuple(tuple(BlockDims(**block) for block in stage) for stage in data["stages"])
        return cls(tuple(data["embed_dims"]), stages)


class PrunedWindowAttention(WindowAttention):  # type: ignore[misc]
    """timm's window attention with separate query/key and value widths and a stored softmax scale.

    Parameter names are timm's. ``qkv`` has rows ``[heads * qk_dim, heads * qk_dim, heads * v_dim]``.

    Args:
        dim: width E of the residual stream.
        dims: widths of the block.
        scale: softmax scale; after pruning that of the dense model.
        window_size: height and width of a window in tokens.
        qkv_bias: whether ``qkv`` has a bias.
        attn_drop: dropout rate of the attention weights.
        proj_drop: dropout rate of the output.

    Source:
        NViT (Yang et al., CVPR 2023), section 3.1, on Swin (Liu et al., ICCV 2021), eq. 4.
    """

    def __init__(
        self,
        dim: int,
        dims: BlockDims,
        scale: float,
        window_size: tuple[int, int],
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(
            dim, dims.heads, 1, window_size, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop
        )
        self.qk_dim, self.v_dim, self.scale = dims.qk_dim, dims.v_dim, scale
        qk, v = dims.heads * dims.qk_dim, dims.heads * dims.v_dim
        self.splits = [qk, qk, v]
        self.qkv = nn.Linear(dim, 2 * qk + v, bias=qkv_bias)
        self.proj = nn.Linear(v, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within windows: ``x`` [B * W, N, E], ``mask`` [W, N, N] or None; returns [B * W, N, E]."""
        windows, tokens, _ = x.shape
        bias = self._get_rel_pos_bias()  # [1, H, N, N]
        heads, groups = self.num_heads, 1
        if mask is not None:
            # Windows of an image become heads, so that the mask is broadcast over images, not copied.
            groups = mask.shape[0]
            bias = (bias + mask.unsqueeze(1)).reshape(1, groups * heads, tokens, tokens)
        q, k, v = (
            part.view(windows, tokens, heads, -1)
            .transpose(1, 2)
            .reshape(windows // groups, groups * heads, tokens, -1)
            for part in self.qkv(x).split(self.splits, dim=-1)
        )
        dropout = self.attn_drop.p if self.training else 0.0
        x = two_width_attention(q, k, v, self.scale, bias.to(q.dtype), dropout)
        x = x.reshape(windows, heads, tokens, self.v_dim).transpose(1, 2).reshape(windows, tokens, -1)
        out: Tensor = self.proj_drop(self.proj(x))
        return out

    def extra_repr(self) -> str:
        """Widths and scale for ``print``."""
        return f"num_heads={self.num_heads}, qk_dim={self.qk_dim}, v_dim={self.v_dim}, scale={self.scale:.6g}"


class PrunedSwinTransformer(SwinTransformer):  # type: ignore[misc]
    """A timm ``SwinTransformer`` with widths of its own in each stage and block.

    Windows, shifts, masks and all forward methods are timm's; so are the state-dict keys.

    Args:
        dims: widths.
        scales: softmax scale of each block.
        norm_layer: makes a norm for a width.
        **kwargs: further arguments of :class:`timm.models.SwinTransformer`.

    Raises:
        ValueError: not one scale for each block.
    """

    def __init__(self, dims: SwinDims, scales: Sequence[float], norm_layer: Any, **kwargs: Any) -> None:
        depths = tuple(len(stage) for stage in dims.stages)
        if len(scales) != sum(depths):
            raise ValueError(
                f"PrunedSwinTransformer: `scales` must hold {sum(depths)} values, one for each block, "
                f"got {len(scales)}."
            )
        # timm lays out windows and masks; everything with a width is replaced below.
        super().__init__(
            embed_dim=1,
            depths=depths,
            num_heads=(1,) * len(depths),
            head_dim=1,
            norm_layer=norm_layer,
            **kwargs,
        )
        remaining = iter(scales)
        embed = self.patch_embed
        embed.proj = nn.Conv2d(
            embed.proj.in_channels, dims.embed_dims[0], embed.patch_size, stride=embed.patch_size
        )
        embed.norm = norm_layer(dims.embed_dims[0])
        previous = dims.embed_dims[0]
        for stage, info, width, blocks in zip(
            self.layers, self.feature_info, dims.embed_dims, dims.stages, strict=True
        ):
            stage.dim, info["num_chs"] = previous, width
            if isinstance(stage.downsample, PatchMerging):
                stage.downsample = PatchMerging(previous, width, norm_layer=norm_layer)
            for block, own in zip(stage.blocks, blocks, strict=True):
                block.dim, block.mlp_ratio = width, own.mlp / width
                block.norm1, block.norm2 = norm_layer(width), norm_layer(width)
                block.attn = PrunedWindowAttention(
                    width,
                    own,
                    next(remaining),
                    block.window_size,
                    qkv_bias=kwargs.get("qkv_bias", True),
                    attn_drop=kwargs.get("attn_drop_rate", 0.0),
                    proj_drop=kwargs.get("proj_drop_rate", 0.0),
                )
                block.mlp = Mlp(width, own.mlp, drop=kwargs.get("proj_drop_rate", 0.0))
            previous = width
        self.embed_dim, self.num_features = dims.embed_dims[0], previous
        self.norm = norm_layer(previous)
        self.head = ClassifierHead(
            previous,
            self.num_classes,
            pool_type=self.global_pool,
            drop_rate=kwargs.get("drop_rate", 0.0),
            input_fmt=self.output_fmt,
        )
        self.head_hidden_size = previous
        self.init_weights()
