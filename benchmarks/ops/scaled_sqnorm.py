"""Norm of all gradients of a DeiT in scaled coordinates."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.measure import Case, Peer
from benchmarks.ops.saliency_rowcol import block_shapes
from pyvitfast import ops


def deit(device: str, quick: bool) -> tuple[str, list[Tensor], list[Tensor], list[Tensor]]:
    """Name, weights, gradients and scales of the 48 matrices of the blocks of a DeiT."""
    embed, mlp, name = (192, 768, "deit_tiny") if quick else (384, 1536, "deit_small")
    shapes = block_shapes(embed, mlp) * 12
    weights = [0.02 * torch.randn(s, device=device) for s in shapes]
    grads = [torch.randn(s, device=device) for s in shapes]
    return name, weights, grads, [torch.full((), 0.03, device=device) for _ in shapes]


def cases(device: str, quick: bool) -> Iterator[Case]:
    """One scale a tensor."""
    name, _, grads, scales = deit(device, quick)

    def eager() -> Tensor:
        return torch.stack(
            [(s * g).double().square().sum() for s, g in zip(scales, grads, strict=True)]
        ).sum()

    def foreach() -> Tensor:
        scaled = torch._foreach_mul(grads, scales)
        return torch.stack(torch._foreach_norm(scaled)).double().square().sum()

    def one(grad: Tensor, scale: Tensor) -> Tensor:
        return (scale * grad).double().square().sum()

    compiled = torch.compile(one, dynamic=True)

    yield Case(
        op="scaled_sqnorm",
        case=name,
        shape=f"{len(grads)} matrices",
        dtype="float32",
        direction="forward",
        ours=lambda: ops.scaled_sqnorm(grads, scales),
        peers={
            "eager": Peer(eager),
            "foreach": Peer(foreach),
            "compile": Peer(
                lambda: torch.stack([compiled(g, s) for g, s in zip(grads, scales, strict=True)]).sum()
            ),
        },
        expected=lambda: [eager()],
        least_bytes=4 * sum(g.numel() for g in grads),
        tolerance=1e-5,
    )
