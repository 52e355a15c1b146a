"""Quantised weights on both sides of random directions, with noise that is never stored."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyvitfast.ops import _checks, _quantizer

NAME = "spsa_perturb"


def _check(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    scales: Sequence[Tensor],
    sqnorm: Tensor,
    one_minus_beta: float,
    eps_bar: float,
    direction: int,
    directions: int,
    group_size: int,
    dtype: torch.dtype,
) -> None:
    _quantizer.scaled(NAME, "weights", weights, scales, group_size)
    _quantizer.like(NAME, "grads", grads, "weights", weights)
    for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
        if weight.dtype in (torch.bfloat16, torch.float16):
            raise TypeError(
                f"{NAME}: `weights[{i}]` must be float32, got {str(weight.dtype).removeprefix('torch.')}: in "
                "16 bits the perturbation would be rounded away. Perturb the float32 master weights."
            )
        _checks.dtype_in(NAME, f"weights[{i}]", weight, (torch.float32,))
        _checks.dtype_in(NAME, f"grads[{i}]", grad, _quantizer.NARROW)
    _quantizer.one_number(NAME, "sqnorm", sqnorm, (torch.float64,))
    if weights:
        _checks.same_device(NAME, [("weights[0]", weights[0]), ("sqnorm", sqnorm)])
    _quantizer.fraction(NAME, one_minus_beta)
    if not 0 <= eps_bar < math.inf:
        raise ValueError(f"{NAME}: `eps_bar` must be a finite number of at least 0, got {eps_bar}.")
    _quantizer.whole(NAME, "direction", direction, 0, 2**32)
    _quantizer.whole(NAME, "directions", directions, 1, 2**31)
    if dtype not in _quantizer.NARROW:
        raise TypeError(f"{NAME}: `dtype` must be float32, bfloat16 or float16, got {dtype}.")


def spsa_perturb(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    scales: Sequence[Tensor],
    sqnorm: Tensor,
    *,
    seed: int,
    one_minus_beta: float,
    eps_bar: float,
    bits: int,
    grid: str = "integer",
    kind: str = "uniform",
    direction: int = 0,
    directions: int = 1,
    group_size: int = 0,
    tensor_ids: Sequence[int] | None = None,
    offsets: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    r"""Perturb and quantise many weights along n directions, both signs, in one pass.

    For each direction i, :math:`v = \sqrt\beta\,c_i\,s\odot g/\lVert s\odot g\rVert + \sqrt{1-\beta}\,u_i`
    with a coin :math:`c_i=\pm1` and noise :math:`u_i`; the result is
    :math:`Q(w \pm \bar\varepsilon\, s \odot v)`, where Q rounds to the grid of scale s.

    Args:
        weights: n tensors, float32, any shape. Any strides; what is not contiguous is copied once.
        grads: n tensors of the same shapes, float32, bfloat16 or float16: the straight-through gradient.
        scales: n tensors, float32: one entry, one a row [O], or [O, ceil(I / group_size)].
        sqnorm: float64, one element, from :func:`scaled_sqnorm`. 0 or a value that is not finite leaves the
            guided part out.
        seed: 64 bits, the key of the generator.
        one_minus_beta: share of the noise, from 0 to 1; in float64, where 1e-9 is not lost.
        eps_bar: radius in units of the scale.
        bits: 1 to 8.
        grid: ``integer`` (codes -2^(b-1) .. 2^(b-1)-1, two bits at least), ``half_integer`` (those plus one
            half, no zero) or ``sign`` (-1 and 1, one bit; 0 counts as positive).
        kind: noise of mean 0 and variance 1: uniform, rademacher, triangular, logistic or normal.
        direction: number of the first direction.
        directions: how many.
        group_size: columns that share a scale; 0 where none do.
        tensor_ids: id of each tensor, below 2^32; by default its place in the list.
        offsets: place of the first element of each tensor in the whole one, for shards; 0 by default.
        dtype: of the results: float32 (default), bfloat16 or float16.

    Returns:
        Two lists of n contiguous tensors [directions, *shape]: for the positive and the negative sign.

    Raises:
        TypeError: not lists of tensors, or a dtype that is not allowed: 16-bit weights would round the
            perturbation away.
        ValueError: shapes, devices, or values that do not fit, such as a grid that its bits do not.

    Weights and gradients are read once for all directions and not written. Noise depends on (seed, tensor id,
    direction, element) alone: the same bits on CPU and CUDA, for any threads, lists, launches or shards. NaN
    weights give NaN. Not differentiable.

    Source:
        FOGZO (Yang and Aamodt, NeurIPS 2025), Algorithm 1. Scaled coordinates, the addressing of Philox and
        the order of roundings are our choices.

    Example:
        >>> w, g, s = torch.tensor([0.3, -0.2]), torch.tensor([3.0, -4.0]), torch.tensor(0.25)
        >>> norm = pyvitfast.ops.scaled_sqnorm([g], [s])
        >>> plus, minus = pyvitfast.ops.spsa_perturb(
        ...     [w], [g], [s], norm, seed=0, one_minus_beta=0.0, eps_bar=0.5, bits=2, grid="half_integer"
        ... )
        >>> plus[0], minus[0]
        (tensor([[ 0.1250, -0.1250]]), tensor([[ 0.3750, -0.3750]]))
    """
    op = _checks.call(NAME)
    out = dtype or torch.float32
    _check(weights, grads, scales, sqnorm, one_minus_beta, eps_bar, direction, directions, group_size, out)
    ids, starts = _quantizer.places(NAME, len(weights), tensor_ids, offsets)
    codes = _quantizer.noise(NAME, kind), _quantizer.grid(NAME, grid, bits)
    key = _quantizer.signed(NAME, seed)
    count = len(weights)
    if not count:
        return [], []
    lists = [[t.detach() for t in tensors] for tensors in (weights, grads, scales)]
    numbers = (direction, directions, float(one_minus_beta), float(eps_bar), *codes, bits, group_size)
    sides: list[Tensor] = op(*lists, sqnorm, key, ids, starts, *numbers, out)
    return sides[:count], sides[count:]


def _fake(
    weights: list[Tensor],
    grads: list[Tensor],
    scales: list[Tensor],
    sqnorm: Tensor,
    seed: int,
    tensor_ids: list[int],
    offsets: list[int],
    direction: int,
    directions: int,
    one_minus_beta: float,
    eps_bar: float,
    noise: int,
    grid: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    _check(weights, grads, scales, sqnorm, one_minus_beta, eps_bar, direction, directions, group_size, dtype)
    return [w.new_empty((directions, *w.shape), dtype=dtype) for _ in range(2) for w in weights]


if _checks.defined():
    torch.library.register_fake(f"pyvitfast::{NAME}", _fake)
