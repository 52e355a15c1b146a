"""timm Vision Transformers whose blocks have their own head, query/key, value and MLP widths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn


@dataclass(frozen=True)
class BlockDims:
    """Widths of one block: heads, width of a head's query and key, of its value, MLP hidden width."""

    heads: int
    qk_dim: int
    v_dim: int
    mlp: int

    def one_fewer(self) -> Iterator[BlockDims]:
        """These widths with one head, query/key dim, value dim, MLP unit fewer, in turn."""
        for name in ("heads", "qk_dim", "v_dim", "mlp"):
            yield replace(self, **{name: getattr(self, name) - 1})


@dataclass(frozen=True)
class ViTDims:
    """Width of the residual stream and the widths of each block."""

    embed_dim: int
    blocks: tuple[BlockDims, ...]

    @property
    def embed_dims(self) -> tuple[int, ...]:
        """The width of the residual stream, as the one stage there is."""
        return (self.embed_dim,)

    def one_fewer(self) -> Iterator[ViTDims]:
        """These widths with one unit fewer in each structure in turn: the stream, then block by block."""
        yield replace(self, embed_dim=self.embed_dim - 1)
        for i, block in enumerate(self.blocks):
            for smaller in block.one_fewer():
                yield replace(self, blocks=(*self.blocks[:i], smaller, *self.blocks[i + 1 :]))

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold."""
        return {
            "embed_dim": self.embed_dim,
            "blocks": [asdict(block) for block in self.blocks],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ViTDims:
        """The inverse of :meth:`to_dict`."""
        return cls(data["embed_dim"], tuple(BlockDims(**block) for block in data["blocks"]))


def two_width_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    attn_mask: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    """torch's fused attention of ``q`` and ``k`` [B, H, N, QK] with ``v`` [B, H, N, V]; returns [B, H, N, V].

    torch's fused kernels want one width; with two, attention falls back to a path up to 2.7 times slower on
    the CPU. Zeros leave q k^T as it is and add columns to v that are dropped again.
    """
    width = v.shape[-1]
    missing = width - q.shape[-1]
    if missing > 0:
        q, k = F.pad(q, (0, missing)), F.pad(k, (0, missing))
    elif missing < 0:
        v = F.pad(v, (0, -missing))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal, scale=scale
    )[..., :width]


class PrunedAttention(nn.Module):
    r"""Multi-head attention with separate query/key and value widths and a stored softmax scale.

    :math:`\text{proj}(\text{softmax}(s\,q k^\top)\,v)` with one fused ``qkv`` layer whose rows are
    ``[heads * qk_dim, heads * qk_dim, heads * v_dim]``. The parameter names are those of
    :class:`timm.layers.Attention`, and with ``qk_dim == v_dim`` so are the shapes.

    Args:
        dim: width E of the residual stream.
        dims: widths of the block.
        scale: softmax scale. After pruning this is the scale of the dense model, with which the remaining
            weights were trained, not ``qk_dim ** -0.5``.
        qkv_bias: whether ``qkv`` has a bias.
        proj_bias: whether ``proj`` has a bias.
        attn_drop: dropout rate of the attention weights.
        proj_drop: dropout rate of the output.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Source:
        NViT (Yang et al., CVPR 2023), section 3.1: head-aligned QK and V widths.
    """

    def __init__(
        self,
        dim: int,
        dims: BlockDims,
        scale: float,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.qk_dim, self.v_dim = dims.heads, dims.qk_dim, dims.v_dim
        self.scale = scale
        qk, v = dims.heads * dims.qk_dim, dims.heads * dims.v_dim
        self.splits = [qk, qk, v]
        self.qkv = nn.Linear(dim, 2 * qk + v, bias=qkv_bias, device=device, dtype=dtype)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(v, dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend over ``x`` [B, N, E]; returns [B, N, E]."""
        batch, tokens, _ = x.shape
        q, k, v = (
            part.view(batch, tokens, self.num_heads, -1).transpose(1, 2)  # [B, H, N, QK or V]
            for part in self.qkv(x).split(self.splits, dim=-1)
        )
        dropout = self.attn_drop.p if self.training else 0.0
        x = two_width_attention(q, k, v, self.scale, attn_mask, dropout, is_causal)
        x = x.transpose(1, 2).reshape(batch, tokens, -1)  # [B, N, H * V]
        out: Tensor = self.proj_drop(self.proj(x))
        return out

    def extra_repr(self) -> str:
        """Widths and scale for ``print``."""
        return f"num_heads={self.num_heads}, qk_dim={self.qk_dim}, v_dim={self.v_dim}, scale={self.scale:.6g}"


class PrunedBlock(Block):  # type: ignore[misc]
    """A timm ``Block`` with widths of its own; forward and parameter names are timm's."""

    def __init__(
        self,
        dims: BlockDims,
        scale: float,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        act_layer: type[nn.Module] = nn.GELU,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        # timm builds the norms, layer scales and drop paths; its attention and MLP are replaced below.
        super().__init__(dim, num_heads=1, mlp_ratio=0.0, device=device, dtype=dtype, **kwargs)
        self.attn = PrunedAttention(
            dim, dims, scale, qkv_bias, proj_bias, attn_drop, proj_drop, device, dtype
        )
        self.mlp = Mlp(
            dim,
            dims.mlp,
            act_layer=act_layer,
            bias=proj_bias,
            drop=proj_drop,
            device=device,
            dtype=dtype,
        )


def _arguments(dims: ViTDims, scales: Sequence[float]) -> dict[str, Any]:
    remaining = iter(zip(dims.blocks, scales, strict=True))  # timm makes the blocks in order

    def block_fn(**kwargs: Any) -> PrunedBlock:
        return PrunedBlock(*next(remaining), **kwargs)

    return {
        "embed_dim": dims.embed_dim,
        "depth": len(dims.blocks),
        "num_heads": 1,
        "block_fn": block_fn,
    }


class PrunedVisionTransformer(VisionTransformer):  # type: ignore[misc]
    """A timm ``VisionTransformer`` with per-block widths.

    Everything but the attention and MLP widths is timm's own code, so ``forward_features``,
    ``forward_head``, ``reset_classifier``, ``get_classifier`` and ``no_weight_decay`` behave as usual, and
    the state-dict keys are timm's.

    Args:
        dims: width of the residual stream and widths of each block.
        scales: softmax scale of each block.
        **kwargs: further arguments of :class:`timm.models.VisionTransformer`.
    """

    def __init__(self, dims: ViTDims, scales: Sequence[float], **kwargs: Any) -> None:
        super().__init__(**_arguments(dims, scales), **kwargs)


class PrunedVisionTransformerDistilled(VisionTransformerDistilled):  # type: ignore[misc]
    """A timm ``VisionTransformerDistilled`` with per-block widths; see :class:`PrunedVisionTransformer`."""

    def __init__(self, dims: ViTDims, scales: Sequence[float], **kwargs: Any) -> None:
        super().__init__(**_arguments(dims, scales), **kwargs)
