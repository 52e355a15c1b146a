"""Growth by a ring of four small cores that ties every weight of the target to every weight of the source."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyvitfast import ops
from pyvitfast.grow.fixed import AnyLayout
from pyvitfast.grow.layout import Stage
from pyvitfast.grow.models import Model, Pair, Target
from pyvitfast.grow.operators import Blocks, GrowthOperator, of_stage, query_scale
from pyvitfast.grow.rules import LayerMap, round_robin

_CORES = ("s_b", "s_o", "s_l", "s_i")
_TABLE = "attn.relative_position_bias_table"


class MangoOperator(GrowthOperator):
    r"""Mango: all block matrices at once through :func:`pyvitfast.ops.tensor_ring_grow`.

    The source's matrices are one tensor M [L1, B1, D1, D1] (:func:`pyvitfast.grow.stack_vit`), with B =
    2k + 4 slots for MLP ratio k. Vectors of the blocks are :math:`v_l^\top V v_o`, mixed by ``v_b``; what is
    outside the blocks grows by ``embed`` on the side of the residual stream, and classifiers by ``head``.

    In a Swin Transformer each stage s is a tensor of its own with all of the maps below, named ``s_b_0`` and
    so on. The tables of relative positions T [L1, P, h1] become :math:`v_l^\top T` times ``heads``. Merging
    of patches after stage s, W [D1', 4 D1], becomes :math:`embed_{s+1}^\top W\, (I_4 \otimes head_s)` at
    any rank, and its norm grows by four copies of ``embed_s``: no core spans two stages.

    Args:
        source: the trained model, as for :func:`pyvitfast.grow.grow`.
        target: the architecture, as for :func:`pyvitfast.grow.grow`.
        rank: size R of all four bonds.
        ranks: sizes of the bonds R1...R4 one by one, in place of ``rank``.
        init: ``"fpi"`` or ``"aki"``, which takes new rows of matrices from the next layer and needs a third
            bond of at least 2. Vectors start as in fpi: one width and one depth map cannot tell them apart.
        depth: where ``s_l`` starts: ``stack``, ``stack_top`` or ``interleave``.
        noise: of the start, see below; 0.02 by default.
        seed: of the noise.
        mix_vectors: train ``v_b`` too, which mixes biases, norms and scales of a block.
        head: ``"grow"``, or ``"target"`` to start from the target's own classifiers, trained along.

    Attributes:
        s_b: core of the slots [R1, B1, B2, R2].
        s_o: core of the rows [R2, D1, D2, R3].
        s_l: core of the layers [R3, L1, L2, R4].
        s_i: core of the columns [R4, D1, D2, R1].
        v_o: of vectors [D1, D2].
        v_l: layers of vectors [L1, L2], norms of queries and keys and tables of positions included.
        v_b: of vectors [V1, V2]; a buffer unless ``mix_vectors``.
        embed: of patches, tokens, positions and norms outside the blocks [D1, D2].
        head: of the columns of what reads the last block's output, classifiers and merging [D1, D2].
        heads: of tables of relative positions [h1, h2]; in a Swin Transformer only.

    Raises:
        TypeError, NotImplementedError: as :class:`GrowthOperator`.
        ValueError: ranks that are no whole numbers above 0, a bond too small for ``init``, a hidden width
            that is no multiple of the width, attention of another width, a smaller MLP ratio than the
            source's, and as :func:`pyvitfast.grow.grow`.

    At the start, bond indices 0 hold the fixed rule: without noise the grown model is that of
    ``grow(method="fpi", noise=0)``, with whole heads copied and the residual stream and hidden units copied
    alike, so that it is exact only where the number of heads, too, is a multiple. Normal noise of standard
    deviation ``noise`` / sqrt(D1) stands on new units of ``s_o``, ``s_i``, ``embed`` and ``head``, since
    exact copies would have equal gradients for ever. Beyond index 0 there are copies of ``s_b``, ``s_l`` and
    ``s_i`` on the diagonal, and noise everywhere. Zeros there would never get a gradient: a path round the
    ring with two zeros in it gives none to either.

    At rank 1 all matrices have one width map and one layer map, so this neither contains LiGO nor is
    contained in it. A change of basis on a bond leaves the weights as they are: compare :meth:`weights`,
    never cores.

    Source:
        Mango (Pan et al., NeurIPS 2023). Its accessible text names the tensor and four cores in a ring; order
        of bonds, vectors, embeddings, heads, start, optimizer and all of Swin's are our choice.

    Example:
        >>> operator = pyvitfast.grow.MangoOperator(small, "deit_base_patch16_224")
        >>> operator.fit(loader, torch.nn.functional.cross_entropy, steps=100, device="cuda")
        >>> big = operator.materialize()
    """

    method = "mango"
    s_b: nn.Parameter
    s_o: nn.Parameter
    s_l: nn.Parameter
    s_i: nn.Parameter
    v_o: nn.Parameter
    v_l: nn.Parameter
    v_b: Tensor
    embed: nn.Parameter
    head: nn.Parameter

    def __init__(
        self,
        source: Model,
        target: Target,
        *,
        rank: int = 1,
        ranks: Sequence[int] | None = None,
        init: str = "fpi",
        depth: str = "stack",
        noise: float | None = None,
        seed: int = 0,
        mix_vectors: bool = False,
        head: str = "grow",
    ) -> None:
        bonds = _bonds(rank, ranks)
        if init not in ("fpi", "aki"):
            raise ValueError(f"MangoOperator: `init` must be 'fpi' or 'aki', got {init!r}.")
        if init == "aki" and bonds[2] < 2:
            raise ValueError(
                f"MangoOperator: `init` aki needs a third bond of at least 2, got bonds {bonds}. Pass "
                "rank=2 or ranks=(1, 1, 2, 1)."
            )
        super().__init__(
            source, target, depth=depth, noise=0.02 if noise is None else noise, seed=seed, head=head
        )
        self.init, self.bonds = init, bonds
        self._start(mix_vectors)

    def _hold_outside(self, pair: Pair) -> None:
        for old, new, _ in self._stages():
            _check(old, new)
        super()._hold_outside(pair)
        for stage in self.source_layout.stages:
            matrices, vectors = stage.stacked(pair.state, _vectors(pair.source, stage))
            self._hold(stage.axis("matrices"), matrices)
            self._hold(stage.axis("vectors"), vectors)

    def _start(self, mix_vectors: bool) -> None:
        generator = torch.Generator().manual_seed(self.growth.seed)
        for old, new, layers in self._stages():
            self._start_stage(old, new, layers, mix_vectors, generator)

    def _start_stage(
        self, old: Stage, new: Stage, chosen: LayerMap, mix_vectors: bool, generator: torch.Generator
    ) -> None:
        maps, sigma = self.growth.maps, self.growth.noise / math.sqrt(old.dim)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64) * sigma

        # Rows of q, k and v are the only ones that come in heads; one map serves all at rank 1.
        units, pieces = maps[old.axis("rows")], round_robin(old.ratio, new.ratio)
        one, few = torch.eye(old.dim, dtype=torch.float64), torch.eye(old.ratio, dtype=torch.float64)
        scale = 1.0 if self.source_layout.qk_norm else query_scale(old, new)
        slots = torch.zeros(2 * old.ratio + 4, 2 * new.ratio + 4, dtype=torch.float64)
        slots[:4, :4] = torch.eye(4)
        slots[0, 0] = scale
        slots[4 : 4 + old.ratio, 4 : 4 + new.ratio] = pieces.copy(few, 1)
        slots[4 + old.ratio :, 4 + new.ratio :] = pieces.split(few, 1)
        layers = torch.eye(old.depth, dtype=torch.float64)
        bases = {
            "s_b": slots,
            "s_o": units.copy(one, 1),
            "s_l": layers[:, list(chosen.index)],
            "s_i": units.split(one, 1),
        }
        r1, r2, r3, r4 = self.bonds
        ends = {"s_b": (r1, r2), "s_o": (r2, r3), "s_l": (r3, r4), "s_i": (r4, r1)}
        for name in _CORES:
            base, (left, right) = bases[name], ends[name]
            start = noise(left, *base.shape, right)
            start[0, :, :, 0] = base
            if name in ("s_o", "s_i"):
                start[0, :, :, 0] += noise(*base.shape) * units.new
            if name != "s_o":
                for r in range(1, min(left, right)):
                    start[r, :, :, r] += base
            self._learn(old, name, start)
        if self.init == "aki":
            self._start_from_next_layers(old, [min(i + 1, old.depth - 1) for i in chosen.index])
        self._learn(old, "v_o", bases["s_o"])
        self._learn(old, "v_l", bases["s_l"])
        for name, core in (("embed", "s_o"), ("head", "s_i")):
            self._learn(old, name, bases[core] + noise(old.dim, new.dim) * units.new)
        if _TABLE in self._within(old):
            self._learn(
                old, "heads", maps[old.axis("heads")].copy(torch.eye(old.heads, dtype=torch.float64), 1)
            )
        of_old, of_new = _vectors(self.source_layout, old), _vectors(self.target_layout, new)
        places = {vector: i for i, vector in enumerate(of_old)}
        mixed = torch.zeros(len(of_old), len(of_new), dtype=torch.float64)
        for j, (name, piece) in enumerate(of_new):
            i = places[name, piece % old.ratio if name == "mlp.fc1.bias" else piece]
            mixed[i, j] = scale if (name, piece) == ("attn.qkv.bias", 0) else 1.0
        if mix_vectors:
            self._learn(old, "v_b", mixed)
        else:
            self.register_buffer(of_stage(old, "v_b"), mixed.to(self.device, self._wide))

    def _learn(self, stage: Stage, name: str, value: Tensor) -> None:
        self.register_parameter(of_stage(stage, name), nn.Parameter(value.to(self.device, self._wide)))

    def _map(self, stage: Stage, name: str) -> Tensor:
        found: Tensor = getattr(self, of_stage(stage, name))
        return found

    def _start_from_next_layers(self, stage: Stage, following: list[int]) -> None:
        new = self.growth.maps[stage.axis("rows")].new.to(self.device)
        s_o, s_l = self._map(stage, "s_o"), self._map(stage, "s_l")
        with torch.no_grad():
            old = s_o[0, :, :, 0].clone()
            s_o[0, :, :, 0] = old * ~new
            s_o[0, :, :, 1] = old * new
            s_l[1, :, :, 0] = torch.eye(stage.depth)[:, following].to(s_l)

    def _evaluate(self) -> tuple[Blocks, dict[str, Tensor]]:
        blocks: Blocks = {}
        for old, new, _ in self._stages():
            blocks |= {(new.prefix, name): t for name, t in self._stage(old, new).items()}
        embeds, heads = (
            [self._map(stage, name) for stage in self.source_layout.stages] for name in ("embed", "head")
        )
        return blocks, self._outside(embeds, heads)

    def _stage(self, old: Stage, new: Stage) -> dict[str, Tensor]:
        """The tensors of all blocks of a stage [L2, ...] by name within a block."""
        k, d, deep = new.ratio, new.dim, new.depth
        ring = ops.implementation("tensor_ring_grow", self.device)
        cores = [self._map(old, name) for name in _CORES]
        main, fc2 = ring(self._held(old.axis("matrices")), *cores, columns=k)
        qkv, proj, fc1 = main.split([3, 1, k], 1)
        grown = {
            "attn.qkv.weight": qkv.reshape(deep, 3 * d, d),
            "attn.proj.weight": proj.squeeze(1),
            "mlp.fc1.weight": fc1.reshape(deep, k * d, d),
            "mlp.fc2.weight": fc2,
        }
        v_l = self._map(old, "v_l")
        wide = self._held(old.axis("vectors")) @ self._map(old, "v_o")
        vectors = self._map(old, "v_b").t() @ torch.tensordot(v_l, wide, dims=([0], [0]))
        of_new = _vectors(self.target_layout, new)
        names = list(dict.fromkeys(name for name, _ in of_new))
        counts = [sum(name == other for other, _ in of_new) for name in names]
        for name, part in zip(names, vectors.split(counts, 1), strict=True):
            grown[name] = part.reshape(deep, -1)
        if _TABLE in self._within(old):
            tables = self._held(old.axis(_TABLE)) @ self._map(old, "heads")
            grown[_TABLE] = torch.tensordot(v_l, tables, dims=([0], [0]))
        return grown | self._head_norms(old, new, lambda name: v_l.t())


def _vectors(layout: AnyLayout, stage: Stage) -> tuple[tuple[str, int], ...]:
    return stage.vectors(layout.qkv_bias, layout.proj_bias, layout.layer_scale)


def _check(old: Stage, new: Stage) -> None:
    """Raise ValueError where a stage's matrices do not cut into pieces that grow alike."""
    for stage in (old, new):
        if stage.heads * stage.head_dim != stage.dim:
            raise ValueError(
                f"MangoOperator: attention in {stage.prefix} must be as wide as the residual stream, "
                f"{stage.dim}, since all matrices are one tensor, got {stage.heads} heads of width "
                f"{stage.head_dim}. Take LiGOOperator or a fixed rule."
            )
    k1, k2 = old.ratio, new.ratio
    if k2 < k1:
        raise ValueError(
            f"MangoOperator: the target's MLP ratio must be no smaller, got {k1} -> {k2}: "
            "hidden units are copied in pieces as wide as the residual stream. Build the target with a "
            "larger mlp_ratio."
        )


def _bonds(rank: int, ranks: Sequence[int] | None) -> tuple[int, ...]:
    bonds = (rank,) * 4 if ranks is None else tuple(ranks)
    whole = all(isinstance(r, int) and not isinstance(r, bool) and r >= 1 for r in bonds)
    if len(bonds) != 4 or not whole:
        name, got = ("rank", rank) if ranks is None else ("ranks", ranks)
        rule = "a whole number" if ranks is None else "four whole numbers"
        raise ValueError(f"MangoOperator: `{name}` must be {rule} of at least 1, got {got!r}.")
    if ranks is not None and rank != 1:
        raise ValueError(
            f"MangoOperator: `rank` must be left out with `ranks`, got {rank} and {tuple(ranks)}."
        )
    return bonds
