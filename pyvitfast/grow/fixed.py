"""Growth by fixed rules: every tensor of the target from the source's, by index maps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from pyvitfast.grow.layout import Layout, Parameter, Stage
from pyvitfast.grow.rules import (
    IndexMap,
    LayerMap,
    advanced_expand,
    of_heads,
    random_map,
    round_robin,
    with_means,
)
from pyvitfast.grow.swin import SwinLayout

AnyLayout: TypeAlias = Layout | SwinLayout
WIDTHS = ("fpi", "net2net", "aki", "average")


@dataclass(frozen=True, eq=False)
class Growth:
    """What a method is asked to do.

    Args:
        state: the source's state dict; position embeddings have the target's grid already.
        source: layout of ``state``.
        target: layout of the target.
        width: width rule: ``fpi``, ``net2net``, ``aki`` or ``average``; or the name of a learned operator.
        depth: depth rule: ``stack``, ``stack_top``, ``interleave`` or ``identity``.
        maps: map of each axis of the source's stages.
        layers: map of the blocks of each stage.
        noise: standard deviation of the noise on new rows and columns, relative to the tensor's entries.
        seed: of all that is drawn.
        neuron_wise: AKI takes new columns from the next layer too.
    """

    state: Mapping[str, Tensor] = field(repr=False)
    source: AnyLayout
    target: AnyLayout
    width: str
    depth: str
    maps: Mapping[str, IndexMap]
    layers: tuple[LayerMap, ...]
    noise: float
    seed: int
    neuron_wise: bool

    def origin(self, key: str) -> tuple[str, str, bool]:
        """Where a target's parameter comes from.

        Returns:
            The source's name of it, the name of the same in the next layer, which for the last one is its
            own, and whether it is in a block that shall add nothing.
        """
        for old, stage, layers in zip(self.source.stages, self.target.stages, self.layers, strict=True):
            if key.startswith(f"{stage.prefix}."):
                number, _, rest = key.removeprefix(f"{stage.prefix}.").partition(".")
                layer = layers.index[int(number)]
                names = [f"{old.prefix}.{i}.{rest}" for i in (layer, min(layer + 1, old.depth - 1))]
                return names[0], names[1], layers.inserted[int(number)]
        return key, key, False


def index_maps(
    source: AnyLayout, target: AnyLayout, width: str, seed: int, given: Mapping[str, Tensor]
) -> dict[str, IndexMap]:
    """The map of each axis by a width rule, or as given by name for ``embed``, ``heads`` and ``hidden``.

    Raises:
        ValueError: a map of another axis, of another length, or with wrong entries.
    """
    generator = torch.Generator().manual_seed(seed)
    maps: dict[str, IndexMap] = {}
    known: list[str] = []
    for a, b in zip(source.stages, target.stages, strict=True):
        for kind, size in (("embed", "dim"), ("heads", "heads"), ("hidden", "hidden")):
            axis, n1, n2 = a.axis(kind), getattr(a, size), getattr(b, size)
            known.append(axis)
            if axis in given:
                if len(given[axis]) != n2:
                    raise ValueError(
                        f"grow: maps[{axis!r}] must have an entry for each of the target's {n2} units, got "
                        f"{len(given[axis])}."
                    )
                maps[axis] = IndexMap(given[axis], n1)
            else:
                maps[axis] = _rule(kind, width, a, b, n1, n2, generator)
        rows = of_heads(maps[a.axis("heads")], a.head_dim, b.head_dim)
        maps[a.axis("rows")] = rows
        maps[a.axis("qkv")] = rows.repeated(3)
        maps[a.axis("head_dim")] = round_robin(a.head_dim, b.head_dim)
        if not maps[a.axis("embed")].means:
            maps[a.axis("merge")] = maps[a.axis("embed")].repeated(4)
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"grow: `maps` must have keys among {known}, got {unknown}.")
    return maps


def _rule(
    kind: str, width: str, a: Stage, b: Stage, n1: int, n2: int, generator: torch.Generator
) -> IndexMap:
    if width == "net2net":
        return random_map(n1, n2, generator)
    if width == "average" and kind == "embed":
        return with_means(n1, n2)
    if kind == "hidden" and a.hidden % a.dim == 0 and a.hidden * b.dim == b.hidden * a.dim:
        # Piece by piece, as the slots of stack_vit have it, so that a map of slots can say the same.
        return round_robin(a.dim, b.dim).repeated(a.hidden // a.dim)
    return round_robin(n1, n2)


def grow_fixed(growth: Growth) -> dict[str, Tensor]:
    """The target's state dict by the rules of ``growth``, its classifiers included; new tensors.

    Values beyond the maps, each our choice or the source's:

    - Heads that grow by a factor c: queries (or their norm) are divided by the root of c, since the target
      divides by the root of its own, larger head width.
    - Mean units of ``average``: what is added to the stream is averaged after LayerScale, norms give 0
      there, and the columns that read them are drawn with the spread of the weight, so that the units differ
      once training moves them. A head that reads the stream without a norm gets 0.
    - Noise: independent normal numbers on new rows and columns of matrices.
    - AKI takes matrices and biases of the blocks from the next layer; norms and all else are copied.
    """
    generator = torch.Generator().manual_seed(growth.seed)
    return {
        key: _tensor(growth, key, p, generator)
        for key, p in growth.target.parameters().items()
        if growth.source.num_classes == growth.target.num_classes or p.writes is not None
    }


def _tensor(growth: Growth, key: str, p: Parameter, generator: torch.Generator) -> Tensor:
    name, after, inserted = growth.origin(key)
    tensor, maps = growth.state[name], growth.maps
    out = maps[p.writes[1]] if p.writes else None
    into = maps[p.reads] if p.reads else None
    if out is None and into is None:
        return tensor.clone()
    if p.kind == "norm_weight" and out:
        # The mean units add nothing to the variance but count in its denominator.
        grown = out.copy(tensor, 0, 0.0) * (len(out.index) / (len(out.index) + out.means)) ** 0.5
    elif p.kind == "norm_bias" and out:
        grown = out.copy(tensor, 0, 0.0)
    elif p.kind == "gamma" and out:
        grown = out.copy(tensor, 0, 1.0)
    elif p.kind in ("token", "table") and out and p.writes:
        grown = out.copy(tensor, p.writes[0])
    else:
        in_block = any(name.startswith(f"{s.prefix}.") for s in growth.source.stages)
        grown = _linear(growth, name, after if in_block and growth.width == "aki" else name, out, into)
        if into is not None and into.means and (in_block or growth.source.final_norm):
            free = torch.randn(grown.shape[0], into.means, generator=generator).to(grown)
            grown[:, -into.means :] = free * tensor.std()
    grown = scaled_queries(growth, key, grown)
    if growth.noise and p.kind == "weight":
        new = torch.zeros(grown.shape[:2], dtype=torch.bool)
        if out is not None:
            new |= out.new[:, None]
        if into is not None:
            new |= into.new
        noise = torch.randn(grown.shape, generator=generator).to(grown)
        new = new.to(grown.device).view(*new.shape, *[1] * (grown.ndim - 2))
        grown = grown + new * noise * growth.noise * grown.square().mean().sqrt()
    if inserted and key.split(".")[-2] in ("proj", "fc2"):
        grown = torch.zeros_like(grown)
    return grown


def _linear(growth: Growth, name: str, after: str, out: IndexMap | None, into: IndexMap | None) -> Tensor:
    tensor, following = growth.state[name], growth.state[after]
    if after != name and out is not None:
        if into is None:
            return torch.where(out.new.to(tensor.device), out.copy(following, 0), out.copy(tensor, 0))
        outgoing = name.endswith(("attn.proj.weight", "mlp.fc2.weight"))
        return advanced_expand(tensor, following, out, into, growth.neuron_wise and outgoing)
    split = tensor if into is None else into.split(tensor, 1)
    if out is None:
        return split
    block, _, layer = name.rpartition(".")[0].rpartition(".")
    scale = f"{block.rpartition('.')[0]}.ls{1 if layer == 'proj' else 2}.gamma"
    if not out.means or layer not in ("proj", "fc2") or scale not in growth.state:
        return out.copy(split, 0)
    gamma = growth.state[scale].view(-1, *[1] * (split.ndim - 1))
    return out.copy(split, 0, (gamma * split).mean(0, keepdim=True))


def scaled_queries(growth: Growth, key: str, grown: Tensor) -> Tensor:
    """A tensor of the target, multiplied for a larger width of heads where it makes queries."""
    for old, stage in zip(growth.source.stages, growth.target.stages, strict=True):
        factor = math.sqrt(old.head_dim / stage.head_dim)
        if factor == 1 or not key.startswith(f"{stage.prefix}."):
            continue
        if ".q_norm." in key:
            return grown * factor
        if ".attn.qkv." in key and not growth.source.qk_norm:
            rows = grown.shape[0] // 3
            return torch.cat([grown[:rows] * factor, grown[rows:]])
    return grown
