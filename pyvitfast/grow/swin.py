"""What a Swin Transformer is made of, as growth sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from pyvitfast.grow.layout import Parameter, Stage, check_parameters, need, norm_parameters
from pyvitfast.models.swin_config import SwinConfig


@dataclass(frozen=True)
class SwinLayout:
    """The parts and widths of a timm Swin Transformer; a tuple has an entry for each stage.

    Args:
        stages: widths and depths.
        patch_size: patch height and width in pixels.
        img_size: image height and width in pixels.
        window_size: window height and width in tokens.
        always_partition: windows even where the grid is smaller.
        in_chans: image channels.
        num_classes: classes; 0 without a head.
        qkv_bias: q, k and v have biases.
        global_pool: how tokens become one vector, in timm's words.
        eps: epsilon of all LayerNorms.
    """

    stages: tuple[Stage, ...]
    patch_size: tuple[int, int]
    img_size: tuple[int, int]
    window_size: tuple[tuple[int, int], ...]
    always_partition: bool
    in_chans: int
    num_classes: int
    qkv_bias: bool
    global_pool: str
    eps: float = field(compare=False)

    proj_bias = True
    layer_scale = False
    qk_norm = False
    final_norm = "norm"
    writing_norm = "patch_embed.norm"
    alternating = True

    @classmethod
    def of(cls, model: nn.Module) -> SwinLayout:
        """Read a model.

        Raises:
            TypeError: not a timm ``SwinTransformer``.
            NotImplementedError: a part that growth does not know, pruned blocks, or tied weights; named.
        """
        config = SwinConfig.from_model(model)
        need("blocks", "of one width in each stage", not config.pruned, "a pruned model")
        stages = tuple(
            Stage(f"layers.{s}.blocks", f".{s}", width, len(blocks), d.heads, d.qk_dim, d.mlp)
            for s, (width, blocks) in enumerate(zip(config.dims.embed_dims, config.dims.stages, strict=True))
            for d in blocks[:1]
        )
        scales = iter(config.scales)
        for stage in stages:
            for i in range(stage.depth):
                scale, usual = next(scales), stage.head_dim**-0.5
                need(f"{stage.prefix}.{i}.attn.scale", f"{usual}", abs(scale - usual) <= 1e-9, scale)
        layout = cls(
            stages=stages,
            patch_size=config.patch_size,
            img_size=config.img_size,
            window_size=config.window_size,
            always_partition=config.always_partition,
            in_chans=config.in_chans,
            num_classes=config.num_classes,
            qkv_bias=config.qkv_bias,
            global_pool=config.global_pool,
            eps=config.norm_eps,
        )
        check_parameters(model, layout.parameters())
        return layout

    @property
    def head_names(self) -> tuple[str, ...]:
        """The classifier."""
        return ("head.fc",) if self.num_classes else ()

    def resized(self, state: Mapping[str, Tensor], img_size: tuple[int, int]) -> dict[str, Tensor]:
        """A state dict for another image size: the same, since positions are relative."""
        return dict(state)

    def parameters(self) -> dict[str, Parameter]:
        """Every entry of the state dict, by name."""
        first, last = self.stages[0], self.stages[-1]
        unit = (0, first.axis("embed"))
        found = {
            "patch_embed.proj.weight": Parameter(
                (first.dim, self.in_chans, *self.patch_size), "weight", unit
            ),
            "patch_embed.proj.bias": Parameter((first.dim,), "bias", unit),
            **dict(norm_parameters("patch_embed.norm", first.dim, first.axis("embed"))),
        }
        for s, (stage, window) in enumerate(zip(self.stages, self.window_size, strict=True)):
            if s:
                before = self.stages[s - 1]
                name, merge = f"layers.{s}.downsample", before.axis("merge")
                found |= norm_parameters(f"{name}.norm", 4 * before.dim, merge)
                found[f"{name}.reduction.weight"] = Parameter(
                    (stage.dim, 4 * before.dim), "weight", (0, stage.axis("embed")), merge
                )
            places = (2 * window[0] - 1) * (2 * window[1] - 1)
            for i in range(stage.depth):
                found |= stage.block(i, self.qkv_bias, self.proj_bias, self.layer_scale, self.qk_norm)
                found[f"{stage.prefix}.{i}.attn.relative_position_bias_table"] = Parameter(
                    (places, stage.heads), "table", (1, stage.axis("heads"))
                )
        found |= norm_parameters("norm", last.dim, last.axis("embed"))
        if self.num_classes:
            shape = (self.num_classes, last.dim)
            found["head.fc.weight"] = Parameter(shape, "weight", None, last.axis("embed"))
            found["head.fc.bias"] = Parameter((self.num_classes,), "bias")
        return found
