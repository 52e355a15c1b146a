"""What the attention ops share: checks of shapes and dtypes, autocast, and the limit of the CUDA kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyvitfast.ops import _checks


def autocast(tensor: Tensor) -> bool:
    """Whether autocast is active on the tensor's device."""
    device = tensor.device.type
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def _refuse_dtype(op: str, name: str, tensor: Tensor, first_name: str, first: Tensor) -> TypeError:
    want, got = (str(t.dtype).removeprefix("torch.") for t in (first, tensor))
    return TypeError(
        f"{op}: `{name}` must have the dtype of `{first_name}`, {want}, got {got}; autocast may mix all but "
        "float64."
    )


def projected(op: str, query: Tensor, present: dict[str, Tensor], num_heads: Any) -> None:
    """``query`` [B, ..., C] and what attention over rows of C channels takes besides.

    ``tokens*`` must be [B, N, C], other names ending in ``_weight`` [C, C] and vectors [C]; all in the
    query's dtype outside autocast, but for the norm's.
    """
    batch, channels = query.shape[0], query.shape[-1]
    if isinstance(num_heads, bool) or not isinstance(num_heads, int | torch.SymInt):
        raise TypeError(f"{op}: `num_heads` must be a whole number, got {type(num_heads).__name__}.")
    if num_heads < 1 or channels < 1 or channels % num_heads:
        raise ValueError(f"{op}: `num_heads` must divide the {channels} channels, got {num_heads}.")
    for name, tensor in present.items():
        if name.startswith("tokens"):
            if tensor.ndim != 3 or tensor.shape[0] != batch or tensor.shape[2] != channels:
                raise ValueError(
                    f"{op}: `{name}` must have shape [B, N, C] with the B and C of `query` "
                    f"{list(query.shape)}, got {list(tensor.shape)}."
                )
        elif name != "query":
            matrix = name.endswith("_weight") and name != "norm_weight"
            if tuple(tensor.shape) != ((channels, channels) if matrix else (channels,)):
                rule = "[C, C]" if matrix else "[C]"
                raise ValueError(
                    f"{op}: `{name}` must have shape {rule}, C {channels}, got {list(tensor.shape)}."
                )
    if "norm_bias" in present and "norm_weight" not in present:
        raise ValueError(f"{op}: `norm_bias` needs `norm_weight`; ones give LayerNorm without a factor.")
    _checks.same_device(op, list(present.items()))
    mixed = autocast(query)
    for name, tensor in present.items():
        if tensor.dtype == query.dtype:
            continue
        # LayerNorm often keeps float32 parameters in a 16-bit model, as torch allows.
        loose = mixed or name.startswith("norm")
        if torch.float64 in (tensor.dtype, query.dtype) or not loose:
            raise _refuse_dtype(op, name, tensor, "query", query)


def mixed_dtypes(op: str, named: list[tuple[str, Tensor]]) -> list[Tensor]:
    """The tensors in one dtype: autocast's where it is active and they differ; else they must not."""
    tensors = [tensor for _, tensor in named]
    first_name, first = named[0]
    for name, tensor in named[1:]:
        if tensor.dtype == first.dtype:
            continue
        if not autocast(tensor) or torch.float64 in (first.dtype, tensor.dtype):
            raise _refuse_dtype(op, name, tensor, first_name, first)
        dtype = torch.get_autocast_dtype(tensor.device.type)
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
