"""Growth by width factors for each type of layer, and coefficients that mix layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pyvitfast import ops
from pyvitfast.grow.layout import Stage
from pyvitfast.grow.models import Model, Pair, Target
from pyvitfast.grow.operators import Blocks, GrowthOperator, beside, of_stage, query_scale, stack_of
from pyvitfast.grow.rules import IndexMap, LayerMap

# Factors by the axis that they widen; q, k and v stand for the three parts of axis qkv.
_FACTORS = ("embed", "q", "k", "v", "hidden")


class LiGOOperator(GrowthOperator):
    r"""LiGO: :math:`W'_m = \sum_l w_{m,l} B_l W_l A_l^\top`, with factors that layers share.

    What reads or writes the residual stream uses one factor ``embed``: q, k and v are
    :math:`B_q W B_e^\top` and so on, the attention output is :math:`B_e W B_v^\top`, fc1
    :math:`B_h W B_e^\top`, fc2 :math:`B_e W B_h^\top`. Vectors grow by the factor of their layer's rows;
    norms, LayerScale, patches, tokens and positions by ``embed``; classifiers become
    :math:`W B_e^\top`. Each tensor of a block has coefficients w of its own, those of q, k and v apart.
    Norms of queries and keys are mixed and keep their width, or copy it where heads grow wider.

    In a Swin Transformer each stage s has factors and coefficients of its own, named ``embed_0`` and so on.
    Tables of relative positions grow by a factor ``heads`` and coefficients. Merging of patches after stage s
    becomes :math:`B_{e,s+1} W\, (I_4 \otimes B_{e,s})^\top`, and its norm grows by four copies of
    ``embed_s``.

    Args:
        source: the trained model, as for :func:`pyvitfast.grow.grow`.
        target: the architecture, as for :func:`pyvitfast.grow.grow`.
        style: ``"paper"``: dense factors, applied before layers are mixed. ``"repo"``, as the released code
            does: factors [I; C] with C trained, for each target layer (``embed`` for all), applied after.
        per_layer: with style paper, factors other than ``embed`` for each source layer, rather than for all.
        depth: where w starts: ``stack``, ``stack_top`` or ``interleave``.
        noise: of the start in style paper, see below; 0.02 by default. Style repo has its own.
        seed: of what is drawn.
        head: ``"grow"``, or ``"target"`` to start from the target's own classifiers, trained along.

    Attributes:
        factors: ``embed`` [D2, D1], ``q``, ``k`` and ``v`` [D2, D1], ``hidden`` [H2, H1] and in a Swin
            Transformer ``heads`` [h2, h1], with ``per_layer`` [L1, ...]; in style repo rows beyond the
            source's only, and [L2, ...] but for ``embed``.
        coefficients: w [L2, L1] by the tensor's name, with underscores for dots.

    Raises:
        TypeError, NotImplementedError: as :class:`GrowthOperator`.
        ValueError: an unknown style, ``per_layer`` or ``noise`` with style repo, and as
            :func:`pyvitfast.grow.grow`.

    The start of style paper is our choice: units are copied, and where a factor is used on both sides,
    each copy is divided by the root of their number, so that :math:`B^\top B = I`; fc2, behind an activation
    that does not scale, and LayerScale have that in w. Without noise, to a multiple of the width and at equal
    depth, the function stays but for LayerNorm's epsilon beside a stream that is smaller by the root of the
    multiple. Normal noise of standard deviation ``noise`` / sqrt(columns) stands on new rows.

    Style repo starts as the released code: new rows are random means of all old ones, with uniform weights
    brought to sum 1, and w is a chosen layer with a little of all others, brought to sum 1.

    Source:
        LiGO (Wang et al., ICLR 2023), section 3 and algorithm 1, and its released code, of which this is no
        copy: that knows BERT and RoBERTa only. LayerScale, norms of queries and keys and Swin are our choice.

    Example:
        >>> operator = pyvitfast.grow.LiGOOperator(small, "deit_base_patch16_224")
        >>> operator.fit(loader, torch.nn.functional.cross_entropy, steps=100)
        >>> big = operator.materialize()
    """

    method = "ligo"

    def __init__(
        self,
        source: Model,
        target: Target,
        *,
        style: str = "paper",
        per_layer: bool = False,
        depth: str = "stack",
        noise: float | None = None,
        seed: int = 0,
        head: str = "grow",
    ) -> None:
        if style not in ("paper", "repo"):
            raise ValueError(f"LiGOOperator: `style` must be 'paper' or 'repo', got {style!r}.")
        for name, given in (("per_layer", per_layer), ("noise", noise is not None)):
            if style == "repo" and given:
                raise ValueError(
                    f"LiGOOperator: `{name}` must be left out with style 'repo', whose factors belong to "
                    "target layers and start at random. Take style='paper'."
                )
        usual = 0.02 if style == "paper" else 0.0
        super().__init__(
            source, target, depth=depth, noise=usual if noise is None else noise, seed=seed, head=head
        )
        self.style, self.per_layer = style, per_layer
        self._start()

    def _hold_outside(self, pair: Pair) -> None:
        super()._hold_outside(pair)
        for stage in self.source_layout.stages:
            for name, p in self._within(stage).items():
                if not beside(stage, p):
                    for part, piece in self._pieces(name, stack_of(pair, stage, name)):
                        self._hold(stage.axis(part), piece)

    @staticmethod
    def _pieces(name: str, stack: Tensor) -> list[tuple[str, Tensor]]:
        if ".qkv." not in name:
            return [(name, stack)]
        return [(name.replace("qkv", part), t) for part, t in zip("qkv", stack.chunk(3, 1), strict=True)]

    def _start(self) -> None:
        generator = torch.Generator().manual_seed(self.growth.seed)
        self.factors, self.coefficients = nn.ParameterDict(), nn.ParameterDict()
        for old, new, layers in self._stages():
            self._start_stage(old, new, layers, generator)

    def _start_stage(self, old: Stage, new: Stage, layers: LayerMap, generator: torch.Generator) -> None:
        maps, within = self.growth.maps, self._within(old)
        of_factor = dict.fromkeys("qkv", maps[old.axis("rows")])
        of_factor |= {name: maps[old.axis(name)] for name in ("embed", "hidden", "heads")}
        tables = any(p.kind == "table" for p in within.values())
        for name in (*_FACTORS, "heads") if tables else _FACTORS:
            if self.style == "paper":
                factor = _copies(of_factor[name], name in ("embed", "v"), self.growth.noise, generator)
                stacked = (old.depth,) if self.per_layer and name != "embed" else ()
            else:
                stacked = () if name == "embed" else (new.depth,)
                source, target = of_factor[name].size, len(of_factor[name].index)
                factor = torch.rand(
                    *stacked, target - source, source, generator=generator, dtype=torch.float64
                )
                factor = factor / factor.sum(-1, keepdim=True)
            self.factors[of_stage(old, name)] = nn.Parameter(
                factor.to(self.device, self._wide).expand(*stacked, *factor.shape[-2:]).clone()
            )
        chosen = torch.eye(old.depth, dtype=torch.float64)[list(layers.index)]
        for name in within:
            for part, _ in self._pieces(name, torch.zeros(1, 3)):
                if self.style == "paper":
                    start = chosen * self._scale(old, new, part)
                else:
                    noisy = torch.rand(chosen.shape, generator=generator, dtype=torch.float64) * 0.03
                    start = torch.where(chosen > 0, chosen, noisy)
                    start = start / start.sum(-1, keepdim=True)
                self.coefficients[of_stage(old, part)] = nn.Parameter(start.to(self.device, self._wide))

    def _scale(self, old: Stage, new: Stage, part: str) -> float:
        if part in ("attn.q.weight", "attn.q.bias") and not self.source_layout.qk_norm:
            return query_scale(old, new)
        if part == "mlp.fc2.weight":
            return old.hidden / new.hidden
        return math.sqrt(new.dim / old.dim) if part.endswith("gamma") else 1.0

    def _whole(self, factor: Tensor) -> Tensor:
        """A factor [..., n2, n1], with the identity that stands above it in style repo."""
        if self.style == "paper":
            return factor
        same = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        return torch.cat([same.expand(*factor.shape[:-2], *same.shape), factor], -2)

    def _evaluate(self) -> tuple[Blocks, dict[str, Tensor]]:
        blocks: Blocks = {}
        for old, new, _ in self._stages():
            blocks |= {(new.prefix, name): t for name, t in self._stage(old, new).items()}
        embeds = [self._whole(self.factors[of_stage(s, "embed")]).t() for s in self.source_layout.stages]
        return blocks, self._outside(embeds, embeds)

    def _stage(self, old: Stage, new: Stage) -> dict[str, Tensor]:
        """The tensors of all blocks of a stage [L2, ...] by name within a block."""

        def factor(axis: str) -> Tensor:
            found: Tensor = self.factors[of_stage(old, axis)]
            return found

        grown = self._head_norms(old, new, lambda name: self._depth(old, name))
        for name, p in self._within(old).items():
            if name in grown or p.writes is None:
                continue
            axis = p.writes[1].removesuffix(old.suffix)
            if p.kind == "table":
                grown[name] = self._grow_table(old, name, factor(axis))
                continue
            reads = p.reads and p.reads.removesuffix(old.suffix)
            into = factor("v" if reads == "rows" else reads) if reads else None
            parts = [
                self._grow(old, part, factor(part.split(".")[1] if axis == "qkv" else axis), into)
                for part, _ in self._pieces(name, torch.zeros(1, 3))
            ]
            grown[name] = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        return grown

    def _depth(self, stage: Stage, name: str) -> Tensor:
        w: Tensor = self.coefficients[of_stage(stage, name)]
        return w

    def _grow(self, stage: Stage, part: str, out: Tensor, into: Tensor | None) -> Tensor:
        """One tensor of all blocks [L2, ...]."""
        stack, w = self._held(stage.axis(part)), self._depth(stage, part)
        target = self.style == "repo"
        if into is None:
            out = self._whole(out)
            if out.ndim == 2:
                return w @ stack @ out.t()
            mixed = (w @ stack if target else stack)[..., None]
            wide = (out @ mixed).squeeze(-1)
            return wide if target else w @ wide
        if out.ndim != into.ndim:
            layers = max(out, into, key=lambda f: f.ndim).shape[0]
            out, into = (f.expand(layers, *f.shape[-2:]) for f in (out, into))
        kron = ops.implementation("kron_grow", self.device)
        whose = "target" if target else "source"
        grown: Tensor = kron(stack[None], into, out, w[None], factors=whose, identity=target)
        return grown[0]

    def _grow_table(self, stage: Stage, name: str, heads: Tensor) -> Tensor:
        """Tables of positions of all blocks [L2, P, heads]."""
        stack, w, heads = self._held(stage.axis(name)), self._depth(stage, name), self._whole(heads).mT
        if self.style == "repo":
            return torch.einsum("ml,lph->mph", w, stack) @ heads
        return torch.einsum("ml,lph->mph", w, stack @ heads)


def _copies(units: IndexMap, both_sides: bool, noise: float, generator: torch.Generator) -> Tensor:
    factor = units.copy(torch.eye(units.size, dtype=torch.float64), 0)
    if both_sides:
        factor = factor / units.counts[units.index][:, None] ** 0.5
    drawn = torch.randn(factor.shape, generator=generator, dtype=torch.float64)
    return factor + drawn * units.new[:, None] * noise / math.sqrt(units.size)
