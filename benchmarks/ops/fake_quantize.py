"""Two-bit weights of a DeiT and their straight-through gradients, against eager, compiled and torch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Case, Peer, directed
from benchmarks.ops.scaled_sqnorm import deit
from pyvitfast import ops, reference


def straight_through(w: Tensor, s: Tensor) -> Tensor:
    """LSQ as plain torch users write it."""
    ratio = w / s
    clipped = ratio.clamp(-2, 1)
    return ((clipped.round() - clipped).detach() + clipped) * s


def joined(run: Callable[[], Any], count: int) -> Callable[[], list[Tensor]]:
    """The results of ``run`` with those from number ``count`` on, one number each, as one tensor.

    A single sum may cancel to nearly nothing, to which no error would be small.
    """

    def call() -> list[Tensor]:
        out = list(run())
        return out if len(out) == count else [*out[:count], torch.stack(out[count:])]

    return call


def cases(device: str, quick: bool) -> Iterator[Case]:
    """Values, gradients and both."""
    name, weights, upstream, scales = deit(device, quick)
    leaves = [w.requires_grad_() for w in weights]
    steps = [s.requires_grad_() for s in scales]
    pairs = list(zip(leaves, steps, strict=True))
    compiled = torch.compile(straight_through, dynamic=True)
    zero = torch.zeros((), dtype=torch.int32, device=device)
    functions = {
        "ours": lambda: ops.fake_quantize(leaves, steps, bits=2),
        "eager": lambda: [straight_through(w, s) for w, s in pairs],
        "compile": lambda: [compiled(w, s) for w, s in pairs],
    }
    count = sum(w.numel() for w in weights)
    for direction, least in (("forward", 8), ("both", 20)):
        runs = {
            k: joined(directed(f, [*leaves, *steps], upstream, direction), len(leaves))
            for k, f in functions.items()
        }
        peers = {k: Peer(run) for k, run in runs.items() if k != "ours"}
        if direction == "forward":
            with_zero = lambda: [  # noqa: E731
                torch.fake_quantize_per_tensor_affine(w.detach(), s.detach(), zero, -2, 1) for w, s in pairs
            ]
            peers["torch.fake_quantize"] = Peer(with_zero)

        def expected(direction: str = direction) -> list[Tensor]:
            run = directed(
                lambda: reference.fake_quantize(leaves, steps, bits=2), [*leaves, *steps], upstream, direction
            )
            return joined(run, len(leaves))()

        yield Case(
            op="fake_quantize",
            case=name,
            shape=f"{len(weights)} matrices",
            dtype="float32",
            direction=direction,
            ours=runs["ours"],
            peers=peers,
            expected=expected,
            least_bytes=least * count,
            tolerance=1e-3,
        )
