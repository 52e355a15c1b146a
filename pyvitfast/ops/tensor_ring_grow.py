"""Small matrices to large ones through a ring of four cores."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from pyvitfast.ops import _checks
from pyvitfast.ops._registration import differentiable
from pyvitfast.ops.kron_grow import kron_grow

NAME = "tensor_ring_grow"
NAMES = ("weight", "s_b", "s_o", "s_l", "s_i")


def _check(tensors: tuple[Any, ...], columns: int) -> None:
    _checks.float_tensors(NAME, list(zip(NAMES, tensors, strict=True)))
    for name, tensor in zip(NAMES, tensors, strict=True):
        if tensor.ndim != 4:
            raise ValueError(f"{NAME}: `{name}` must have 4 modes, got {list(tensor.shape)}.")
    weight, s_b, s_o, s_l, s_i = tensors
    sides = (
        ("s_b", s_b, 1, "slots"),
        ("s_o", s_o, 2, "rows"),
        ("s_l", s_l, 0, "layers"),
        ("s_i", s_i, 3, "columns"),
    )
    for name, core, mode, what in sides:
        if core.shape[1] != weight.shape[mode]:
            raise ValueError(
                f"{NAME}: `{name}` must have the {weight.shape[mode]} {what} of `weight` in its second mode, "
                f"got {list(core.shape)}."
            )
    ring = (
        ("s_b", s_b, "s_o", s_o),
        ("s_o", s_o, "s_l", s_l),
        ("s_l", s_l, "s_i", s_i),
        ("s_i", s_i, "s_b", s_b),
    )
    for first, a, second, b in ring:
        if a.shape[3] != b.shape[0]:
            raise ValueError(
                f"{NAME}: the bond between `{first}` and `{second}` must have one size, got {a.shape[3]} "
                f"and {b.shape[0]}."
            )
    if isinstance(columns, bool) or not isinstance(columns, int):
        raise TypeError(f"{NAME}: `columns` must be a whole number, got {type(columns).__name__}.")
    if not 0 <= columns <= s_b.shape[2]:
        raise ValueError(
            f"{NAME}: `columns` must be from 0 to the {s_b.shape[2]} slots of the target, got {columns}."
        )


def _delays_layers(weight: Tensor, s_b: Tensor, s_o: Tensor, s_l: Tensor, s_i: Tensor) -> bool:
    """Whether layers are better mixed last: with bonds of 1 and more layers in the target."""
    layers, slots, rows, cols = weight.shape
    bonds = [core.shape[0] for core in (s_b, s_o, s_l, s_i)]
    if bonds != [1, 1, 1, 1] or s_l.shape[2] <= layers or 0 in (layers, slots, rows, cols):
        return False
    slots2, rows2, layers2, cols2 = (core.shape[2] for core in (s_b, s_o, s_l, s_i))
    width = slots2 * rows2 * cols * (rows + cols2)
    ring = slots * layers * rows * cols * rows2 + slots2 * layers2 * cols * rows2 * cols2
    return layers * width + slots2 * layers * layers2 * rows2 * cols2 < ring


def _by_layers_last(weight: Tensor, s_b: Tensor, s_o: Tensor, s_l: Tensor, s_i: Tensor) -> Tensor:
    """As one stack of matrices for each target slot, whose layers are mixed by :func:`kron_grow`."""
    b, o, layers, i = (core[0, :, :, 0] for core in (s_b, s_o, s_l, s_i))
    device = weight.device.type
    active = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if active else contextlib.nullcontext():
        mixed = (b.T @ weight.flatten(2)).reshape(len(weight), b.shape[1], *weight.shape[2:])
    d = layers.T.expand(b.shape[1], -1, -1)
    return kron_grow(mixed.transpose(0, 1), i.T, o.T, d).transpose(0, 1).contiguous()


def tensor_ring_grow(
    weight: Tensor, s_b: Tensor, s_o: Tensor, s_l: Tensor, s_i: Tensor, *, columns: int = 0
) -> Tensor | tuple[Tensor, Tensor]:
    r"""All matrices of a network to those of a larger one, each target entry of every source entry.

    :math:`M'_{m,c,p,j} = \sum S_B[r_1,b,c,r_2]\, S_O[r_2,o,p,r_3]\, S_L[r_3,l,m,r_4]\, S_I[r_4,i,j,r_1]\,
    M_{l,b,o,i}` over all indices that are not on the left: Mango's map as a ring of four cores with bonds
    :math:`r_1 \ldots r_4` of any sizes.

    Args:
        weight: M, [L1, B1, O1, I1]: layers, slots, and rows and columns as in ``nn.Linear.weight``. float32,
            bfloat16, float16 or float64.
        s_b: [R1, B1, B2, R2], mixes slots.
        s_o: [R2, O1, O2, R3], rows.
        s_l: [R3, L1, L2, R4], layers.
        s_i: [R4, I1, I2, R1], columns.
        columns: so many of the last target slots are wanted side by side as columns of one matrix a layer,
            as the input blocks of ``mlp.fc2`` are.

    Returns:
        [L2, B2, O2, I2], contiguous; with ``columns`` = k above 0 a pair: [L2, B2 - k, O2, I2] and
        [L2, O2, k I2]. In the widest dtype of the arguments. Differentiable once with respect to all.

    Raises:
        TypeError: not float tensors.
        ValueError: modes, bonds or devices that do not fit.

    Sums are float32, also for 16-bit arguments (which are converted once, and the result back), float64 for
    float64. Their order depends on the shapes alone, so bits do not depend on threads or runs; autocast is
    ignored. With bonds of 1 and more target layers, layers are mixed last where that is cheaper. Else, on
    the CPU, nothing between the cores is kept but a few megabytes a thread and two copies in the kernel's
    order; on CUDA and in the backward pass at most about a quarter of source and target (more only for small
    targets). NaN and Inf spread to all that they meet.

    Source:
        Mango (Pan et al., NeurIPS 2023). The accessible text names four cores in tensor-ring form; the order
        of modes and bonds is our choice.

    Example:
        >>> one = lambda *rows: torch.tensor(rows, dtype=torch.float32)[:, None, None, :]
        >>> cores = one([1, 2], [0, 1]), one([1, 0], [1, 1]), one([2, 0], [0, 1]), one([1, 1], [0, 1])
        >>> pyvitfast.ops.tensor_ring_grow(torch.ones(1, 1, 1, 1), *cores)
        tensor([[[[9.]]]])
    """
    op = _checks.call(NAME)
    given = (weight, s_b, s_o, s_l, s_i)
    _check(given, columns)
    dtype, wide = _checks.widest(given)
    weight, s_b, s_o, s_l, s_i = (t.to(wide) for t in given)
    if _delays_layers(weight, s_b, s_o, s_l, s_i):
        grown = _by_layers_last(weight, s_b, s_o, s_l, s_i).to(dtype)
        if not columns:
            return grown
        kept = grown.shape[1] - columns
        return grown[:, :kept].contiguous(), grown[:, kept:].transpose(1, 2).flatten(2)
    # Each core as the matrix that the kernels multiply with.
    packed = (
        s_b.permute(0, 2, 1, 3),
        s_o.permute(0, 3, 2, 1),
        s_l.permute(2, 3, 1, 0),
        s_i.permute(0, 3, 1, 2),
    )
    main, tail = op(weight.contiguous(), *(core.contiguous() for core in packed), columns)
    if not columns:
        result: Tensor = main.to(dtype)
        return result
    return main.to(dtype), tail.to(dtype)


def _fake(
    weight: Tensor, s_b: Tensor, s_o: Tensor, s_l: Tensor, s_i: Tensor, columns: int
) -> tuple[Tensor, Tensor]:
    layers, slots, rows, width = s_l.shape[0], s_b.shape[1], s_o.shape[2], s_i.shape[3]
    return (
        weight.new_empty((layers, slots - columns, rows, width)),
        weight.new_empty((layers, rows, columns * width)),
    )


def _fake_backward(
    grad: Tensor, grad_tail: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *cores, of_source = rest
    made = [torch.empty_like(core, memory_format=torch.contiguous_format) for core in cores]
    source = (
        torch.empty_like(weight, memory_format=torch.contiguous_format) if of_source else grad.new_empty(0)
    )
    return source, made[0], made[1], made[2], made[3]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5])


def _backward(ctx: Any, grad: Tensor, grad_tail: Tensor) -> tuple[Any, ...]:
    of_source = ctx.needs_input_grad[0]
    slopes = torch.ops.pyvitfast.tensor_ring_grow_backward(grad, grad_tail, *ctx.saved_tensors, of_source)
    return (slopes[0] if of_source else None, *slopes[1:], None)


def _flops(weight: Any, s_b: Any, s_o: Any, s_l: Any, s_i: Any, *_: Any, **__: Any) -> int:
    layers, slots, rows, cols = weight
    (r1, slots2, _, r2), (_, r3, rows2, _), (layers2, r4, _, _), cols2 = s_b, s_o, s_l, s_i[3]
    first = layers * slots * r2 * r3 * rows * cols
    second = layers * r3 * r1 * slots2 * slots * r2 * cols
    third = layers2 * r4 * layers * r3 * r1 * slots2 * cols
    fourth = layers2 * slots2 * r4 * r1 * cols * cols2
    return int(2 * rows2 * (first + second + third + fourth))


differentiable(
    NAME,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    fake_backward=_fake_backward,
    flops=_flops,
)
