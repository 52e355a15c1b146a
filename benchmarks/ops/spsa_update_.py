"""The estimate written over the gradients of a DeiT, and all that FOGZO adds beside forward passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Case, Peer
from benchmarks.ops.scaled_sqnorm import deit
from benchmarks.ops.spsa_perturb import EPS_BAR, SHARE
from pyvitfast import ops, reference


def naive(weights: list[Tensor], grads: list[Tensor], alpha: float, slope: Tensor) -> list[Tensor]:
    """Norm, perturbed weights of both signs and update as a loop over tensors.

    Both signs are kept, as a forward pass needs all layers of one at once.
    """
    norm = torch.stack([(alpha * g).norm() for g in grads]).norm()
    directions, sides = [], []
    for w, g in zip(weights, grads, strict=True):
        v = (1 - SHARE) ** 0.5 * (alpha * g / norm) + SHARE**0.5 * torch.randn_like(w)
        directions.append(v)
        for sign in (1, -1):
            moved = w + sign * EPS_BAR * alpha * v
            sides.append(((moved / alpha - 0.5).round().clamp(-2, 1) + 0.5) * alpha)
    return [*sides, *(slope * v / alpha for v in directions)]


def with_foreach(weights: list[Tensor], grads: list[Tensor], alpha: float, slope: Tensor) -> list[Tensor]:
    """The same by ``torch._foreach``."""
    norm = torch.stack(torch._foreach_norm(grads)).norm() * alpha
    v = [torch.randn_like(w) for w in weights]
    torch._foreach_mul_(v, SHARE**0.5)
    torch._foreach_add_(v, torch._foreach_mul(grads, (1 - SHARE) ** 0.5 * alpha / norm))
    sides = []
    for sign in (1, -1):
        q = torch._foreach_add(weights, v, alpha=sign * EPS_BAR * alpha)
        torch._foreach_div_(q, alpha)
        torch._foreach_sub_(q, 0.5)
        torch._foreach_round_(q)
        torch._foreach_clamp_min_(q, -2)
        torch._foreach_clamp_max_(q, 1)
        torch._foreach_add_(q, 0.5)
        torch._foreach_mul_(q, alpha)
        sides += q
    torch._foreach_mul_(v, (slope / alpha)[0])
    return [*sides, *v]


def cases(device: str, quick: bool) -> Iterator[Case]:
    """The update alone with 1 and 4 directions, and norm + perturb + update."""
    name, weights, grads, scales = deit(device, quick)
    count = sum(w.numel() for w in weights)
    norm = ops.scaled_sqnorm(grads, scales)
    given = [g.clone() for g in grads]

    def reset() -> None:
        torch._foreach_copy_(given, grads)

    for n in (1, 4):
        slopes = torch.linspace(0.5, 1.0, n, device=device)
        options: dict[str, Any] = {"seed": 1, "one_minus_beta": SHARE}

        def ours(slopes: Tensor = slopes, options: dict[str, Any] = options) -> list[Tensor]:
            ops.spsa_update_(given, scales, slopes, norm, **options)
            return given

        def eager(slopes: Tensor = slopes, n: int = n) -> None:
            for g in given:
                total = torch.zeros_like(g)
                for slope in slopes:
                    v = (1 - SHARE) ** 0.5 * 0.03 * g / norm.sqrt().float() + SHARE**0.5 * torch.randn_like(g)
                    total += slope / (n * 0.03) * v
                g.copy_(total)

        def expected(slopes: Tensor = slopes, options: dict[str, Any] = options) -> list[Tensor]:
            out = [g.clone() for g in grads]
            reference.spsa_update_(out, scales, slopes, norm, **options)
            return out

        yield Case(
            op="spsa_update_",
            case=f"{name} n={n}",
            shape=f"{len(grads)} matrices",
            dtype="float32",
            direction="forward",
            ours=ours,
            peers={"randn_like": Peer(eager, same=False, note="draws other noise")},
            expected=expected,
            least_bytes=8 * count,
            tolerance=1e-6,
            before=reset,
        )

    slope = torch.ones(1, device=device)

    def whole() -> list[Tensor]:
        sqnorm = ops.scaled_sqnorm(given, scales)
        ops.spsa_perturb(
            weights, given, scales, sqnorm, seed=1, one_minus_beta=SHARE, eps_bar=EPS_BAR, bits=2,
            grid="half_integer",
        )  # fmt: skip
        ops.spsa_update_(given, scales, slope, sqnorm, seed=1, one_minus_beta=SHARE)
        return given

    def expected_whole() -> list[Tensor]:
        out = [g.clone() for g in grads]
        reference.spsa_update_(out, scales, slope, norm, seed=1, one_minus_beta=SHARE)
        return out

    note = "draws other noise of the same kind of cost"
    yield Case(
        op="spsa_update_",
        case=f"{name} norm + perturb + update",
        shape=f"{len(grads)} matrices",
        dtype="float32",
        direction="forward",
        ours=whole,
        peers={
            "randn_like": Peer(lambda: naive(weights, given, 0.03, slope), same=False, note=note),
            "foreach": Peer(lambda: with_foreach(weights, given, 0.03, slope), same=False, note=note),
        },
        expected=expected_whole,
        least_bytes=28 * count,
        tolerance=1e-6,
        before=reset,
    )
