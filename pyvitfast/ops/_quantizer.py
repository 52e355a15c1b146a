"""Names, codes and checks that the quantisation ops share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyvitfast.ops import _checks
from pyvitfast.reference._quantizer import GRIDS, MASKS
from pyvitfast.reference._spsa import NOISES

NARROW = (torch.float32, torch.bfloat16, torch.float16)
_OF_SIGN = ("identity", "hardtanh", "tanh", "approx_sign")
_OF_GRIDS = ("lsq", "rounded", "identity")


def one_of(op: str, argument: str, value: str, known: Sequence[str]) -> int:
    """The code of ``value``, its place in ``known``."""
    if value not in known:
        raise ValueError(f"{op}: `{argument}` must be one of {', '.join(known)}, got {value!r}.")
    return known.index(value)


def whole(op: str, argument: str, value: int, least: int, past: int | None = None) -> None:
    """An int from ``least`` on and below ``past``."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{op}: `{argument}` must be an int, got {type(value).__name__}.")
    if value < least or (past is not None and value >= past):
        rule = f"at least {least}" if past is None else f"from {least} to {past - 1}"
        raise ValueError(f"{op}: `{argument}` must be {rule}, got {value}.")


def grid(op: str, name: str, bits: int) -> int:
    """The code of a grid, which ``bits`` must fit."""
    code = one_of(op, "grid", name, GRIDS)
    whole(op, "bits", bits, 1, 9)
    if name == "sign" and bits != 1:
        raise ValueError(f"{op}: `grid` 'sign' has two levels and needs `bits` 1, got {bits}.")
    if name == "integer" and bits == 1:
        raise ValueError(
            f"{op}: `grid` 'integer' with `bits` 1 has the levels -scale and 0 only; use 'sign' or "
            "'half_integer'."
        )
    return code


def mask(op: str, name: str, grid_name: str) -> int:
    """The code of a mask, which must go with the grid."""
    code = one_of(op, "mask", name, MASKS)
    fitting = _OF_SIGN if grid_name == "sign" else _OF_GRIDS
    if name not in fitting:
        raise ValueError(
            f"{op}: `mask` must be one of {', '.join(fitting)} with `grid` {grid_name!r}, got {name!r}."
        )
    return code


def noise(op: str, kind: str) -> int:
    """The code of a kind of noise."""
    return one_of(op, "kind", kind, NOISES)


def fraction(op: str, one_minus_beta: float) -> None:
    """A share from 0 to 1."""
    if not 0 <= one_minus_beta <= 1:
        raise ValueError(f"{op}: `one_minus_beta` must be from 0 to 1, got {one_minus_beta}.")


def signed(op: str, seed: int) -> int:
    """A seed of 64 bits as the schema's signed integer."""
    whole(op, "seed", seed, 0, 2**64)
    return seed - 2**64 if seed >= 2**63 else seed


def places(
    op: str, count: int, tensor_ids: Sequence[int] | None, offsets: Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """Ids and offsets of the tensors, by default 0, 1, 2, ... and 0."""
    ids = list(range(count)) if tensor_ids is None else list(tensor_ids)
    starts = [0] * count if offsets is None else list(offsets)
    for argument, values, past in (("tensor_ids", ids, 2**32), ("offsets", starts, None)):
        if len(values) != count:
            raise ValueError(f"{op}: `{argument}` must have {count} entries, got {len(values)}.")
        for i, value in enumerate(values):
            whole(op, f"{argument}[{i}]", value, 0, past)
    return ids, starts


def scaled(op: str, argument: str, tensors: Sequence[Tensor], scales: Sequence[Tensor], group: int) -> None:
    """A scale tensor for each tensor: one entry, one a row, or one for each group of columns."""
    _checks.tensor_list(op, argument, tensors)
    _checks.tensor_list(op, "scales", scales, tensors)
    whole(op, "group_size", group, 0)
    named = [(f"{argument}[{i}]", t) for i, t in enumerate(tensors)]
    named += [(f"scales[{i}]", s) for i, s in enumerate(scales)]
    _checks.same_device(op, named)
    for name, tensor in named:
        _checks.dense(op, name, tensor)
    for i, (tensor, scale) in enumerate(zip(tensors, scales, strict=True)):
        wide = tensor.dtype == torch.float64
        _checks.dtype_in(op, f"scales[{i}]", scale, (torch.float64 if wide else torch.float32,))
        if scale.numel() == 1 or tensor.numel() == 0:
            continue
        rows = tensor.shape[0] if tensor.ndim else 1
        columns = tensor.numel() // rows
        groups = math.ceil(columns / group) if group else 1
        if scale.numel() not in (rows, rows * groups):
            grouped = f", or [{rows}, {groups}] for groups of {group}" if group else ""
            raise ValueError(
                f"{op}: `scales[{i}]` must have 1 entry, or {rows}, one a row{grouped}, for "
                f"`{argument}[{i}]` {list(tensor.shape)}, got {list(scale.shape)}."
            )


def like(op: str, argument: str, tensors: Sequence[Tensor], other: str, others: Sequence[Tensor]) -> None:
    """Tensors with the shapes and the device of ``others``."""
    _checks.tensor_list(op, argument, tensors, others)
    for i, (tensor, model) in enumerate(zip(tensors, others, strict=True)):
        _checks.dense(op, f"{argument}[{i}]", tensor)
        _checks.same_device(op, [(f"{other}[{i}]", model), (f"{argument}[{i}]", tensor)])
        if tensor.shape != model.shape:
            raise ValueError(
                f"{op}: `{argument}[{i}]` must have the shape of `{other}[{i}]` {list(model.shape)}, got "
                f"{list(tensor.shape)}."
            )


def one_number(op: str, argument: str, value: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """A tensor of one element."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: `{argument}` must be a tensor, got {type(value).__name__}.")
    _checks.dtype_in(op, argument, value, dtypes)
    if value.numel() != 1:
        raise ValueError(f"{op}: `{argument}` must have one element, got shape {list(value.shape)}.")
