"""What a Vision Transformer is made of, as growth sees it, and its block weights as one tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from timm.layers import LayerScale, Mlp, PatchEmbed, resample_abs_pos_embed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from pyvitfast.models.modules import plain_class, unwrap


@dataclass(frozen=True)
class Parameter:
    """How one tensor takes part in growth.

    Args:
        shape: its shape.
        kind: ``weight``, ``bias``, ``norm_weight``, ``norm_bias``, ``gamma`` of a LayerScale, ``token`` (also
            position embeddings) or ``table`` (a row for each relative position).
        writes: dimension and axis of the units that this tensor produces; None where they do not grow.
        reads: axis of dimension 1, whose units are summed over; None without one.
    """

    shape: tuple[int, ...]
    kind: str
    writes: tuple[int, str] | None = None
    reads: str | None = None


@dataclass(frozen=True)
class Stage:
    """Blocks of one width; a ViT has one stage.

    Args:
        prefix: start of the blocks' names, such as ``blocks``.
        suffix: end of the names of its axes; empty in a ViT.
        dim: width D of the residual stream.
        depth: number of blocks.
        heads: heads of a block.
        head_dim: width of a head.
        hidden: hidden width of the MLP.
    """

    prefix: str
    suffix: str
    dim: int
    depth: int
    heads: int
    head_dim: int
    hidden: int

    def axis(self, name: str) -> str:
        """The name here of axis ``embed``, ``heads``, ``head_dim``, ``rows`` (head after head), ``qkv``,
        ``hidden`` or ``merge`` (four tokens side by side).
        """
        return name + self.suffix

    @property
    def ratio(self) -> int:
        """The whole number k of D x D pieces in ``mlp.fc1``.

        Raises:
            ValueError: the hidden width is no multiple of the width.
        """
        k, rest = divmod(self.hidden, self.dim)
        if rest or not k:
            raise ValueError(
                f"stack_vit: the hidden width must be a multiple of the width {self.dim}, so that fc1 and "
                f"fc2 cut into square pieces, got {self.hidden}. The rules of grow() need no pieces."
            )
        return k

    def vectors(self, qkv_bias: bool, proj_bias: bool, layer_scale: bool) -> tuple[tuple[str, int], ...]:
        """Vectors of width D of a block: the name within the block, and which piece."""
        names: list[tuple[str, int]] = []
        if qkv_bias:
            names += [("attn.qkv.bias", i) for i in range(3)]
        if proj_bias:
            names += [("attn.proj.bias", 0)]
            names += [("mlp.fc1.bias", i) for i in range(self.ratio)]
            names += [("mlp.fc2.bias", 0)]
        names += [(f"{norm}.{part}", 0) for norm in ("norm1", "norm2") for part in ("weight", "bias")]
        if layer_scale:
            names += [("ls1.gamma", 0), ("ls2.gamma", 0)]
        return tuple(names)

    def stacked(
        self, state: Mapping[str, Tensor], vectors: tuple[tuple[str, int], ...]
    ) -> tuple[Tensor, Tensor]:
        """Matrices [L, 2k + 4, D, D] and :meth:`vectors` [L, V, D] of its blocks, as in :class:`Stacked`."""
        d, k, matrices, rows = self.dim, self.ratio, [], []
        for i in range(self.depth):
            block = f"{self.prefix}.{i}"
            slots = (
                state[f"{block}.attn.qkv.weight"].reshape(3, d, d),
                state[f"{block}.attn.proj.weight"].reshape(1, d, d),
                state[f"{block}.mlp.fc1.weight"].reshape(k, d, d),
                state[f"{block}.mlp.fc2.weight"].reshape(d, k, d).permute(1, 0, 2),
            )
            matrices.append(torch.cat(slots))
            rows.append(torch.stack([state[f"{block}.{n}"].reshape(-1, d)[piece] for n, piece in vectors]))
        return torch.stack(matrices), torch.stack(rows)

    def block(
        self, index: int, qkv_bias: bool, proj_bias: bool, layer_scale: bool, qk_norm: bool
    ) -> Iterator[tuple[str, Parameter]]:
        """Names and parameters of one block."""
        d, rows, hidden = self.dim, self.heads * self.head_dim, self.hidden
        embed, name = self.axis("embed"), f"{self.prefix}.{index}"
        for norm in ("norm1", "norm2"):
            yield from norm_parameters(f"{name}.{norm}", d, embed)
        linears = (
            ("attn.qkv", 3 * rows, "qkv", d, "embed", qkv_bias),
            ("attn.proj", d, "embed", rows, "rows", proj_bias),
            ("mlp.fc1", hidden, "hidden", d, "embed", proj_bias),
            ("mlp.fc2", d, "embed", hidden, "hidden", proj_bias),
        )
        for layer, out, writes, inputs, reads, bias in linears:
            unit = (0, self.axis(writes))
            yield f"{name}.{layer}.weight", Parameter((out, inputs), "weight", unit, self.axis(reads))
            if bias:
                yield f"{name}.{layer}.bias", Parameter((out,), "bias", unit)
        if layer_scale:
            yield f"{name}.ls1.gamma", Parameter((d,), "gamma", (0, embed))
            yield f"{name}.ls2.gamma", Parameter((d,), "gamma", (0, embed))
        if qk_norm:
            for norm in ("q_norm", "k_norm"):
                yield from norm_parameters(f"{name}.attn.{norm}", self.head_dim, self.axis("head_dim"))


def norm_parameters(name: str, width: int, axis: str) -> Iterator[tuple[str, Parameter]]:
    """Weight and bias of a LayerNorm."""
    yield f"{name}.weight", Parameter((width,), "norm_weight", (0, axis))
    yield f"{name}.bias", Parameter((width,), "norm_bias", (0, axis))


def need(where: str, rule: str, good: bool, got: object) -> None:
    """Raise NotImplementedError unless ``good``."""
    if not good:
        raise NotImplementedError(
            f"grow: {where} must be {rule}, got {got}. Supported are timm's VisionTransformer, "
            "VisionTransformerDistilled and SwinTransformer with plain blocks."
        )


def check_parameters(model: nn.Module, expected: Mapping[str, Parameter]) -> None:
    """Raise NotImplementedError unless a model's state dict is exactly the parameters that are expected."""
    found = {key: tuple(t.shape) for key, t in model.state_dict().items()}
    for key in sorted({*found, *expected}):
        if key not in expected:
            raise NotImplementedError(
                f"grow: {key} of {type(model).__name__} is not a part that growth knows, and no tensor is "
                "skipped silently. Remove that part or undo quantisation, and grow first."
            )
        need(key, f"of shape {expected[key].shape}", key in found, "no such parameter")
        need(key, f"of shape {expected[key].shape}", found[key] == expected[key].shape, found[key])
    owners: dict[int, str] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        other = owners.setdefault(id(parameter), key)
        need(key, "a tensor of its own", other == key, f"one tied to {other}")


@dataclass(frozen=True)
class Layout:
    """The parts and widths of a timm ViT or DeiT.

    Args:
        dim: width D of the residual stream.
        depth: number of blocks L.
        heads: heads of a block.
        hidden: hidden width of the MLP.
        patch_size: patch height and width in pixels.
        img_size: image height and width in pixels.
        in_chans: image channels.
        num_classes: classes; 0 without a head.
        class_token: has a class token.
        distilled: has a distillation token and a second head.
        reg_tokens: number of register tokens.
        pos_embed: has learned position embeddings.
        no_embed_class: position embeddings are for patches only.
        qkv_bias: q, k and v have biases.
        proj_bias: attention output and MLP have biases.
        layer_scale: branches are scaled by a vector.
        qk_norm: queries and keys pass a LayerNorm.
        pre_norm: a LayerNorm stands before the blocks, and patches have no bias.
        final_norm: ``norm``, ``fc_norm`` or empty.
        global_pool: how tokens become one vector, in timm's words.
        pool_include_prefix: the pool takes class and register tokens too.
        act: the activation of the MLP.
        eps: epsilon of all LayerNorms.
    """

    dim: int
    depth: int
    heads: int
    hidden: int
    patch_size: tuple[int, int]
    img_size: tuple[int, int]
    in_chans: int
    num_classes: int
    class_token: bool
    distilled: bool
    reg_tokens: int
    pos_embed: bool
    no_embed_class: bool
    qkv_bias: bool
    proj_bias: bool
    layer_scale: bool
    qk_norm: bool
    pre_norm: bool
    final_norm: str
    global_pool: str
    pool_include_prefix: bool
    act: str
    eps: float = field(compare=False)

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        """Read a model.

        Raises:
            TypeError: not a timm ``VisionTransformer`` or ``VisionTransformerDistilled``.
            NotImplementedError: it has a part that growth does not know, or tied weights; named.
        """
        model = unwrap(model)
        if plain_class(model) not in (VisionTransformer, VisionTransformerDistilled):
            raise TypeError(
                "grow: the model must be a timm VisionTransformer, VisionTransformerDistilled or "
                f"SwinTransformer, got {type(model).__module__}.{type(model).__name__}. Pruned models have "
                "widths of their own in each block and do not grow."
            )
        parts: Any = model
        embed = parts.patch_embed
        need("patch_embed", "timm's PatchEmbed", plain_class(embed) is PatchEmbed, type(embed).__name__)
        need("patch_embed.img_size", "set", embed.img_size is not None, None)
        need("blocks", "at least one block", len(parts.blocks) > 0, 0)
        first = parts.blocks[0]
        for i, block in enumerate(parts.blocks):
            name, attn = f"blocks.{i}", block.attn
            need(name, "a timm Block", plain_class(block) is Block, type(block).__name__)
            need(f"{name}.attn", "timm's Attention", plain_class(attn) is Attention, type(attn).__name__)
            need(f"{name}.mlp", "timm's Mlp", plain_class(block.mlp) is Mlp, type(block.mlp).__name__)
            heads = first.attn.num_heads
            need(f"{name}.attn.num_heads", f"{heads} as in block 0", attn.num_heads == heads, attn.num_heads)
            usual = attn.head_dim**-0.5
            need(f"{name}.attn.scale", f"{usual}", abs(attn.scale - usual) <= 1e-9, attn.scale)
            act = repr(first.mlp.act)
            need(f"{name}.mlp.act", f"{act} as in block 0", repr(block.mlp.act) == act, repr(block.mlp.act))
        norms = ("norm_pre", "norm", "fc_norm", "norm1", "norm2", "q_norm", "k_norm")
        present = {n: m for n, m in model.named_modules() if n.rpartition(".")[2] in norms}
        present = {n: m for n, m in present.items() if not isinstance(m, nn.Identity)}
        for name, norm in present.items():
            affine = isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None
            need(name, "a LayerNorm with weight and bias", affine, type(norm).__name__)
            need(f"{name}.eps", f"{first.norm1.eps} as in block 0", norm.eps == first.norm1.eps, norm.eps)
        layout = cls(
            dim=parts.embed_dim,
            depth=len(parts.blocks),
            heads=first.attn.num_heads,
            hidden=first.mlp.fc1.out_features,
            patch_size=tuple(embed.patch_size),
            img_size=tuple(embed.img_size),
            in_chans=embed.proj.in_channels,
            num_classes=parts.num_classes,
            class_token=parts.cls_token is not None,
            distilled=isinstance(model, VisionTransformerDistilled),
            reg_tokens=parts.num_reg_tokens,
            pos_embed=parts.pos_embed is not None,
            no_embed_class=parts.no_embed_class,
            qkv_bias=first.attn.qkv.bias is not None,
            proj_bias=first.attn.proj.bias is not None,
            layer_scale=isinstance(first.ls1, LayerScale),
            qk_norm="blocks.0.attn.q_norm" in present,
            pre_norm="norm_pre" in present,
            final_norm="norm" if "norm" in present else "fc_norm" if "fc_norm" in present else "",
            global_pool=parts.global_pool,
            pool_include_prefix=parts.pool_include_prefix,
            act=repr(first.mlp.act),
            eps=float(first.norm1.eps),
        )
        check_parameters(model, layout.parameters())
        return layout

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.dim // self.heads

    @property
    def mlp_ratio(self) -> float:
        """Hidden width of the MLP by the width of the residual stream."""
        return self.hidden / self.dim

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        (height, width), (rows, columns) = self.img_size, self.patch_size
        return height // rows, width // columns

    def resized(self, state: Mapping[str, Tensor], img_size: tuple[int, int]) -> dict[str, Tensor]:
        """A state dict whose position embeddings are those of another image size, interpolated by timm."""
        grid = replace(self, img_size=img_size).grid
        if not self.pos_embed or grid == self.grid:
            return dict(state)
        positions = resample_abs_pos_embed(
            state["pos_embed"], list(grid), list(self.grid), num_prefix_tokens=self.prefix_tokens
        )
        return {**state, "pos_embed": positions}

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches that have a position embedding."""
        if self.no_embed_class and not self.distilled:
            return 0
        return int(self.class_token) + int(self.distilled) + self.reg_tokens

    @property
    def writing_norm(self) -> str:
        """The LayerNorm whose output starts the residual stream; empty if a convolution's does."""
        return "norm_pre" if self.pre_norm else ""

    @property
    def alternating(self) -> bool:
        """Whether every other block differs in what has no weights."""
        return False

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The one stage."""
        stage = Stage("blocks", "", self.dim, self.depth, self.heads, self.head_dim, self.hidden)
        return (stage,)

    def parameters(self) -> dict[str, Parameter]:
        """Every entry of the state dict, by name."""
        d, unit = self.dim, (0, "embed")
        found: dict[str, Parameter] = {}
        for name, tokens in (
            ("cls_token", int(self.class_token)),
            ("dist_token", int(self.distilled)),
            ("reg_token", self.reg_tokens),
            ("pos_embed", self.grid[0] * self.grid[1] + self.prefix_tokens if self.pos_embed else 0),
        ):
            if tokens:
                found[name] = Parameter((1, tokens, d), "token", (2, "embed"))
        found["patch_embed.proj.weight"] = Parameter((d, self.in_chans, *self.patch_size), "weight", unit)
        if self.pre_norm:
            found |= norm_parameters("norm_pre", d, "embed")
        else:
            found["patch_embed.proj.bias"] = Parameter((d,), "bias", unit)
        for i in range(self.depth):
            found |= self.stages[0].block(i, self.qkv_bias, self.proj_bias, self.layer_scale, self.qk_norm)
        if self.final_norm:
            found |= norm_parameters(self.final_norm, d, "embed")
        for name in self.head_names:
            found[f"{name}.weight"] = Parameter((self.num_classes, d), "weight", None, "embed")
            found[f"{name}.bias"] = Parameter((self.num_classes,), "bias")
        return found

    @property
    def head_names(self) -> tuple[str, ...]:
        """The classifiers."""
        if not self.num_classes:
            return ()
        return ("head", "head_dist") if self.distilled else ("head",)

    @property
    def ratio(self) -> int:
        """The whole number k of D x D pieces in ``mlp.fc1``.

        Raises:
            ValueError: the hidden width is no multiple of the width.
        """
        return self.stages[0].ratio

    @property
    def vectors(self) -> tuple[tuple[str, int], ...]:
        """Vectors of a block in the order of :class:`Stacked`: the name within the block, and which piece."""
        return self.stages[0].vectors(self.qkv_bias, self.proj_bias, self.layer_scale)


@dataclass(frozen=True, eq=False)
class Stacked:
    """A ViT's weights as two tensors and the rest; k is the MLP ratio.

    Args:
        matrices: [L, B, D, D] with B = 2k + 4: q, k, v, attention output, k row blocks of fc1, k column
            blocks of fc2; each matrix is [out, in].
        vectors: [L, V, D], in the order of :attr:`Layout.vectors`; a bias that the model lacks is not there.
        others: what is outside the blocks, and the norms of queries and keys, by name.
    """

    matrices: Tensor
    vectors: Tensor
    others: dict[str, Tensor]


def _check_keys(function: str, found: Mapping[str, Tensor], expected: Mapping[str, Parameter]) -> None:
    for key in sorted({*found, *expected}):
        shape = tuple(found[key].shape) if key in found else None
        rule = f"have shape {expected[key].shape}" if key in expected else "not be there"
        if key not in expected or shape != expected[key].shape:
            raise ValueError(
                f"{function}: {key} must {rule}, got {shape or 'none'}. Read the layout from the model that "
                "the state dict is of: Layout.of(model)."
            )


def stack_vit(state: Mapping[str, Tensor], layout: Layout) -> Stacked:
    """Put the block matrices of a ViT into one tensor.

    Args:
        state: state dict of a model with this layout.
        layout: from :meth:`Layout.of`.

    Returns:
        New tensors in the dtype of ``state``; nothing shares memory with it.

    Raises:
        ValueError: hidden width no multiple of the width, or keys or shapes that do not fit the layout.

    Source:
        Mango (Pan et al., NeurIPS 2023) concatenates a transformer's matrices into one tensor of four modes.
        The order of the slots, the memory order [layer, slot, out, in] and the vectors are our choice.
    """
    _check_keys("stack_vit", state, layout.parameters())
    others = {key: t.clone() for key, t in state.items() if _outside(key, layout)}
    matrices, vectors = layout.stages[0].stacked(state, layout.vectors)
    return Stacked(matrices, vectors, others)


def _outside(key: str, layout: Layout) -> bool:
    if not key.startswith("blocks."):
        return True
    return layout.qk_norm and key.split(".")[3] in ("q_norm", "k_norm")


def unstack_vit(stacked: Stacked, layout: Layout) -> dict[str, Tensor]:
    """The state dict of what :func:`stack_vit` stacked.

    Views where the memory order allows, and differentiable, so that ``torch.func.functional_call`` passes
    gradients on to ``matrices``, ``vectors`` and ``others``.

    Raises:
        ValueError: shapes or names that do not fit the layout.
    """
    d, k = layout.dim, layout.ratio
    for name, tensor, shape in (
        ("matrices", stacked.matrices, (layout.depth, 2 * k + 4, d, d)),
        ("vectors", stacked.vectors, (layout.depth, len(layout.vectors), d)),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"unstack_vit: `{name}` must have shape {shape} for this layout, got {tuple(tensor.shape)}. "
                "Pass the layout of the model that these are for."
            )
    expected = {key: p for key, p in layout.parameters().items() if _outside(key, layout)}
    _check_keys("unstack_vit", stacked.others, expected)
    state = dict(stacked.others)
    starts: dict[str, list[int]] = {}
    for place, (name, _) in enumerate(layout.vectors):
        starts.setdefault(name, []).append(place)
    for i in range(layout.depth):
        block, m = f"blocks.{i}", stacked.matrices[i]
        state[f"{block}.attn.qkv.weight"] = m[:3].reshape(3 * d, d)
        state[f"{block}.attn.proj.weight"] = m[3]
        state[f"{block}.mlp.fc1.weight"] = m[4 : 4 + k].reshape(k * d, d)
        state[f"{block}.mlp.fc2.weight"] = m[4 + k :].permute(1, 0, 2).reshape(d, k * d)
        for name, places in starts.items():
            state[f"{block}.{name}"] = stacked.vectors[i, places[0] : places[-1] + 1].reshape(-1)
    return state
