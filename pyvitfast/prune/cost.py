"""What a set of widths costs: the budget that pruning works towards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol, runtime_checkable

from pyvitfast.models.config import ViTConfig
from pyvitfast.models.vision_transformer import ViTDims


@runtime_checkable
class Cost(Protocol):
    """A cost of widths, in any unit; a latency table is one."""

    def query(self, dims: ViTDims) -> float:
        """The cost of a model with these widths."""
        ...

    def delta(self, dims: ViTDims) -> list[float]:
        """What one unit fewer saves: in ``embed``, then by block in ``head``, ``qk``, ``v``, ``mlp``."""
        ...


def one_fewer(dims: ViTDims) -> Iterator[ViTDims]:
    """``dims`` with one unit fewer in each structure in turn, in the order of :meth:`Cost.delta`."""
    yield replace(dims, embed_dim=dims.embed_dim - 1)
    for i, block in enumerate(dims.blocks):
        for name in ("heads", "qk_dim", "v_dim", "mlp"):
            smaller = replace(block, **{name: getattr(block, name) - 1})
            yield replace(dims, blocks=(*dims.blocks[:i], smaller, *dims.blocks[i + 1 :]))


class _Counted:
    def __init__(self, count: Callable[[ViTDims], int]) -> None:
        self._count = count

    def query(self, dims: ViTDims) -> float:
        return float(self._count(dims))

    def delta(self, dims: ViTDims) -> list[float]:
        now = self.query(dims)
        return [now - self.query(smaller) for smaller in one_fewer(dims)]


class MacsCost(_Counted):
    """Multiply-accumulates of one image, from :meth:`pyvitfast.models.ViTConfig.macs`."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(lambda dims: config.prune(dims).macs())


class ParamsCost(_Counted):
    """Number of parameters, from :meth:`pyvitfast.models.ViTConfig.params`."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(lambda dims: config.prune(dims).params())
