"""Fixed rules of growth: which source unit or layer each target unit or layer comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class IndexMap:
    """For each target unit, the source unit that it copies.

    As matrices: E [n2, n1] has a one in each row, and its columns are divided by their counts in the second
    matrix, so that E^T times it is the identity.

    Args:
        index: int64 [n2], in [0, ``size``); every source unit occurs.
        size: number of source units n1.
        means: further target units, which carry the mean of all source units.

    Raises:
        ValueError: not int64 or not one-dimensional, an index out of range, or a source unit without a copy.
    """

    index: Tensor
    size: int
    means: int = 0

    def __post_init__(self) -> None:
        if self.index.dtype != torch.int64 or self.index.ndim != 1:
            raise ValueError(
                f"grow: an index map must be int64 of one dimension, got {self.index.dtype} of shape "
                f"{tuple(self.index.shape)}. Make it with torch.tensor([...])."
            )
        if set(self.index.tolist()) != set(range(self.size)):
            raise ValueError(
                f"grow: an index map must name every source unit 0...{self.size - 1} and no other, got "
                f"{self.index.tolist()[:20]}. Start it with torch.arange({self.size})."
            )

    @property
    def counts(self) -> Tensor:
        """Copies of each source unit, int64 [n1]."""
        return torch.bincount(self.index, minlength=self.size)

    @property
    def uniform(self) -> bool:
        """Every source unit has as many copies, and none is a mean: LayerNorm statistics stay."""
        return not self.means and bool((self.counts == self.counts[0]).all())

    @property
    def new(self) -> Tensor:
        """Which target units are not the first copy of their source, bool [n2 + means]."""
        place = torch.arange(len(self.index))
        first = torch.full((self.size,), len(place)).scatter_reduce_(0, self.index, place, "amin")
        return torch.cat([place != first[self.index], torch.ones(self.means, dtype=torch.bool)])

    def repeated(self, times: int) -> IndexMap:
        """The map of ``times`` such axes laid side by side."""
        shifts = torch.arange(times).repeat_interleave(len(self.index)) * self.size
        return IndexMap(self.index.repeat(times) + shifts, self.size * times)

    def copy(self, tensor: Tensor, dim: int, mean: float | Tensor | None = None) -> Tensor:
        """E times ``tensor`` along ``dim``.

        ``mean`` is what the mean units get instead of the mean: a number, or a tensor of size 1 in ``dim``.
        """
        copies = tensor.index_select(dim, self.index.to(tensor.device))
        if not self.means:
            return copies
        shape = list(copies.shape)
        shape[dim] = self.means
        if isinstance(mean, float):
            return torch.cat([copies, copies.new_full(shape, mean)], dim)
        rest = tensor.mean(dim, keepdim=True) if mean is None else mean
        return torch.cat([copies, rest.expand(shape)], dim)

    def split(self, tensor: Tensor, dim: int) -> Tensor:
        """Copies along ``dim``, each divided by the number of copies of its source; mean units get 0."""
        shape = [1] * tensor.ndim
        shape[dim] = len(self.index)
        index = self.index.to(tensor.device)
        copies = tensor.index_select(dim, index) / self.counts.to(tensor.device)[index].view(shape)
        if not self.means:
            return copies
        shape = list(copies.shape)
        shape[dim] = self.means
        return torch.cat([copies, copies.new_zeros(shape)], dim)


def round_robin(source: int, target: int) -> IndexMap:
    """Unit j copies unit j mod ``source``; uniform when ``target`` is a multiple."""
    return IndexMap(torch.arange(target) % source, source)


def random_map(source: int, target: int, generator: torch.Generator) -> IndexMap:
    """Each unit beyond ``source`` copies one drawn at random.

    Source:
        Net2Net (Chen, Goodfellow, Shlens, ICLR 2016), section 2.2.
    """
    more = torch.randint(source, (target - source,), generator=generator)
    return IndexMap(torch.cat([torch.arange(source), more]), source)


def with_means(source: int, target: int) -> IndexMap:
    """As many whole copies as fit; the units left over carry the mean of all.

    Source:
        LEMON (Wang et al., ICLR 2024), average expansion.
    """
    times, rest = divmod(target, source)
    return IndexMap(torch.arange(source).repeat(times), source, rest)


def of_heads(heads: IndexMap, source_dim: int, target_dim: int) -> IndexMap:
    """The map of all rows of q, k or v from one of whole heads; dims in a head are copied round robin."""
    dims = torch.arange(target_dim) % source_dim
    index = (heads.index[:, None] * source_dim + dims).flatten()
    return IndexMap(index, heads.size * source_dim)


def expand(weight: Tensor, out: IndexMap, into: IndexMap) -> Tensor:
    """Function-preserving expansion of a linear layer: columns divided by their counts, rows copied.

    Args:
        weight: [out, in], any float dtype.
        out: map of the rows.
        into: map of the columns.

    Returns:
        A new tensor [out2, in2].

    Source:
        Net2Net (Chen, Goodfellow, Shlens, ICLR 2016); bert2BERT (Chen et al., ACL 2022), FPI.
    """
    return out.copy(into.split(weight, 1), 0)


def advanced_expand(
    weight: Tensor, following: Tensor, out: IndexMap, into: IndexMap, neuron_wise: bool = False
) -> Tensor:
    """Advanced knowledge initialisation: new units come from the next layer.

    Args:
        weight: [out, in], any float dtype.
        following: the same weight of the next layer; of the last layer, its own.
        out: map of the rows.
        into: map of the columns.
        neuron_wise: new columns come from the next layer too. False is bert2BERT's formula, in which only
            rows do.

    Returns:
        A new tensor [out2, in2].

    Source:
        bert2BERT (Chen et al., ACL 2022), AKI.
    """
    new = out.new[:, None] | into.new if neuron_wise else out.new[:, None]
    return torch.where(new.to(weight.device), expand(following, out, into), expand(weight, out, into))


@dataclass(frozen=True)
class LayerMap:
    """For each target block, the source block that it copies.

    Args:
        index: source block of each target block.
        inserted: which target blocks are made to add nothing to the residual stream.
    """

    index: tuple[int, ...]
    inserted: tuple[bool, ...]


def _kept(index: Sequence[int]) -> LayerMap:
    return LayerMap(tuple(index), (False,) * len(index))


def stack(source: int, target: int, alternating: bool = False) -> LayerMap:
    """Block l copies block l mod ``source``.

    Source:
        StackBERT (Gong et al., ICML 2019).
    """
    return _kept([i % source for i in range(target)])


def stack_top(source: int, target: int, alternating: bool = False) -> LayerMap:
    """As many whole copies as fit; the blocks left over copy the top ones.

    Source:
        bert2BERT (Chen et al., ACL 2022).
    """
    times, rest = divmod(target, source)
    return _kept([*list(range(source)) * times, *range(source - rest, source)])


def interleave(source: int, target: int, alternating: bool = False) -> LayerMap:
    """Copies of a block follow it: block l copies block ⌊l · source / target⌋.

    With ``alternating`` blocks (Swin shifts every other window) pairs are repeated where both depths are
    even; that is our choice.

    Source:
        Chang et al. (2017); Dong et al. (2020).
    """
    if alternating and source % 2 == 0 and target % 2 == 0:
        return _kept([2 * (i // 2 * source // target) + i % 2 for i in range(target)])
    return _kept([i * source // target for i in range(target)])


def identity(source: int, target: int, alternating: bool = False) -> LayerMap:
    """Blocks that add nothing stand after the blocks of which they are copies, as :func:`interleave` has it.

    With ``alternating`` blocks all of them stand at the end, where no window's shift changes.

    Where they stand is our choice. A pre-norm block adds nothing when the weights and biases of ``attn.proj``
    and ``mlp.fc2`` are 0.
    """
    if alternating:
        index = tuple(i % source for i in range(target))
        return LayerMap(index, tuple(i >= source for i in range(target)))
    index = interleave(source, target).index
    return LayerMap(index, tuple(i > 0 and index[i - 1] == index[i] for i in range(target)))


LayerRule = Callable[[int, int, bool], LayerMap]
DEPTH: dict[str, LayerRule] = {
    "stack": stack,
    "stack_top": stack_top,
    "interleave": interleave,
    "identity": identity,
}
