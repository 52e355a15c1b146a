"""Perturbed and quantised weights of a DeiT, against loops that draw and keep their noise."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.measure import Case, Peer
from benchmarks.ops.scaled_sqnorm import deit
from pyvitfast import ops, reference

EPS_BAR, SHARE = 0.28867513, 0.01


def cases(device: str, quick: bool) -> Iterator[Case]:
    """Two bits, one direction, both signs. The peers' noise is another, so their values are."""
    name, weights, grads, scales = deit(device, quick)
    norm = ops.scaled_sqnorm(grads, scales)
    options = {"seed": 1, "one_minus_beta": SHARE, "eps_bar": EPS_BAR, "bits": 2, "grid": "half_integer"}
    alpha = 0.03

    def rounded(w: torch.Tensor) -> torch.Tensor:
        return ((w / alpha - 0.5).round().clamp(-2, 1) + 0.5) * alpha

    def one(w: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        v = (1 - SHARE) ** 0.5 * alpha * g / norm.sqrt().float() + SHARE**0.5 * torch.randn_like(g)
        return rounded(w + EPS_BAR * alpha * v), rounded(w - EPS_BAR * alpha * v)

    compiled = torch.compile(one, dynamic=True)

    def foreach() -> list[torch.Tensor]:
        v = torch._foreach_mul([torch.randn_like(g) for g in grads], SHARE**0.5)
        torch._foreach_add_(v, grads, alpha=float((1 - SHARE) ** 0.5 * alpha / norm.sqrt()))
        out = []
        for sign in (EPS_BAR * alpha, -EPS_BAR * alpha):
            q = torch._foreach_add(weights, v, alpha=sign)
            torch._foreach_div_(q, alpha)
            torch._foreach_sub_(q, 0.5)
            torch._foreach_round_(q)
            torch._foreach_clamp_min_(q, -2)
            torch._foreach_clamp_max_(q, 1)
            torch._foreach_add_(q, 0.5)
            torch._foreach_mul_(q, alpha)
            out += q
        return out

    other = "draws other noise of the same kind of cost"
    pairs = list(zip(weights, grads, strict=True))
    yield Case(
        op="spsa_perturb",
        case=name,
        shape=f"{len(weights)} matrices",
        dtype="float32",
        direction="forward",
        ours=lambda: ops.spsa_perturb(weights, grads, scales, norm, **options),
        peers={
            "randn_like": Peer(lambda: [one(w, g) for w, g in pairs], same=False, note=other),
            "foreach": Peer(foreach, same=False, note=other),
            "compile_randn": Peer(lambda: [compiled(w, g) for w, g in pairs], same=False, note=other),
        },
        expected=lambda: [
            t for side in reference.spsa_perturb(weights, grads, scales, norm, **options) for t in side
        ],
        least_bytes=16 * sum(w.numel() for w in weights),
        tolerance=0.0,
    )
