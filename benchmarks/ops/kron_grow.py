"""The qkv matrices of a DeiT-S grown to those of a DeiT-B, as LiGO does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Case, Peer, directed
from pyvitfast import ops, reference


def layer_by_layer(weight: Tensor, a: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """Layers stacked along the last axis, and mixed by a product and a sum for each one of the target."""
    grown = []
    for type_, depth in zip(weight, d, strict=True):
        stacked = torch.stack(list(type_), -1)
        grown.append(torch.stack([b @ (stacked * row).sum(-1) @ a.T for row in depth]))
    return torch.stack(grown)


def mixed_at_once(weight: Tensor, a: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """One product for the layers, two for the width."""
    return b @ (torch.einsum("tml,tloi->tmoi", d, weight) @ a.T)


def cases(device: str, quick: bool) -> Iterator[Case]:
    """Values and gradients of the factors."""
    layers, small, large = (3, 32, 64) if quick else (12, 384, 768)
    weight = torch.randn(3, layers, small, small, device=device)
    factors = [torch.randn(large, small, device=device) * 0.05 for _ in range(2)]
    factors = [t.requires_grad_() for t in (*factors, torch.randn(3, layers, layers, device=device) * 0.3)]
    upstream = torch.randn(3, layers, large, large, device=device)
    compiled = torch.compile(mixed_at_once)
    functions: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: ops.kron_grow(weight, *factors),
        "eager": lambda: mixed_at_once(weight, *factors),
        "compile": lambda: compiled(weight, *factors),
        "layer by layer": lambda: layer_by_layer(weight, *factors),
    }
    whole = [torch.cat([torch.eye(small, device=device), f.detach()[small:]]) for f in factors[:2]]
    work = 3 * layers * (small * large * (small + large) + layers * small * small)
    moved = 4 * (weight.numel() + upstream.numel() + sum(f.numel() for f in factors))
    for direction in ("forward", "both"):
        runs = {k: directed(f, factors, [upstream], direction) for k, f in functions.items()}

        def expected(direction: str = direction) -> Any:
            wide = [f.detach().double().requires_grad_() for f in factors]
            run = directed(
                lambda: reference.kron_grow(weight.double(), *wide), wide, [upstream.double()], direction
            )
            return run()

        yield Case(
            op="kron_grow",
            case="qkv deit_small_to_base" if not quick else "small",
            shape="x".join(map(str, weight.shape)),
            dtype="float32",
            direction=direction,
            ours=runs.pop("ours"),
            peers={k: Peer(run) for k, run in runs.items()},
            expected=expected,
            least_bytes=moved * (1 if direction == "forward" else 3),
            flops=2 * work * (1 if direction == "forward" else 3),
            tolerance=1e-4,
        )
    yield Case(
        op="kron_grow",
        case="identity on top",
        shape="x".join(map(str, weight.shape)),
        dtype="float32",
        direction="forward",
        ours=lambda: ops.kron_grow(
            weight, *(f.detach()[small:] for f in factors[:2]), factors[2].detach(), identity=True
        ),
        peers={
            "eager": Peer(lambda: mixed_at_once(weight, *whole, factors[2].detach())),
            "layer by layer": Peer(lambda: layer_by_layer(weight, *whole, factors[2].detach())),
        },
        expected=lambda: [
            reference.kron_grow(weight.double(), *(f.double() for f in whole), factors[2].detach().double())
        ],
        least_bytes=moved,
        flops=2 * work,
        tolerance=1e-4,
    )
