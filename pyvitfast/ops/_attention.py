"""What the attention ops share: checks of dtypes, autocast, and the limit of the CUDA kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def mixed_dtypes(op: str, named: list[tuple[str, Tensor]]) -> list[Tensor]:
    """The tensors in one dtype: autocast's where it is active and they differ; else they must not."""
    tensors = [tensor for _, tensor in named]
    first = tensors[0].dtype
    for name, tensor in named[1:]:
        if tensor.dtype == first:
            continue
        device = tensor.device.type
        cast = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
        if not cast or torch.float64 in (first, tensor.dtype):
            want, got = (str(d).removeprefix("torch.") for d in (first, tensor.dtype))
            raise TypeError(
                f"{op}: `{name}` must have the dtype of `{named[0][0]}`, {want}, got {got}; autocast may mix "
                "all but float64."
            )
        dtype = torch.get_autocast_dtype(device)
        return [t.to(dtype) for t in tensors]
    return tensors


def pair_of_keys(op: str, k_before: Any, v_before: Any) -> None:
    """Both or neither."""
    if (k_before is None) != (v_before is None):
        raise ValueError(f"{op}: `k_before` and `v_before` go together, got only one of them.")


def same_shape(op: str, name: str, tensor: Tensor, shape: tuple[Any, ...], rule: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: `{name}` must have shape {rule}, {list(shape)}, got {list(tensor.shape)}.")


def fits(tensor: Tensor) -> bool:
    """Whether the CUDA kernels hold a head this wide; the CPU has no limit."""
    return tensor.device.type != "cuda" or tensor.shape[-1] <= 128


def sums(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def number(op: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{op}: `{name}` must be a number, got {type(value).__name__}.")
    return value  # type: ignore[return-value]
