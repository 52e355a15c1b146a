"""A DeiT-Ti grown to a DeiT-S by a ring of rank 4 and 1, against torch.einsum and hand-ordered products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Case, Peer, directed
from pyvitfast import ops, reference


def cores_of(layers: int, slots: int, small: int, large: int, rank: int, device: str) -> list[Tensor]:
    """Source and cores in float32."""
    shapes = [(layers, slots, small, small)]
    sizes = ((slots, slots), (small, large), (layers, layers), (small, large))
    shapes += [(rank, *pair, rank) for pair in sizes]
    return [torch.randn(s, device=device) * (0.02 if i else 1.0) for i, s in enumerate(shapes)]


def einsum(weight: Tensor, s_b: Tensor, s_o: Tensor, s_l: Tensor, s_i: Tensor) -> Tensor:
    """All five at once; the order is what opt_einsum finds where it is installed, else left to right."""
    return torch.einsum("lboi,wbcx,xopy,ylmz,zijw->mcpj", weight, s_b, s_o, s_l, s_i)


def ordered(weight: Tensor, s_b: Tensor, s_o: Tensor, s_l: Tensor, s_i: Tensor) -> Tensor:
    """Products in the best order, 96 rows of the target at a time."""
    parts = []
    layers, slots, _, small = weight.shape
    r1, _, slots2, r2 = s_b.shape
    r3, _, layers2, r4 = s_l.shape
    b = s_b.permute(0, 2, 1, 3).reshape(r1 * slots2, slots * r2)
    deep = s_l.permute(2, 3, 1, 0).reshape(layers2 * r4, layers * r3)
    inner = s_i.permute(0, 3, 1, 2).reshape(r4 * r1 * small, -1)
    for first in range(0, s_o.shape[2], 96):
        o = s_o[:, :, first : first + 96].permute(0, 3, 2, 1)
        rows = o.shape[2]
        x = o.reshape(-1, o.shape[3]) @ weight
        x = x.view(layers, slots, r2, r3, rows * small).permute(0, 3, 1, 2, 4)
        x = b @ x.reshape(layers * r3, slots * r2, rows * small)
        x = deep @ x.view(layers * r3, -1)
        x = x.view(layers2, r4, r1, slots2, rows, small).permute(0, 3, 4, 1, 2, 5)
        parts.append(x.reshape(layers2, slots2, rows, -1) @ inner)
    return torch.cat(parts, 2)


def cases(device: str, quick: bool) -> Iterator[Case]:
    """Ranks 4 and 1, and the gradients of the cores."""
    size = (2, 6, 32, 64) if quick else (12, 12, 192, 384)
    for rank in (1, 4):
        made = cores_of(*size, rank, device)
        cores = [core.requires_grad_() for core in made[1:]]
        layers, slots, small, large = size
        n = layers * slots
        work = rank**2 * n * small * large * (small + large)
        work += 2 * rank**3 * n * max(slots, layers) * small * large
        upstream = torch.randn(layers, slots, large, large, device=device)
        bytes_moved = 4 * (sum(t.numel() for t in made) + upstream.numel())
        functions: dict[str, Callable[[], Tensor]] = {
            "ours": lambda made=made: ops.tensor_ring_grow(*made),
            "eager": lambda made=made: einsum(*made),
            "einsum in the best order": lambda made=made: reference.tensor_ring_grow(*made),
            "hand-ordered": lambda made=made: ordered(*made),
        }
        for direction in ("forward", "both"):
            runs = {k: directed(f, cores, [upstream], direction) for k, f in functions.items()}
            if direction == "both" and rank > 1 and not quick:
                del runs["eager"], runs["einsum in the best order"]  # they keep gigabytes

            def expected(
                made: list[Tensor] = made,
                cores: list[Tensor] = cores,
                upstream: Tensor = upstream,
                direction: str = direction,
            ) -> Any:
                wide = [t.detach().double() for t in made]
                inner = [t.requires_grad_() for t in wide[1:]]
                run = directed(
                    lambda: reference.tensor_ring_grow(*wide), inner, [upstream.double()], direction
                )
                return run()

            yield Case(
                op="tensor_ring_grow",
                case=f"{'deit_tiny_to_small' if not quick else 'small'} R={rank}",
                shape="x".join(map(str, size)),
                dtype="float32",
                direction=direction,
                ours=runs.pop("ours"),
                peers={k: Peer(run) for k, run in runs.items()},
                expected=expected,
                least_bytes=bytes_moved * (1 if direction == "forward" else 3),
                flops=2 * work * (1 if direction == "forward" else 4),
                tolerance=1e-4,
            )
