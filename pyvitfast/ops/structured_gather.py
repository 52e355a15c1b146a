"""Kept rows and columns of many tensors, gathered in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyvitfast.ops import _checks
from pyvitfast.ops._registration import differentiable

NAME = "structured_gather"


def _check(
    tensors: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    cols: Sequence[Tensor | None],
    row_scale: Sequence[Tensor | None] | None,
    col_scale: Sequence[Tensor | None] | None,
) -> None:
    _checks.tensor_list(NAME, "tensors", tensors)
    count = len(tensors)
    none: list[Tensor | None] = [None] * count
    row_scale, col_scale = row_scale or none, col_scale or none
    named = [(f"tensors[{i}]", t) for i, t in enumerate(tensors)]
    for argument, values in (
        ("rows", rows),
        ("cols", cols),
        ("row_scale", row_scale),
        ("col_scale", col_scale),
    ):
        _checks.optional_list(NAME, argument, values, count)
        named += [(f"{argument}[{i}]", v) for i, v in enumerate(values) if v is not None]
    _checks.same_device(NAME, named)
    for name, tensor in named:
        _checks.dense(NAME, name, tensor)
    for i, tensor in enumerate(tensors):
        if tensor.ndim == 0:
            raise ValueError(f"{NAME}: `tensors[{i}]` must have rank 1 or more, got a scalar.")
        if tensor.ndim != 2 and (cols[i] is not None or col_scale[i] is not None):
            raise ValueError(
                f"{NAME}: `tensors[{i}]` must have rank 2 when `cols[{i}]` or `col_scale[{i}]` is given, "
                f"got shape {list(tensor.shape)}; pass a 2-D view."
            )
        sizes = [
            tensor.shape[0] if rows[i] is None else rows[i].shape[0],  # type: ignore[union-attr]
            tensor.shape[-1] if cols[i] is None else cols[i].shape[0],  # type: ignore[union-attr]
        ]
        for argument, index in (("rows", rows[i]), ("cols", cols[i])):
            if index is not None:
                _checks.dtype_in(NAME, f"{argument}[{i}]", index, (torch.int32, torch.int64))
                if index.ndim != 1:
                    raise ValueError(
                        f"{NAME}: `{argument}[{i}]` must have rank 1, got shape {list(index.shape)}."
                    )
        for argument, scale, size in (
            ("row_scale", row_scale[i], sizes[0]),
            ("col_scale", col_scale[i], sizes[1]),
        ):
            if scale is None:
                continue
            _checks.dtype_in(NAME, f"`tensors[{i}]` with a scale".strip("`"), tensor, _checks.FLOATS)
            wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
            _checks.dtype_in(NAME, f"{argument}[{i}]", scale, (wide,))
            if scale.ndim != 1 or scale.shape[0] != size:
                raise ValueError(
                    f"{NAME}: `{argument}[{i}]` must have shape [{size}], one factor a kept entry, "
                    f"got {list(scale.shape)}."
                )
            if scale.requires_grad:
                raise NotImplementedError(f"{NAME}: `{argument}[{i}]` is a constant; detach it.")


def _check_bounds(
    tensors: Sequence[Tensor], rows: Sequence[Tensor | None], cols: Sequence[Tensor | None]
) -> None:
    seen: set[tuple[int, int]] = set()
    for argument, indices, dim in (("rows", rows, 0), ("cols", cols, -1)):
        for i, (tensor, index) in enumerate(zip(tensors, indices, strict=True)):
            size = tensor.shape[dim]
            if index is None or index.numel() == 0 or (id(index), size) in seen:
                continue
            seen.add((id(index), size))
            low, high = (int(v) for v in torch.aminmax(index))
            if low < 0 or high >= size:
                raise ValueError(
                    f"{NAME}: `{argument}[{i}]` must lie in [0, {size}), got values from {low} to {high}."
                )


def structured_gather(
    tensors: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    cols: Sequence[Tensor | None],
    *,
    row_scale: Sequence[Tensor | None] | None = None,
    col_scale: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    r"""The kept rows and columns of each tensor.

    :math:`\text{out}_{ij} = r_i\,c_j\,w[\text{rows}_i, \text{cols}_j]`

    Args:
        tensors: n tensors of any dtype and strides, [O, I] or [O]; rank 3 and more as [O, rest] with rows
            only. Weights and optimizer state alike.
        rows: n index tensors, int32 or int64 [O'], or None for all rows.
        cols: n index tensors [I'], or None for all columns. Sorted indices run fastest; order and repeats
            are free.
        row_scale: n float32 factors [O'] (float64 for float64 tensors) or None. Without a scale the copy is
            bit-exact.
        col_scale: n factors [I'] or None.

    Returns:
        n new contiguous tensors [O', I'] of the inputs' dtypes. Differentiable once with respect to
        ``tensors``; the scales are constants.

    Raises:
        TypeError: not lists of tensors, index or scale of another dtype.
        ValueError: lengths, shapes or devices that do not match, or an index out of range. For indices on
            CUDA the kernel checks, at the price of one host sync a call, and raises RuntimeError.

    One pass over the kept entries; ``w[rows][:, cols]`` writes and reads a temporary of O' x I.

    Example:
        >>> w = torch.arange(6.0).view(2, 3)
        >>> pyvitfast.ops.structured_gather([w], [torch.tensor([1])], [torch.tensor([0, 2])])
        [tensor([[3., 5.]])]
    """
    op = _checks.call(NAME)
    _check(tensors, rows, cols, row_scale, col_scale)
    if not tensors:
        return []
    if _checks.has_data(tensors[0]):
        _check_bounds(tensors, rows, cols)
    count = len(tensors)
    indices, index_places = _checks.slots([*rows, *cols])
    none: list[Tensor | None] = [None] * count
    scales, scale_places = _checks.slots([*(row_scale or none), *(col_scale or none)])
    matrices = [t if t.ndim <= 2 else t.flatten(1) for t in tensors]
    out: list[Tensor] = op(
        matrices,
        indices,
        index_places[:count],
        index_places[count:],
        scales,
        scale_places[:count],
        scale_places[count:],
    )
    return [o if t.ndim <= 2 else o.view(-1, *t.shape[1:]) for o, t in zip(out, tensors, strict=True)]


def _at(tensors: Sequence[Tensor], places: Sequence[int]) -> list[Tensor | None]:
    return [tensors[p] if p >= 0 else None for p in places]


def _fake(
    tensors: list[Tensor],
    indices: list[Tensor],
    rows: list[int],
    cols: list[int],
    scales: list[Tensor],
    row_scale: list[int],
    col_scale: list[int],
) -> list[Tensor]:
    row_index, col_index = _at(indices, rows), _at(indices, cols)
    _check(tensors, row_index, col_index, _at(scales, row_scale), _at(scales, col_scale))
    out = []
    for tensor, row, col in zip(tensors, row_index, col_index, strict=True):
        shape = [tensor.shape[0] if row is None else row.shape[0]]
        if tensor.ndim == 2:
            shape.append(tensor.shape[1] if col is None else col.shape[0])
        out.append(tensor.new_empty(shape))
    return out


def _fake_backward(
    grads: list[Tensor],
    indices: list[Tensor],
    orders: list[Tensor],
    rows: list[int],
    cols: list[int],
    scales: list[Tensor],
    row_scale: list[int],
    col_scale: list[int],
    row_sizes: list[int],
    col_sizes: list[int],
) -> list[Tensor]:
    out = []
    for grad, row_size, col_size in zip(grads, row_sizes, col_sizes, strict=True):
        out.append(grad.new_empty([row_size, col_size] if grad.ndim == 2 else [row_size]))
    return out


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, indices, rows, cols, scales, row_scale, col_scale = inputs
    ctx.places = (rows, cols, row_scale, col_scale)
    ctx.sizes = ([t.shape[0] for t in tensors], [t.shape[1] if t.ndim == 2 else 1 for t in tensors])
    ctx.indices = len(indices)
    ctx.save_for_backward(*indices, *scales)


def _backward(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    rows, cols, row_scale, col_scale = ctx.places
    # Sorted indices let each input entry find its readers, so repeats add up in a fixed order.
    by_value = [torch.sort(index.long(), stable=True) for index in saved[: ctx.indices]]
    out = torch.ops.pyvitfast.structured_gather_backward(
        [g.contiguous() for g in grads],
        [pair.values for pair in by_value],
        [pair.indices for pair in by_value],
        rows,
        cols,
        list(saved[ctx.indices :]),
        row_scale,
        col_scale,
        *ctx.sizes,
    )
    constants = [None] * ctx.indices, None, None, [None] * (len(saved) - ctx.indices), None, None
    return list(out), *constants


differentiable(
    NAME, fake=_fake, setup_context=_setup_context, backward=_backward, fake_backward=_fake_backward
)
