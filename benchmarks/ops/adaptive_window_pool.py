"""First centres of semantic tokens: a grid of 14 by 14 pooled to 4 by 4, channels last."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Case, Peer, directed
from pyvitfast import ops, reference
from pyvitfast.ops.adaptive_window_pool import widest_bin


def _eager(x: Tensor, side: int, mode: str, *maps: Tensor) -> Tensor:
    """As a user writes it: the grid to channels first, torch's pooling, and back."""
    if mode != "learned":
        pool = F.adaptive_avg_pool2d if mode == "avg" else F.adaptive_max_pool2d
        return pool(x.permute(0, 3, 1, 2), side).flatten(2).transpose(1, 2)
    # Bins are cut out, weighted and added; here all have one size.
    cells, starts = maps[0].shape[2], torch.arange(side, device=x.device) * x.shape[1] // side
    index = starts[:, None] + torch.arange(cells, device=x.device)  # [side, cells]
    windows = x[:, index[:, None, :, None], index[None, :, None, :]]  # [B, side, side, cells, cells, C]
    weights = maps[0].flatten(2).softmax(-1).unsqueeze(2)
    return (weights @ windows.flatten(3, 4).flatten(1, 2)).squeeze(2)


def case(device: str, batch: int, grid: int, side: int, channels: int, mode: str, direction: str) -> Case:
    """One shape, mode and direction."""
    gradient = direction != "forward"
    x = torch.randn(batch, grid, grid, channels, device=device, requires_grad=gradient)
    maps: list[Tensor] = []
    if mode == "learned":
        cells = widest_bin(grid, side)
        maps = [torch.randn(batch, side * side, cells, cells, device=device, requires_grad=gradient)]
    upstream = torch.randn(batch, side * side, channels, device=device)
    leaves = [x, *maps]

    def by_hand(given: Tensor, *scores: Tensor) -> Tensor:
        return _eager(given, side, mode, *scores)

    compiled = torch.compile(by_hand, dynamic=False)

    def expected() -> Any:
        twins = [t.detach().double().requires_grad_(gradient) for t in leaves]
        form = partial(reference.adaptive_window_pool, twins[0], (side, side), mode, *twins[1:])
        return directed(form, twins, [upstream.double()], direction)()

    def candidate(form: Any) -> Any:
        return directed(form, leaves, [upstream], direction)

    size = batch * channels * (grid * grid + side * side)
    return Case(
        op="adaptive_window_pool",
        case=f"{mode} {grid} to {side} batch {batch}",
        shape=f"[{batch}, {grid}, {grid}, {channels}]",
        dtype="float32",
        direction=direction,
        ours=candidate(lambda: ops.adaptive_window_pool(x, (side, side), mode, *maps)),
        peers={
            "eager": Peer(candidate(lambda: by_hand(x, *maps))),
            "compile": Peer(candidate(lambda: compiled(x, *maps))),
        },
        expected=expected,
        least_bytes=4 * size * (1 if direction == "forward" else 2),
        tolerance=1e-5,
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    """Semantic tokens of DeiT-S, 4 by 4, and windows of Swin, 3 by 3 out of 7 by 7."""
    for mode in ("avg", "max", "learned"):
        for direction in ("forward", "both"):
            yield case(device, 2 if quick else 32, 14, 4, 48 if quick else 384, mode, direction)
            yield case(device, 4 if quick else 128, 7, 3, 48 if quick else 384, mode, direction)
