"""The architecture of a Vision Transformer as plain data: read from a model, rebuilt without it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from timm.layers import DropPath, LayerScale, Mlp, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn

from pyvitfast.models.modules import layer_class, layer_name, plain_class, unwrap
from pyvitfast.models.vision_transformer import (
    BlockDims,
    PrunedAttention,
    PrunedBlock,
    PrunedVisionTransformer,
    PrunedVisionTransformerDistilled,
    ViTDims,
)


def _refuse(model: nn.Module, where: str, rule: str, got: object) -> NotImplementedError:
    return NotImplementedError(
        f"ViTConfig.from_model: {type(model).__name__}: {where}: {rule}, got {got}. Supported are timm's "
        "VisionTransformer and VisionTransformerDistilled with plain blocks."
    )


def _block_dims(model: nn.Module, name: str, block: Any) -> tuple[BlockDims, float]:
    if plain_class(block) not in (Block, PrunedBlock):
        raise _refuse(model, name, "must be a timm Block", type(block).__name__)
    attn, mlp = block.attn, block.mlp
    if type(attn) not in (Attention, PrunedAttention):
        raise _refuse(model, f"{name}.attn", "must be timm's Attention", type(attn).__name__)
    for part in ("q_norm", "k_norm", "norm"):
        if not isinstance(getattr(attn, part, nn.Identity()), nn.Identity):
            raise _refuse(
                model,
                f"{name}.attn.{part}",
                "must be Identity",
                type(getattr(attn, part)).__name__,
            )
    if getattr(attn, "gate", None) is not None:
        raise _refuse(model, f"{name}.attn.gate", "must be None", "gated attention")
    if type(mlp) is not Mlp or not isinstance(mlp.norm, nn.Identity):
        raise _refuse(
            model,
            f"{name}.mlp",
            "must be timm's Mlp without a norm",
            type(mlp).__name__,
        )
    if getattr(mlp.act, "approximate", "none") != "none":
        raise _refuse(model, f"{name}.mlp.act", "must be a class without arguments", repr(mlp.act))
    if isinstance(attn, PrunedAttention):
        dims = BlockDims(attn.num_heads, attn.qk_dim, attn.v_dim, mlp.fc1.out_features)
    else:
        dims = BlockDims(attn.num_heads, attn.head_dim, attn.head_dim, mlp.fc1.out_features)
    return dims, float(attn.scale)


@dataclass(frozen=True)
class ViTConfig:
    """Everything needed to build a timm or pruned Vision Transformer; field names are timm's arguments.

    Args:
        dims: width of the residual stream, widths of each block.
        scales: softmax scale of each block.
        pruned: build our classes with per-block widths rather than timm's own.
        distilled: timm's ``VisionTransformerDistilled``.
        img_size: image height and width in pixels.
        patch_size: patch height and width in pixels.
        act_layer: qualified name of the MLP activation, from ``torch.nn`` or ``timm.layers``.
        norm_layer: qualified name of the norm, from ``torch.nn`` or ``timm.layers``.
        norm_eps: epsilon of all norms.

    The other fields are passed to timm as they are.
    """

    dims: ViTDims
    scales: tuple[float, ...]
    pruned: bool
    distilled: bool
    img_size: tuple[int, int]
    patch_size: tuple[int, int]
    in_chans: int
    num_classes: int
    global_pool: str
    qkv_bias: bool
    proj_bias: bool
    init_values: float | None
    class_token: bool
    pos_embed: str
    no_embed_class: bool
    reg_tokens: int
    pre_norm: bool
    final_norm: bool
    fc_norm: bool
    pool_include_prefix: bool
    dynamic_img_size: bool
    dynamic_img_pad: bool
    drop_rate: float
    pos_drop_rate: float
    patch_drop_rate: float
    proj_drop_rate: float
    attn_drop_rate: float
    drop_path_rate: float
    act_layer: str
    norm_layer: str
    norm_eps: float

    @classmethod
    def from_model(cls, model: nn.Module, added: int = 0) -> ViTConfig:
        """Read the architecture from a model that has ``added`` parameters besides it.

        Raises:
            TypeError: the model is not a timm Vision Transformer.
            NotImplementedError: it has a part that we cannot describe; the message names it.
        """
        model = unwrap(model)
        if not isinstance(model, VisionTransformer):
            raise TypeError(
                "ViTConfig.from_model: `model` must be a timm VisionTransformer or its distilled "
                f"twin; no supported attention was found in {type(model).__module__}.{type(model).__name__}."
            )
        embed = model.patch_embed
        if type(embed) is not PatchEmbed or not isinstance(embed.norm, nn.Identity):
            raise _refuse(
                model,
                "patch_embed",
                "must be timm's PatchEmbed without a norm",
                type(embed).__name__,
            )
        if model.attn_pool is not None:
            raise _refuse(model, "attn_pool", "must be None", type(model.attn_pool).__name__)
        if embed.img_size is None:
            raise _refuse(model, "patch_embed.img_size", "must be set", None)
        blocks = [_block_dims(model, f"blocks.{i}", b) for i, b in enumerate(model.blocks)]
        if not blocks:
            raise _refuse(model, "blocks", "must hold at least one block", 0)
        first, last = model.blocks[0], model.blocks[-1]
        norms = {
            n: m
            for n, m in model.named_modules()
            if n.rpartition(".")[2] in ("norm_pre", "norm", "fc_norm", "norm1", "norm2")
            and not isinstance(m, nn.Identity)
        }
        for name, norm in norms.items():
            if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
                raise _refuse(
                    model,
                    name,
                    "must be a LayerNorm with weight and bias",
                    type(norm).__name__,
                )
            if norm.eps != first.norm1.eps or type(norm) is not type(first.norm1):
                raise _refuse(model, name, "must equal blocks.0.norm1 in class and eps", norm)
        scale = first.ls1 if isinstance(first.ls1, LayerScale) else None
        path = last.drop_path2
        config = cls(
            dims=ViTDims(model.embed_dim, tuple(d for d, _ in blocks)),
            scales=tuple(s for _, s in blocks),
            pruned=any(isinstance(b, PrunedBlock) for b in model.blocks),
            distilled=isinstance(model, VisionTransformerDistilled),
            img_size=tuple(embed.img_size),
            patch_size=tuple(embed.patch_size),
            in_chans=embed.proj.in_channels,
            num_classes=model.num_classes,
            global_pool=model.global_pool,
            qkv_bias=first.attn.qkv.bias is not None,
            proj_bias=first.attn.proj.bias is not None,
            init_values=None if scale is None else float(scale.init_values),
            class_token=model.cls_token is not None,
            pos_embed="none" if model.pos_embed is None else "learn",
            no_embed_class=model.no_embed_class,
            reg_tokens=model.num_reg_tokens,
            pre_norm="norm_pre" in norms,
            final_norm="norm" in norms or "fc_norm" in norms,
            fc_norm="fc_norm" in norms,
            pool_include_prefix=model.pool_include_prefix,
            dynamic_img_size=model.dynamic_img_size,
            dynamic_img_pad=embed.dynamic_img_pad,
            drop_rate=float(model.head_drop.p),
            pos_drop_rate=float(model.pos_drop.p),
            patch_drop_rate=float(getattr(model.patch_drop, "prob", 0.0)),
            proj_drop_rate=float(first.attn.proj_drop.p),
            attn_drop_rate=float(first.attn.attn_drop.p),
            drop_path_rate=float(path.drop_prob) if isinstance(path, DropPath) else 0.0,
            act_layer=layer_name(first.mlp.act),
            norm_layer=layer_name(first.norm1),
            norm_eps=float(first.norm1.eps),
        )
        held = sum(p.numel() for p in model.parameters()) - added
        if held != config.params():
            raise _refuse(
                model,
                "parameters",
                f"a ViT of these widths has {config.params()}",
                f"{held} (added modules?)",
            )
        return config

    def build(self) -> nn.Module:
        """A new model of this architecture, freshly initialised."""
        passed = set(asdict(self)) - {
            "dims",
            "scales",
            "pruned",
            "distilled",
            "norm_eps",
        }
        arguments = {name: getattr(self, name) for name in passed}
        arguments["act_layer"] = layer_class(self.act_layer)
        arguments["norm_layer"] = partial(layer_class(self.norm_layer), eps=self.norm_eps)
        if self.distilled:
            del arguments["reg_tokens"], arguments["class_token"]
        if self.pruned:
            ours = PrunedVisionTransformerDistilled if self.distilled else PrunedVisionTransformer
            return ours(self.dims, self.scales, **arguments)
        width, block = self.dims.embed_dim, self.dims.blocks[0]
        # Half a unit more, so that timm's int(width * ratio) cannot round below the true width.
        arguments.update(
            embed_dim=width,
            depth=len(self.dims.blocks),
            num_heads=block.heads,
            mlp_ratio=(block.mlp + 0.5) / width,
        )
        model: nn.Module = (VisionTransformerDistilled if self.distilled else VisionTransformer)(**arguments)
        return model

    def prune(self, dims: ViTDims) -> ViTConfig:
        """The same architecture with other widths, as one of our classes; the softmax scales stay."""
        return replace(self, dims=dims, pruned=True)

    def tokens(self, img_size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Number of patches, and of patches with class, distillation and register tokens."""
        size = img_size or self.img_size
        patches = 1
        for pixels, patch in zip(size, self.patch_size, strict=True):
            patches *= -(-pixels // patch) if self.dynamic_img_pad else pixels // patch
        return patches, patches + int(self.class_token) + int(self.distilled) + self.reg_tokens

    def params(self) -> int:
        """Exact number of parameters."""
        width, bias = self.dims.embed_dim, int(self.proj_bias)
        patches, tokens = self.tokens()
        vectors = int(self.class_token) + int(self.distilled) + self.reg_tokens
        if self.pos_embed == "learn":
            vectors += patches if self.no_embed_class else tokens
        vectors += int(not self.pre_norm)  # patch embedding bias
        vectors += 2 * int(self.pre_norm) + 2 * int(self.final_norm)
        vectors += len(self.dims.blocks) * (4 + 2 * int(self.init_values is not None))
        total = width * (vectors + self.in_chans * self.patch_size[0] * self.patch_size[1])
        for d in self.dims.blocks:
            total += (width + int(self.qkv_bias)) * d.heads * (2 * d.qk_dim + d.v_dim)
            total += (d.heads * d.v_dim + bias) * width
            total += (width + bias) * d.mlp + (d.mlp + bias) * width
        return total + (1 + int(self.distilled)) * self.num_classes * (width + 1)

    def macs(self, img_size: tuple[int, int] | None = None) -> int:
        """Multiply-accumulates of one image: matrix products and the patch convolution, nothing else.

        Per block :math:`N E H (2 QK + 2 V) + N^2 H (QK + V) + 2 N E M` with N tokens.

        Source:
            NViT (Yang et al., CVPR 2023), section 4, where they are called FLOPs.
        """
        width = self.dims.embed_dim
        patches, tokens = self.tokens(img_size)
        total = patches * self.in_chans * self.patch_size[0] * self.patch_size[1] * width
        for d in self.dims.blocks:
            total += tokens * width * d.heads * 2 * (d.qk_dim + d.v_dim)
            total += tokens * tokens * d.heads * (d.qk_dim + d.v_dim)
            total += 2 * tokens * width * d.mlp
        pooled = 1 if self.global_pool else tokens
        return total + (1 + int(self.distilled)) * pooled * self.num_classes * width

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold."""
        return {**asdict(self), "dims": self.dims.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ViTConfig:
        """The inverse of :meth:`to_dict`, also after a trip through JSON."""
        data = dict(data)
        data["dims"] = ViTDims.from_dict(data["dims"])
        for name in ("scales", "img_size", "patch_size"):
            data[name] = tuple(data[name])
        return cls(**data)
