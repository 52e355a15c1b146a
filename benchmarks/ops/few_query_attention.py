"""A few queries over many keys, as in the layers that make semantic tokens of an image.

Queries are [B, M, H, D] seen as [B, H, M, D], keys and values the halves of a fused [B, N, 2, H, D]
projection: what the linear layers leave. With keys before, peers concatenate first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Case, Peer, directed
from pyvitfast import ops, reference

HEADS, WIDTH = 6, 64
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Shape(NamedTuple):
    """Entries, queries, keys, and keys before those."""

    batch: int
    queries: int
    keys: int
    before: int = 0


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(dim=3) @ v


def joined(core: Callable[..., Tensor], q: Tensor, *parts: Tensor) -> Tensor:
    """``core`` on the keys and values, those before them first; parts are k, v and perhaps two more."""
    k, v, *before = parts
    if before:
        k, v = torch.cat([before[0], k], dim=2), torch.cat([before[1], v], dim=2)
    return core(q, k, v)


def ours(op: Callable[..., tuple[Tensor, Tensor]], q: Tensor, *parts: Tensor) -> Tensor:
    k, v, *before = parts
    named = dict(zip(("k_before", "v_before"), before))
    return op(q, k, v, **named)[0]


def build(
    device: str,
    shape: Shape,
    direction: str = "forward",
    dtype: torch.dtype = torch.float32,
    peers: tuple[str, ...] = ("eager", "sdpa", "compile"),
) -> Case:
    """One shape, direction and dtype."""
    torch.manual_seed(0)
    batch, queries, keys, before = shape
    needs_grad = direction != "forward"
    q = torch.randn(batch, queries, HEADS, WIDTH, device=device).to(dtype).transpose(1, 2)
    kv = torch.randn(batch, keys, 2, HEADS, WIDTH, device=device).to(dtype)
    given = [q, kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2)]
    if before:
        rest = torch.randn(batch, before, 2, HEADS, WIDTH, device=device).to(dtype)
        given += [rest[:, :, 0].transpose(1, 2), rest[:, :, 1].transpose(1, 2)]
    given = [t.detach().requires_grad_(needs_grad) for t in given]
    gradient = torch.randn(batch, queries, HEADS, WIDTH, device=device).to(dtype).transpose(1, 2)
    compiled = torch.compile(lambda *parts: joined(eager, *parts), dynamic=False)
    forwards: dict[str, Callable[[], Tensor]] = {
        "eager": lambda: joined(eager, *given),
        "sdpa": lambda: joined(F.scaled_dot_product_attention, *given),
        "compile": lambda: compiled(*given),
    }

    def our_forward() -> Tensor:
        return ours(ops.few_query_attention, *given)

    def expected() -> Any:
        wide = [t.detach().double().requires_grad_(needs_grad) for t in given]
        run = directed(
            lambda: ours(reference.few_query_attention, *wide), wide, [gradient.double()], direction
        )
        return run()

    rows = 2 * (queries + keys + before)
    macs = 2 * batch * HEADS * queries * (keys + before) * WIDTH
    # The backward reads the rows, the result and its slope, and writes as many gradients; five products.
    passes = {"forward": (1.0, 1.0), "backward": (2.5, 2.5), "both": (3.5, 3.5)}[direction]
    return Case(
        op="few_query_attention",
        case=f"M {queries} N {keys}" + (f" after {before}" if before else "") + f" batch {batch}",
        shape=f"[{batch}, {HEADS}, {queries}, {WIDTH}] on {before + keys}",
        dtype=str(dtype).removeprefix("torch."),
        direction=direction,
        ours=directed(our_forward, given, [gradient], direction),
        peers={name: Peer(directed(forwards[name], given, [gradient], direction)) for name in peers},
        expected=expected,
        least_bytes=int(passes[0] * batch * HEADS * WIDTH * rows * dtype.itemsize),
        flops=int(2 * passes[1] * macs),
        tolerance=TOLERANCE[dtype] * (10 if needs_grad else 1),
        forwards={"ours": our_forward, "eager": forwards["eager"]} if needs_grad else {},
        given=given,
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    """M 16 to 100 over 196 and 4096 keys; then the second layer's keys, gradients, and bfloat16."""
    numbers = (16, 100) if quick else (16, 36, 64, 100)
    sizes = ((2, 196),) if quick else ((32, 196), (4, 4096), (1, 196), (1, 4096))
    for batch, keys in sizes:
        for queries in numbers:
            yield build(device, Shape(batch, queries, keys))
    batch = sizes[0][0]
    for queries in numbers:
        yield build(device, Shape(batch, queries, 196, queries))
    for direction in ("both", "backward"):
        for batch, keys in sizes[:2]:
            for queries in numbers:
                yield build(device, Shape(batch, queries, keys), direction)
    for queries in numbers[:1]:
        yield build(device, Shape(sizes[0][0], queries, 196), dtype=torch.bfloat16)
