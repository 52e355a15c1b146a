"""Noise of the SPSA ops: Philox4x32-10 by index, and the directions made of it."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from pyvitfast.reference._quantizer import fused_multiply_add

NOISES = ("uniform", "rademacher", "triangular", "logistic", "normal")
_Word = TypeVar("_Word", int, Tensor)
_MASK = 0xFFFFFFFF
_SQRT3, _SQRT6 = 1.7320507764816284, 2.4494898319244385  # rounded to float32
_LOGISTIC = math.pi / math.sqrt(12)


def philox(counter: list[_Word], seed: int, rounds: int = 10) -> list[_Word]:
    """Four words of 32 bits, as ints or int64 tensors, for each counter of four such words."""

    def multiply(factor: int, word: _Word) -> tuple[_Word, _Word]:
        upper = factor * (word >> 16) + (factor * (word & 0xFFFF) >> 16)
        return upper >> 16, (factor * word) & _MASK

    c0, c1, c2, c3 = counter
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(rounds):
        high0, low0 = multiply(0xD2511F53, c0)
        high1, low1 = multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _MASK, (key1 + 0xBB67AE85) & _MASK
    return [c0, c1, c2, c3]


def _fraction(word: Tensor) -> Tensor:
    """Odd multiples of 2^-24 in (-1, 1), float32 and exact."""
    signed = torch.where(word >= 2**31, word - 2**32, word) >> 8
    return (2 * signed + 1).float() * 2.0**-24


def noise(
    seed: int, tensor_id: int, direction: int, start: int, count: int, kind: str, device: torch.device
) -> Tensor:
    """Entries start .. start + count - 1 of the noise of a tensor: float32 [count], mean 0, variance 1."""
    index = torch.arange(start, start + count, device=device)
    block = index >> (7 if kind == "rademacher" else 2)
    full = torch.full_like(block, tensor_id & _MASK)
    words = torch.stack(
        philox([block & _MASK, block >> 32, full, torch.full_like(block, direction & _MASK)], seed)
    )
    if kind == "rademacher":
        word = words.gather(0, (index >> 5 & 3)[None])[0]
        return 1.0 - 2.0 * (word >> (index & 31) & 1).float()
    own = words.gather(0, (index & 3)[None])[0]
    if kind == "normal":
        pair = (index & 2)[None]
        first, second = words.gather(0, pair)[0], words.gather(0, pair + 1)[0]
        radius = (-2 * (((first >> 8) + 1).double() * 2.0**-24).log()).sqrt()
        angle = math.pi * _fraction(second).double()
        return (radius * torch.where(index & 1 == 0, angle.cos(), angle.sin())).float()
    f = _fraction(own)
    if kind == "uniform":
        return f * _SQRT3
    if kind == "triangular":
        # Through float64: torch's float32 root is not always the nearest.
        return torch.copysign((1 - (1 - f.abs()).double().sqrt().float()) * _SQRT6, f)
    return (f.double().atanh() / _LOGISTIC).float()


def direction_sign(seed: int, direction: int) -> float:
    """The fair coin of a direction, 1 or -1."""
    return -1.0 if philox([_MASK, _MASK, _MASK, direction & _MASK], seed)[0] >> 31 else 1.0


def direction_of(
    scaled_grad: Tensor, sqnorm: Tensor, sign: float, one_minus_beta: float, drawn: Tensor
) -> Tensor:
    """sqrt(beta) * sign * g / ||g|| + sqrt(1 - beta) * u; without the first part where the norm is 0 or not
    finite.
    """
    norm = sqnorm.double().sqrt()
    guided = math.sqrt(1 - one_minus_beta) * sign / norm
    usable = (norm > 0) & norm.isfinite()
    along = torch.where(usable, guided, 0.0).to(scaled_grad.dtype)
    part = torch.where(usable, along * scaled_grad, torch.zeros_like(scaled_grad))
    spread = torch.tensor(math.sqrt(one_minus_beta), dtype=scaled_grad.dtype, device=scaled_grad.device)
    return fused_multiply_add(spread, drawn.to(scaled_grad.dtype).view(scaled_grad.shape), part)
