"""Exact zeros in the dead rows and columns of many tensors, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyvitfast.ops import _checks

NAME = "structured_zero_"


def _cols(tensor: Tensor) -> int:
    return tensor.shape[1] if tensor.ndim == 2 else 1


def _check(
    tensors: Sequence[Tensor], row_alive: Sequence[Tensor | None], col_alive: Sequence[Tensor | None]
) -> None:
    _checks.tensor_list(NAME, "tensors", tensors)
    named = [(f"tensors[{i}]", t) for i, t in enumerate(tensors)]
    for argument, masks in (("row_alive", row_alive), ("col_alive", col_alive)):
        _checks.optional_list(NAME, argument, masks, len(tensors))
        named += [(f"{argument}[{i}]", m) for i, m in enumerate(masks) if m is not None]
    _checks.same_device(NAME, named)
    for name, tensor in named:
        _checks.dense(NAME, name, tensor)
    for i, (tensor, rows, cols) in enumerate(zip(tensors, row_alive, col_alive, strict=True)):
        if tensor.ndim == 0:
            raise ValueError(f"{NAME}: `tensors[{i}]` must have rank 1 or more, got a scalar.")
        if tensor.ndim > 2 and cols is not None:
            raise ValueError(
                f"{NAME}: `tensors[{i}]` must have rank 1 or 2 when `col_alive[{i}]` is given, "
                f"got shape {list(tensor.shape)}; pass a 2-D view."
            )
        sizes = (("row_alive", rows, tensor.shape[0]), ("col_alive", cols, _cols(tensor)))
        for argument, mask, size in sizes:
            if mask is None:
                continue
            _checks.dtype_in(NAME, f"{argument}[{i}]", mask, (torch.bool,))
            if mask.ndim != 1 or mask.shape[0] != size:
                raise ValueError(
                    f"{NAME}: `{argument}[{i}]` must have shape [{size}] for `tensors[{i}]` "
                    f"{list(tensor.shape)}, got {list(mask.shape)}."
                )


def structured_zero_(
    tensors: Sequence[Tensor],
    row_alive: Sequence[Tensor | None],
    col_alive: Sequence[Tensor | None],
) -> None:
    """Store exact 0 in every row and column that is not alive; leave the rest untouched.

    Args:
        tensors: n tensors of any dtype and strides, written in place: weights, gradients or optimizer
            state. Rank 1 counts as [O, 1]; rank 3 and more as [O, rest], with a row mask only.
        row_alive: n masks, each bool [O] or None (all alive).
        col_alive: n masks, each bool [I] or None.

    Raises:
        TypeError: not lists of tensors, or a mask that is not bool.
        ValueError: lengths, shapes or devices that do not match, or rows that cannot be viewed in place.

    A store, not a product, so NaN and Inf in dead entries go too. Writes dead entries only. Not
    differentiable: parameters are changed outside the graph, as under ``torch.no_grad``.

    Example:
        >>> w = torch.ones(2, 3)
        >>> pyvitfast.ops.structured_zero_([w], [torch.tensor([True, False])], [None])
        >>> w
        tensor([[1., 1., 1.],
                [0., 0., 0.]])
    """
    op = _checks.call(NAME)
    _check(tensors, row_alive, col_alive)
    if not tensors:
        return
    masks, places = _checks.slots([*row_alive, *col_alive])
    if not masks:
        return
    views = [_checks.rows_view(NAME, f"tensors[{i}]", t.detach()) for i, t in enumerate(tensors)]
    op(views, masks, places[: len(tensors)], places[len(tensors) :])


def _fake(tensors: list[Tensor], masks: list[Tensor], row_mask: list[int], col_mask: list[int]) -> None:
    def at(places: list[int]) -> list[Tensor | None]:
        return [masks[p] if p >= 0 else None for p in places]

    _check(tensors, at(row_mask), at(col_mask))


if _checks.defined():
    torch.library.register_fake(f"pyvitfast::{NAME}", _fake)
