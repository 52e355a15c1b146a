"""Argument checks that several ops share; each message names op, argument, rule and what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def call(name: str) -> Any:
    """``torch.ops.pyvitfast.<name>``, or an ImportError with the reason why it is not there."""
    from pyvitfast.ops import STATUS

    if not STATUS.loaded:
        raise ImportError(f"{name}: {STATUS.reasons['cpu']}. pyvitfast.reference.{name} works without it.")
    return getattr(torch.ops.pyvitfast, name).default


def defined() -> bool:
    """Whether the schemas are registered, so that fakes and gradients can be attached."""
    from pyvitfast.ops import STATUS

    return bool(STATUS.loaded)


def has_data(tensor: Tensor) -> bool:
    """Whether values can be looked at: not while tracing, nor on CUDA at the cost of a host sync."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not is_fake(tensor)


def tensor_list(
    op: str, argument: str, value: Sequence[Tensor], like: Sequence[Tensor] | None = None
) -> None:
    """A list of tensors on one device, as long as ``like``."""
    if isinstance(value, Tensor) or not isinstance(value, Sequence):
        raise TypeError(f"{op}: `{argument}` must be a list of tensors, got {type(value).__name__}.")
    for index, item in enumerate(value):
        if not isinstance(item, Tensor):
            raise TypeError(f"{op}: `{argument}[{index}]` must be a tensor, got {type(item).__name__}.")
    if like is not None and len(value) != len(like):
        raise ValueError(f"{op}: `{argument}` must have {len(like)} entries, got {len(value)}.")


def optional_list(op: str, argument: str, value: Sequence[Tensor | None], count: int) -> None:
    """A list of tensors or None with ``count`` entries."""
    if isinstance(value, Tensor) or not isinstance(value, Sequence):
        raise TypeError(f"{op}: `{argument}` must be a list of tensors or None, got {type(value).__name__}.")
    if len(value) != count:
        raise ValueError(f"{op}: `{argument}` must have {count} entries, one a tensor, got {len(value)}.")
    for index, item in enumerate(value):
        if item is not None and not isinstance(item, Tensor):
            raise TypeError(
                f"{op}: `{argument}[{index}]` must be a tensor or None, got {type(item).__name__}."
            )


def same_device(op: str, named: Sequence[tuple[str, Tensor]]) -> None:
    """All tensors on the device of the first, and that device one we have kernels for."""
    if not named:
        return
    first_name, first = named[0]
    for name, tensor in named[1:]:
        if tensor.device != first.device:
            raise ValueError(
                f"{op}: `{name}` must be on the device of `{first_name}` ({first.device}), "
                f"got {tensor.device}."
            )
    if first.device.type not in ("cpu", "cuda", "meta"):
        raise NotImplementedError(
            f"{op}: kernels exist for cpu and cuda, got {first.device}; use pyvitfast.reference.{op}."
        )


def dense(op: str, argument: str, tensor: Tensor) -> None:
    """A strided tensor, not a sparse or quantised one."""
    if tensor.layout is not torch.strided:
        raise TypeError(f"{op}: `{argument}` must be a strided tensor, got layout {tensor.layout}.")


def dtype_in(op: str, argument: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """A dtype out of ``allowed``."""
    if tensor.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(
            f"{op}: `{argument}` must have dtype {names}, got {str(tensor.dtype).removeprefix('torch.')}."
        )


def float_tensors(op: str, named: Sequence[tuple[str, Any]]) -> None:
    """Strided tensors of a float dtype on one device."""
    for name, tensor in named:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: `{name}` must be a tensor, got {type(tensor).__name__}.")
        dense(op, name, tensor)
        dtype_in(op, name, tensor, FLOATS)
    same_device(op, named)


def widest(tensors: Sequence[Tensor]) -> tuple[torch.dtype, torch.dtype]:
    """The widest dtype among float tensors, and the one that sums of it are made in."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype, torch.float64 if dtype == torch.float64 else torch.float32


def slots(values: Sequence[Tensor | None]) -> tuple[list[Tensor], list[int]]:
    """The tensors of ``values``, and for each place the index of its tensor or -1.

    A tensor that stands in many places is passed once, except while tracing, where its identity would
    become a guard and so a recompilation.
    """
    tensors: list[Tensor] = []
    seen: dict[int, int] = {}
    places = []
    tracing = torch.compiler.is_compiling()
    for value in values:
        if value is None:
            places.append(-1)
        elif not tracing and id(value) in seen:
            places.append(seen[id(value)])
        else:
            if not tracing:
                seen[id(value)] = len(tensors)
            places.append(len(tensors))
            tensors.append(value)
    return tensors, places


def _neighbours(tensor: Tensor, order: Sequence[int]) -> bool:
    step = 1
    for dim in reversed(order):
        if tensor.shape[dim] != 1 and tensor.stride(dim) != step:
            return False
        step = step * tensor.shape[dim]
    return True


def rows_view(op: str, argument: str, tensor: Tensor) -> Tensor:
    """``tensor`` of rank 3 or more as [O, rest] without a copy: trailing dims contiguous or channels-last."""
    if tensor.ndim <= 2:
        return tensor
    orders = [list(range(1, tensor.ndim)), [*range(2, tensor.ndim), 1]]
    for order in orders:
        if _neighbours(tensor, order):
            return tensor.permute(0, *order).view(tensor.shape[0], -1)
    raise ValueError(
        f"{op}: `{argument}` of shape {list(tensor.shape)} and strides {list(tensor.stride())} cannot be "
        "viewed as rows in place; pass a contiguous or channels-last tensor, or a 2-D view of it."
    )
