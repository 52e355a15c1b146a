"""The SPSA estimate written over the gradient, from noise made anew."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyvitfast.ops import _checks, _quantizer

NAME = "spsa_update_"


def _check(
    grads: Sequence[Tensor],
    scales: Sequence[Tensor],
    slopes: Tensor,
    sqnorm: Tensor,
    one_minus_beta: float,
    direction: int,
    group_size: int,
) -> None:
    _quantizer.scaled(NAME, "grads", grads, scales, group_size)
    for i, grad in enumerate(grads):
        _checks.dtype_in(NAME, f"grads[{i}]", grad, _quantizer.NARROW)
    if not isinstance(slopes, Tensor):
        raise TypeError(f"{NAME}: `slopes` must be a tensor, got {type(slopes).__name__}.")
    _checks.dtype_in(NAME, "slopes", slopes, (torch.float32, torch.float64))
    if slopes.numel() == 0:
        raise ValueError(f"{NAME}: `slopes` must have one entry a direction, got none.")
    _quantizer.one_number(NAME, "sqnorm", sqnorm, (torch.float64,))
    if grads:
        _checks.same_device(NAME, [("grads[0]", grads[0]), ("slopes", slopes), ("sqnorm", sqnorm)])
    _quantizer.fraction(NAME, one_minus_beta)
    _quantizer.whole(NAME, "direction", direction, 0, 2**32)


def spsa_update_(
    grads: Sequence[Tensor],
    scales: Sequence[Tensor],
    slopes: Tensor,
    sqnorm: Tensor,
    *,
    seed: int,
    one_minus_beta: float,
    kind: str = "uniform",
    direction: int = 0,
    group_size: int = 0,
    tensor_ids: Sequence[int] | None = None,
    offsets: Sequence[int] | None = None,
) -> None:
    r"""Write :math:`G = \frac1n \sum_i \frac{c_i}{s} \odot v_i` over each gradient g.

    :math:`v_i` are the directions of :func:`spsa_perturb`, made anew from the same arguments and from g, and
    :math:`c_i` the slopes measured along them.

    Args:
        grads: n tensors of any shape, float32, bfloat16 or float16, written in place. Any strides; what is
            not contiguous is copied once and back.
        scales: n tensors, float32: one entry, one a row [O], or [O, ceil(I / group_size)].
        slopes: float32 or float64, one entry a direction, read on the device: no host sync.
        sqnorm: float64, one element, from :func:`scaled_sqnorm` of the same gradients.
        seed: as given to :func:`spsa_perturb`, and so are the following.
        one_minus_beta: share of the noise.
        kind: of the noise.
        direction: number of the first direction.
        group_size: columns that share a scale; 0 where none do.
        tensor_ids: id of each tensor.
        offsets: place of the first element of each tensor in the whole one.

    Raises:
        TypeError: not lists of tensors, or a dtype that is not allowed.
        ValueError: shapes, devices or values that do not fit.

    Each gradient is read and written once, for any number of directions. Directions are added in order by
    fused multiply-adds, in the same bits on CPU and CUDA. Not differentiable.

    Source:
        FOGZO (Yang and Aamodt, NeurIPS 2025), Algorithm 1; dividing by each layer's scale is our choice.

    Example:
        >>> g, s, slope = torch.tensor([3.0, -4.0]), torch.tensor(0.25), torch.tensor([-2.0])
        >>> norm = pyvitfast.ops.scaled_sqnorm([g], [s])
        >>> pyvitfast.ops.spsa_update_([g], [s], slope, norm, seed=0, one_minus_beta=0.0)
        >>> g
        tensor([ 4.8000, -6.4000])
    """
    op = _checks.call(NAME)
    _check(grads, scales, slopes, sqnorm, one_minus_beta, direction, group_size)
    ids, starts = _quantizer.places(NAME, len(grads), tensor_ids, offsets)
    code, key = _quantizer.noise(NAME, kind), _quantizer.signed(NAME, seed)
    if not grads:
        return
    lists = [[t.detach() for t in tensors] for tensors in (grads, scales)]
    op(*lists, slopes, sqnorm, key, ids, starts, direction, float(one_minus_beta), code, group_size)


def _fake(
    grads: list[Tensor],
    scales: list[Tensor],
    slopes: Tensor,
    sqnorm: Tensor,
    seed: int,
    tensor_ids: list[int],
    offsets: list[int],
    direction: int,
    one_minus_beta: float,
    noise: int,
    group_size: int,
) -> None:
    _check(grads, scales, slopes, sqnorm, one_minus_beta, direction, group_size)


if _checks.defined():
    torch.library.register_fake(f"pyvitfast::{NAME}", _fake)
