"""The sample table of an op: one set of inputs for every check."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pyvitfast import ops

EMULATED = os.environ.get("PYVITFAST_BACKEND") == "emulated"

# One below, at and above each tile and warp size, and primes.
SIZES = (0, 1, 2, 3, 7, 19, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)


def devices() -> list[str]:
    return ["cpu"] + (["cuda"] if ops.available("saliency_rowcol", "cuda") else [])


@dataclass(frozen=True)
class Sample:
    """Inputs of one call. ``make`` draws them for a dtype; an index dtype is not affected by it."""

    name: str
    make: Callable[[torch.dtype], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class BadCall:
    """A call that must raise ``error`` with a message matching ``match``."""

    name: str
    error: type[Exception]
    match: str
    make: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class OpTable:
    """All that the checks of test_every_op.py need to know of an op.

    ``bound`` gives, from the inputs and the float64 result, how far each output may be off.
    ``mutated`` picks the tensors an in-place op writes out of its arguments.
    ``inputs`` picks the differentiable tensors out of args and kwargs; None: not differentiable.
    ``surrogate`` says that the gradient is not the function's own, so that differences of values are not it.
    ``gradient_slack`` widens the bound of gradients that are long sums. ``casts`` says that autocast sets
    the dtype of the result.
    """

    op: str
    samples: list[Sample]
    bad_calls: list[BadCall]
    bound: Callable[[tuple[Any, ...], dict[str, Any], Any, torch.dtype], list[Tensor]]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    mutated: Callable[[tuple[Any, ...]], list[Tensor]] | None = None
    inputs: Callable[[tuple[Any, ...], dict[str, Any]], list[Tensor]] | None = None
    gradient_slack: float = 1.0
    surrogate: bool = False
    casts: bool = False


def outputs_of(table: OpTable, function: Callable[..., Any], args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors a call gives: its results, or the arguments it wrote."""
    result = function(*args, **kwargs)
    if table.mutated is not None:
        assert result is None
        return table.mutated(args)
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]


def cloned(tree: Any) -> Any:
    """The same tensors in memory of their own, strides kept; a tensor met twice stays one tensor."""
    seen: dict[int, Tensor] = {}

    def clone(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in seen:
            copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
            seen[id(value)] = copy.copy_(value.detach())
        return seen[id(value)]

    return pytree.tree_map(clone, tree)


def to(tree: Any, device: str) -> Any:
    seen: dict[int, Tensor] = {}
    move = lambda v: seen.setdefault(id(v), v.to(device)) if isinstance(v, Tensor) else v  # noqa: E731
    return pytree.tree_map(move, tree)


def widened(tree: Any) -> Any:
    """Float tensors as float64, the precision of the reference."""
    seen: dict[int, Tensor] = {}

    def widen(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return seen.setdefault(id(value), value.detach().to(torch.float64))

    return pytree.tree_map(widen, tree)


class RecordedCalls(TorchDispatchMode):
    """The arguments with which a registered op is called inside."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.overload = getattr(torch.ops.pyvitfast, op).default
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is self.overload:
            self.calls.append(cloned(args))
        return function(*args, **(kwargs or {}))


def strided(tensor: Tensor, layout: str) -> Tensor:
    """The same values laid out another way."""
    if layout == "transposed" and tensor.ndim == 2:
        return tensor.t().contiguous().t()
    if layout == "step":
        wide = torch.zeros([2 * n for n in tensor.shape], dtype=tensor.dtype)
        view = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
        return view.copy_(tensor)
    if layout == "offset":
        flat = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
        return flat[1:].view(tensor.shape).copy_(tensor)
    if layout == "padded" and tensor.ndim == 2:
        wide = torch.zeros(tensor.shape[0], tensor.shape[1] + 3, dtype=tensor.dtype)
        return wide[:, : tensor.shape[1]].copy_(tensor)
    return tensor.contiguous()


LAYOUTS = ("contiguous", "transposed", "step", "offset", "padded")
