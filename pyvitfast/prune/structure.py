"""Which weights belong to which structural unit of a Vision Transformer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pyvitfast.models.architecture import Dims, PrunableConfig
from pyvitfast.models.config import ViTConfig
from pyvitfast.models.swin_config import SwinConfig
from pyvitfast.models.swin_transformer import SwinDims
from pyvitfast.models.vision_transformer import BlockDims, ViTDims

Axis = tuple[str, int]

# The units that an axis of a weight matrix runs over: an attention row is one head and one of its dims, and
# Swin's patch merging puts four tokens' channels side by side.
_KINDS_OF_AXIS = {
    "embed": ("embed",),
    "merge": ("embed",),
    "head": ("head",),
    "qk": ("head", "qk"),
    "v": ("head", "v"),
    "mlp": ("mlp",),
}
_PAPER_GROUP = {"embed": 16, "head": 2, "qk": 8, "v": 8, "mlp": 16}
_SMALL_GROUP = {"embed": 4, "head": 1, "qk": 2, "v": 2, "mlp": 8}
_SMALL_EMBED = 128


@dataclass(frozen=True)
class Structure:
    """Consecutive units of one kind, such as ``embed`` or ``blocks.3.qk``.

    ``start`` is the index of the first one among all units of the model.
    """

    name: str
    kind: str
    start: int
    size: int
    group_size: int

    @property
    def stop(self) -> int:
        """Index after the last unit."""
        return self.start + self.size


@dataclass(frozen=True)
class Piece:
    """Rows of one parameter, seen as a matrix, and the axes its rows and columns run over.

    ``subset`` holds the kinds whose sums take this piece under the released code's membership.
    """

    parameter: str
    rows: Axis | None
    cols: Axis | None
    subset: frozenset[str]
    start: int = 0
    stop: int | None = None
    is_norm_weight: bool = False

    def of(self, tensor: Tensor, held: tuple[int, int] | None = None) -> Tensor:
        """This piece of a tensor shaped like the parameter: a view of rank 1 or 2, of rank 4 for a kernel.

        With ``held``, ``tensor`` is the part of dimension 0 between these two indices.
        """
        if tensor.ndim == 3:  # tokens and position embedding [1, N, E]
            return tensor.view(-1, tensor.shape[-1])
        if held is not None:
            low, high = self.held(held)
            return tensor[low + self.start - held[0] : high + self.start - held[0]]
        return tensor if self.stop is None else tensor[self.start : self.stop]

    def held(self, rows: tuple[int, int]) -> tuple[int, int]:
        """Which of this piece's rows lie between two indices of the parameter's dimension 0."""
        low, high = max(rows[0], self.start), rows[1] if self.stop is None else min(rows[1], self.stop)
        return (low - self.start, high - self.start) if low < high else (rows[0] - self.start,) * 2


def group_size(kind: str, size: int, embed_dim: int, head_group: int = 2) -> int:
    """The automatic group size of a structure of ``size`` units.

    The largest power of two that divides ``size``, leaves two groups or more, and does not exceed the paper's
    size: embed 16, head 2, qk 8, v 8, mlp 16. Where heads go in groups of an odd size ``head_group``, qk and
    v go in 16s, so that heads times dims stays a multiple of 16. Models narrower than 128 channels have so
    few units that these would be too coarse; there the limits are 4, 1, 2, 2, 8.
    """
    limit = (_PAPER_GROUP if embed_dim >= _SMALL_EMBED else _SMALL_GROUP)[kind]
    if embed_dim >= _SMALL_EMBED and kind in ("qk", "v") and head_group % 2:
        limit *= 2
    group = 1
    while group * 2 <= limit and size % (group * 2) == 0 and size // (group * 2) >= 2:
        group *= 2
    return group


def block_pieces(
    block: str, i: int, dims: BlockDims, embed: Axis, qkv_bias: bool, proj_bias: bool
) -> Iterator[Piece]:
    """The pieces of attention and MLP of the ``i``-th block, whose parameters start with ``block``."""
    mlp = ("mlp", i)
    qk, v = dims.heads * dims.qk_dim, dims.heads * dims.v_dim
    bounds = pairwise((0, qk, 2 * qk, 2 * qk + v))
    summed = ({"head", "qk"}, {"head"}, {"head", "v"})
    for (start, stop), axis, kinds in zip(bounds, ("qk", "qk", "v"), summed, strict=True):
        rows = (axis, i)
        both = frozenset({"embed", *kinds})
        yield Piece(f"{block}.attn.qkv.weight", rows, embed, both, start, stop)
        if qkv_bias:
            yield Piece(f"{block}.attn.qkv.bias", rows, None, frozenset(kinds), start, stop)
    yield Piece(f"{block}.attn.proj.weight", embed, ("v", i), frozenset({"embed"}))
    yield Piece(f"{block}.mlp.fc1.weight", mlp, embed, frozenset({"embed", "mlp"}))
    yield Piece(f"{block}.mlp.fc2.weight", embed, mlp, frozenset({"embed"}))
    if proj_bias:
        yield Piece(f"{block}.attn.proj.bias", embed, None, frozenset({"embed"}))
        yield Piece(f"{block}.mlp.fc1.bias", mlp, None, frozenset({"mlp"}))
        yield Piece(f"{block}.mlp.fc2.bias", embed, None, frozenset({"embed"}))


def norm_pieces(name: str, axis: Axis, kinds: frozenset[str] = frozenset()) -> Iterator[Piece]:
    """Weight and bias of a LayerNorm."""
    yield Piece(f"{name}.weight", axis, None, kinds, is_norm_weight=True)
    yield Piece(f"{name}.bias", axis, None, kinds)


def _vit_pieces(config: ViTConfig) -> Iterator[Piece]:
    embed: Axis = ("embed", -1)
    none: frozenset[str] = frozenset()

    yield Piece("patch_embed.proj.weight", embed, None, frozenset({"embed"}))
    if not config.pre_norm:
        yield Piece("patch_embed.proj.bias", embed, None, frozenset({"embed"}))
    tokens = {
        "cls_token": config.class_token,
        "dist_token": config.distilled,
        "reg_token": config.reg_tokens > 0,
        "pos_embed": config.pos_embed == "learn",
    }
    for name, present in tokens.items():
        if present:
            yield Piece(name, None, embed, none)
    if config.pre_norm:
        yield from norm_pieces("norm_pre", embed)
    for i, dims in enumerate(config.dims.blocks):
        block = f"blocks.{i}"
        yield from norm_pieces(f"{block}.norm1", embed)
        yield from block_pieces(block, i, dims, embed, config.qkv_bias, config.proj_bias)
        yield from norm_pieces(f"{block}.norm2", embed)
        if config.init_values is not None:
            yield Piece(f"{block}.ls1.gamma", embed, None, none)
            yield Piece(f"{block}.ls2.gamma", embed, None, none)
    if config.final_norm:
        yield from norm_pieces("fc_norm" if config.fc_norm else "norm", embed)
    if config.num_classes:
        yield Piece("head.weight", None, embed, none)
        if config.distilled:
            yield Piece("head_dist.weight", None, embed, none)


def _swin_pieces(config: SwinConfig) -> Iterator[Piece]:
    none: frozenset[str] = frozenset()
    stream = frozenset({"embed"})
    first: Axis = ("embed", 0)
    yield Piece("patch_embed.proj.weight", first, None, none)
    yield Piece("patch_embed.proj.bias", first, None, none)
    # The norm, not the convolution before it, writes to the residual stream.
    yield from norm_pieces("patch_embed.norm", first, stream)
    number = 0
    for s, stage in enumerate(config.dims.stages):
        embed = ("embed", s)
        if s:
            merged = ("merge", s - 1)
            yield from norm_pieces(f"layers.{s}.downsample.norm", merged)
            yield Piece(f"layers.{s}.downsample.reduction.weight", embed, merged, stream)
        for j, dims in enumerate(stage):
            block = f"layers.{s}.blocks.{j}"
            yield from norm_pieces(f"{block}.norm1", embed)
            yield Piece(f"{block}.attn.relative_position_bias_table", None, ("head", number), none)
            yield from block_pieces(block, number, dims, embed, config.qkv_bias, True)
            yield from norm_pieces(f"{block}.norm2", embed)
            number += 1
    yield from norm_pieces("norm", embed)
    if config.num_classes:
        yield Piece("head.fc.weight", None, embed, none)


def _structures(config: PrunableConfig) -> Iterator[tuple[Axis, str, int]]:
    """Axis, name and size of all structures."""

    def of_block(number: int, name: str, dims: BlockDims) -> Iterator[tuple[Axis, str, int]]:
        sizes = {"head": dims.heads, "qk": dims.qk_dim, "v": dims.v_dim, "mlp": dims.mlp}
        for kind, size in sizes.items():
            yield (kind, number), f"{name}.{kind}", size

    if isinstance(config, ViTConfig):
        yield ("embed", -1), "embed", config.dims.embed_dim
        for i, dims in enumerate(config.dims.blocks):
            yield from of_block(i, f"blocks.{i}", dims)
        return
    for s, width in enumerate(config.dims.embed_dims):
        yield ("embed", s), f"layers.{s}.embed", width
    number = 0
    for s, stage in enumerate(config.dims.stages):
        for j, dims in enumerate(stage):
            yield from of_block(number, f"layers.{s}.blocks.{j}", dims)
            number += 1


class UnitTable:
    """All structures of a model, and all pieces of its parameters that go with them.

    Units are numbered: residual channels first (of each stage), then for each block heads, query/key dims,
    value dims, MLP units. The class heads' rows and biases belong to no unit.

    Args:
        config: architecture of the model.
        group_sizes: units in a group by kind, where the automatic choice does not suit.

    Source:
        NViT (Yang et al., CVPR 2023), section 3.1.
    """

    def __init__(self, config: PrunableConfig, group_sizes: dict[str, int] | None = None) -> None:
        self.config: PrunableConfig = config
        self.pieces = tuple(_swin_pieces(config) if isinstance(config, SwinConfig) else _vit_pieces(config))
        self.structures: dict[Axis, Structure] = {}
        widest = max(config.dims.embed_dims)
        self.count = 0
        for axis, name, size in _structures(config):
            kind, index = axis
            heads = self.structures["head", index].group_size if kind in ("qk", "v") else 2
            group = (group_sizes or {}).get(kind) or group_size(kind, size, widest, heads)
            self.structures[axis] = Structure(name, kind, self.count, size, group)
            self.count += size

    def _own(self, axis: Axis) -> Structure:
        kind, index = axis
        return self.structures["embed" if kind == "merge" else kind, index]

    def units(self, axis: Axis, kind: str) -> Tensor:
        """The unit of ``kind`` at each index of an axis, int64."""
        name, block = axis
        own = self._own(axis)
        if name not in ("qk", "v"):
            return torch.arange(own.start, own.stop).repeat(4 if name == "merge" else 1)
        head = self.structures["head", block]
        if kind == "head":
            return torch.arange(head.start, head.stop).repeat_interleave(own.size)
        return torch.arange(own.start, own.stop).repeat(head.size)

    def scored(self, membership: str) -> list[tuple[Piece, frozenset[str]]]:
        """The pieces that enter some unit's sum, each with the kinds of those units."""
        found = []
        for piece in self.pieces:
            kinds = {k for axis in (piece.rows, piece.cols) if axis for k in _KINDS_OF_AXIS[axis[0]]}
            taken = frozenset(kinds) if membership == "full" else piece.subset
            if taken:
                found.append((piece, taken))
        return found

    def csr(
        self,
        scored: Sequence[tuple[Piece, frozenset[str]]],
        shapes: Sequence[tuple[int, int]],
    ) -> tuple[Tensor, Tensor]:
        """Where in the workspace of ``saliency_rowcol`` each unit finds the sums it adds up.

        Args:
            scored: the pieces in the order they are passed to ``saliency_rowcol``.
            shapes: rows and columns of each piece as that op sees them.

        Returns:
            ``indptr`` int64 [U + 1] and ``indices`` int64 [nnz] into the workspace.
        """
        owners, places = [], []
        offset = 0
        for (piece, kinds), (rows, cols) in zip(scored, shapes, strict=True):
            for axis, start, length in (
                (piece.rows, offset, rows),
                (piece.cols, offset + rows, cols),
            ):
                for kind in _KINDS_OF_AXIS[axis[0]] if axis else ():
                    if axis and kind in kinds:
                        owners.append(self.units(axis, kind))
                        places.append(torch.arange(start, start + length))
            offset += rows + cols
        owner = torch.cat(owners) if owners else torch.zeros(0, dtype=torch.int64)
        place = torch.cat(places) if places else torch.zeros(0, dtype=torch.int64)
        order = torch.argsort(owner, stable=True)
        indptr = torch.zeros(self.count + 1, dtype=torch.int64)
        indptr[1:] = torch.bincount(owner, minlength=self.count).cumsum(0)
        return indptr, place[order]

    def alive(self, axis: Axis, alive: Tensor) -> Tensor:
        """Mask of an axis of a weight matrix, from the mask [U] of all units."""
        own = self._own(axis)
        mask = alive[own.start : own.stop]
        if axis[0] == "merge":
            mask = mask.repeat(4)  # timm flattens (column, row, channel), channels fastest
        if axis[0] in ("qk", "v"):
            head = self.structures["head", axis[1]]
            mask = (alive[head.start : head.stop, None] & mask).flatten()  # [H, D] -> [H * D]
        return mask

    def dims(self, alive: Tensor) -> Dims:
        """Widths that are left under the mask [U]."""
        sums = torch.cat([alive.new_zeros(1, dtype=torch.int64), alive.cumsum(0)]).tolist()
        left = {key: sums[s.stop] - sums[s.start] for key, s in self.structures.items()}

        def block(i: int) -> BlockDims:
            return BlockDims(left["head", i], left["qk", i], left["v", i], left["mlp", i])

        if isinstance(self.config, ViTConfig):
            return ViTDims(left["embed", -1], tuple(map(block, range(len(self.config.dims.blocks)))))
        numbers = iter(range(len(self.config.dims.blocks)))
        stages = tuple(tuple(block(next(numbers)) for _ in stage) for stage in self.config.dims.stages)
        return SwinDims(tuple(left["embed", s] for s in range(len(stages))), stages)

    def removable(self, structure: Structure, candidates: int, left: int) -> int:
        """How many groups may still go, with at least one group kept."""
        return max(
            0,
            min(candidates // structure.group_size, (left - 1) // structure.group_size),
        )

    def floor(self) -> Dims:
        """The smallest widths that removal can reach."""
        alive = torch.ones(self.count, dtype=torch.bool)
        for s in self.structures.values():
            alive[s.start : s.start + self.removable(s, s.size, s.size) * s.group_size] = False
        return self.dims(alive)

    def select(
        self, scores: Tensor, alive: Tensor, candidates: Tensor, groups: int
    ) -> list[tuple[Structure, Tensor, float]]:
        """The groups to remove: the lowest of all structures pooled.

        The candidates of each structure are sorted by score and cut into consecutive groups; a group's score
        is the sum of its units'. Ties go to the lower index, so every process chooses alike.

        Args:
            scores: float64 [U].
            alive: bool [U].
            candidates: bool [U], alive units that may be removed.
            groups: how many groups to take; fewer come back when no more are left to take.

        Returns:
            Structure, unit indices and score of each group, lowest first.
        """
        pool: list[tuple[float, int, int, Structure, Tensor]] = []
        for number, s in enumerate(self.structures.values()):
            index = candidates[s.start : s.stop].nonzero().flatten() + s.start
            count = self.removable(s, len(index), int(alive[s.start : s.stop].sum()))
            # No more than `groups` groups of one structure can be among the lowest of all.
            count = min(count, groups)
            order = index[torch.argsort(scores[index], stable=True)[: count * s.group_size]]
            for place, units in enumerate(order.view(count, s.group_size)):
                pool.append((float(scores[units].sum()), number, place, s, units.sort().values))
        pool.sort(key=lambda entry: entry[:3])
        return [(s, units, score) for score, _, _, s, units in pool[:groups]]
