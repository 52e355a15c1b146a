"""Growth by width factors for each type of layer, and coefficients that mix layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pyvitfast import ops
from pyvitfast.grow.layout import Parameter
from pyvitfast.grow.models import Model, Pair, Target
from pyvitfast.grow.operators import GrowthOperator
from pyvitfast.grow.rules import IndexMap

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

    Args:
        source: the trained model, as for :func:`pyvitfast.grow.grow`; a ViT or DeiT.
        target: the architecture, as for :func:`pyvitfast.grow.grow`.
        style: ``"paper"``: dense factors, applied before layers are mixed. ``"repo"``, as the released code
            does: factors [I; C] with C trained, for each target layer (``embed`` for all), applied after.
        per_layer: with style paper, factors other than ``embed`` for each source layer, rather than for all.
        depth: where w starts: ``stack``, ``stack_top`` or ``interleave``.
        noise: of the start in style paper, see below; 0.02 by default. Style repo has its own.
        seed: of what is drawn.
        head: ``"grow"``, or ``"target"`` to start from the target's own classifiers, trained along.

    Attributes:
        factors: ``embed`` [D2, D1], ``q``, ``k`` and ``v`` [D2, D1], ``hidden`` [H2, H1], with ``per_layer``
            [L1, ...]; in style repo rows beyond the source's only, and [L2, ...] but for ``embed``.
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
        copy: that knows BERT and RoBERTa only. LayerScale and norms of queries and keys are our choice.

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
        for name in self._rests():
            if name.startswith(("attn.q_norm", "attn.k_norm")):
                continue
            stack = torch.stack(
                [pair.state[f"blocks.{i}.{name}"] for i in range(pair.source.stages[0].depth)]
            )
            for part, piece in self._pieces(name, stack):
                self._hold(part, piece)

    def _rests(self) -> dict[str, Parameter]:
        """Names within a block, and what they are."""
        start = "blocks.0."
        found = self.source_layout.parameters()
        return {key.removeprefix(start): p for key, p in found.items() if key.startswith(start)}

    @staticmethod
    def _pieces(name: str, stack: Tensor) -> list[tuple[str, Tensor]]:
        if ".qkv." not in name:
            return [(name, stack)]
        return [(name.replace("qkv", part), t) for part, t in zip("qkv", stack.chunk(3, 1), strict=True)]

    def _start(self) -> None:
        old, new, maps = self.source_layout, self.target_layout, self.growth.maps
        generator = torch.Generator().manual_seed(self.growth.seed)
        of_factor = {"embed": maps["embed"], "hidden": maps["hidden"]} | dict.fromkeys("qkv", maps["rows"])
        self.factors = nn.ParameterDict()
        for name in _FACTORS:
            if self.style == "paper":
                factor = _copies(of_factor[name], name in ("embed", "v"), self.growth.noise, generator)
                layers = (old.depth,) if self.per_layer and name != "embed" else ()
            else:
                layers = () if name == "embed" else (new.depth,)
                source, target = of_factor[name].size, len(of_factor[name].index)
                factor = torch.rand(
                    *layers, target - source, source, generator=generator, dtype=torch.float64
                )
                factor = factor / factor.sum(-1, keepdim=True)
            self.factors[name] = nn.Parameter(
                factor.to(self.device, self._wide).expand(*layers, *factor.shape[-2:]).clone()
            )
        chosen = torch.eye(old.depth, dtype=torch.float64)[list(self.growth.layers[0].index)]
        self.coefficients = nn.ParameterDict()
        for name in self._rests():
            for part, _ in self._pieces(name, torch.zeros(1, 3)):
                if self.style == "paper":
                    start = chosen * self._scale(part)
                else:
                    noisy = torch.rand(chosen.shape, generator=generator, dtype=torch.float64) * 0.03
                    start = torch.where(chosen > 0, chosen, noisy)
                    start = start / start.sum(-1, keepdim=True)
                self.coefficients[part.replace(".", "_")] = nn.Parameter(start.to(self.device, self._wide))

    def _scale(self, part: str) -> float:
        old, new = self.source_layout, self.target_layout
        if part in ("attn.q.weight", "attn.q.bias") and not old.qk_norm:
            return self._query_scale
        if part == "mlp.fc2.weight":
            return old.hidden / new.hidden
        return math.sqrt(new.dim / old.dim) if part.endswith("gamma") else 1.0

    def _depth(self, name: str) -> Tensor:
        w: Tensor = self.coefficients[name.replace(".", "_")]
        return w

    def _whole(self, factor: Tensor) -> Tensor:
        """A factor [..., n2, n1], with the identity that stands above it in style repo."""
        if self.style == "paper":
            return factor
        same = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        return torch.cat([same.expand(*factor.shape[:-2], *same.shape), factor], -2)

    def _evaluate(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        factors = dict(self.factors.items())
        blocks: dict[str, Tensor] = self._head_norms(self._depth)
        for name, p in self._rests().items():
            if name in blocks or p.writes is None:
                continue
            axis = p.writes[1]
            parts = [
                (part, factors[part.split(".")[1] if axis == "qkv" else axis])
                for part, _ in self._pieces(name, torch.zeros(1, 3))
            ]
            into = None if p.reads is None else factors["v" if p.reads == "rows" else p.reads]
            grown = [self._grow(part, out, into) for part, out in parts]
            blocks[name] = torch.cat(grown, 1) if len(grown) > 1 else grown[0]
        embed = self._whole(factors["embed"]).t()
        return blocks, self._outside(embed, embed)

    def _grow(self, part: str, out: Tensor, into: Tensor | None) -> Tensor:
        """One tensor of all blocks [L2, ...]."""
        stack, w = self._held(part), self._depth(part)
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


def _copies(units: IndexMap, both_sides: bool, noise: float, generator: torch.Generator) -> Tensor:
    factor = units.copy(torch.eye(units.size, dtype=torch.float64), 0)
    if both_sides:
        factor = factor / units.counts[units.index][:, None] ** 0.5
    drawn = torch.randn(factor.shape, generator=generator, dtype=torch.float64)
    return factor + drawn * units.new[:, None] * noise / math.sqrt(units.size)
