"""What a set of widths costs: the budget that pruning works towards."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from pyvitfast.models.architecture import Config, Dims


@runtime_checkable
class Cost(Protocol):
    """A cost of widths, in any unit; a latency table is one."""

    def query(self, dims: Any) -> float:
        """The cost of a model with these widths, :class:`ViTDims` or :class:`SwinDims`."""
        ...

    def delta(self, dims: Any) -> list[float]:
        """What one unit fewer saves: in ``embed``, then by block in ``head``, ``qk``, ``v``, ``mlp``."""
        ...


class _Counted:
    def __init__(self, config: Config) -> None:
        self._config = config

    def _count(self, config: Config) -> int:
        raise NotImplementedError

    def query(self, dims: Dims) -> float:
        config: Any = self._config  # dims of its own family, which the type does not say
        return float(self._count(config.prune(dims)))

    def delta(self, dims: Dims) -> list[float]:
        now = self.query(dims)
        return [now - self.query(smaller) for smaller in dims.one_fewer()]


class MacsCost(_Counted):
    """Multiply-accumulates of one image, from the ``macs`` of the architecture."""

    def _count(self, config: Config) -> int:
        return config.macs()


class ParamsCost(_Counted):
    """Number of parameters, from the ``params`` of the architecture."""

    def _count(self, config: Config) -> int:
        return config.params()
