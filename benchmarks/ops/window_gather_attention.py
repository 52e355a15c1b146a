"""Windows of keys wider than their stride: LayerNorm and projection of the grid once and a gather, against
cutting the windows out first, as the released code of the paper does (``unfold``), and then normalising and
projecting each copy.

Queries are given, projected, to all alike. Peers mask what lies outside the grid; without the mask, as in the
released code, padding takes part and the result is another (``unfold + sdpa, unmasked``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Case, Peer, directed
from pyvitfast import ops, reference


class Shape(NamedTuple):
    """A grid of tokens, windows of queries, and window, stride and offset of the keys on both axes."""

    name: str
    grid: tuple[int, int]
    windows: tuple[int, int]
    queries: int
    geometry: tuple[int, int, int]
    channels: int = 96
    heads: int = 3
    batch: int = 1
    before: int = 0


SHAPES = (
    Shape("classification", (14, 14), (2, 2), 9, (10, 4, 0), 384, 12, 8, 9),
    Shape("detection, first layer", (56, 84), (8, 12), 9, (14, 7, -3)),
    Shape("detection, second layer", (56, 84), (8, 12), 9, (21, 7, -7)),
    Shape("detection, recover", (24, 36), (8, 12), 49, (27, 3, -12)),
)


def padding(shape: Shape) -> tuple[int, int, int, int]:
    """Left, right, top and bottom, so that all windows lie inside."""
    window, stride, offset = shape.geometry
    down, right = (
        max(0, (count - 1) * stride + offset + window - size)
        for count, size in zip(shape.windows, shape.grid, strict=True)
    )
    return -offset, right, -offset, down


def unfolded(shape: Shape, x: Tensor) -> Tensor:
    """[B, height, width, C] as windows [B * windows, keys, C]."""
    window, stride, _ = shape.geometry
    padded = F.pad(x.permute(0, 3, 1, 2), padding(shape))
    columns = F.unfold(padded, window, stride=stride)  # [B, C * keys, windows]
    return columns.view(x.shape[0], x.shape[3], window * window, -1).permute(0, 3, 2, 1).flatten(0, 1)


def mask_of(shape: Shape, device: str) -> Tensor:
    """Zero where a window's key lies in the grid, minus infinity elsewhere: [windows, 1, 1, keys]."""
    inside = unfolded(shape, torch.ones(1, *shape.grid, 1, device=device))[:, None, None, :, 0]
    mask = torch.zeros_like(inside).masked_fill(inside == 0, -torch.inf)
    return F.pad(mask, (shape.before, 0)).repeat(shape.batch, 1, 1, 1)


def matmuls(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    return (scores if attn_mask is None else scores + attn_mask).softmax(dim=3) @ v


class Layer(nn.Module):
    """LayerNorm and the projection to keys and values."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.norm = nn.LayerNorm(shape.channels)
        self.kv = nn.Linear(shape.channels, 2 * shape.channels)

    def project(self, x: Tensor) -> Tensor:
        heads = self.shape.heads
        return self.kv(self.norm(x)).unflatten(-1, (2, heads, self.shape.channels // heads))

    def gathered(self, op: Callable[..., Tensor], x: Tensor, q: Tensor, own: Tensor | None) -> Tensor:
        kv = self.project(x)
        pairs = [(part, part) for part in self.shape.geometry]
        named = {}
        if own is not None:
            before = self.project(own)
            named = {"k_before": before[..., 0, :, :], "v_before": before[..., 1, :, :]}
        return op(q, kv[:, :, :, 0], kv[:, :, :, 1], *pairs, **named)

    def unfolded(
        self, core: Callable[..., Tensor], mask: Tensor | None, x: Tensor, q: Tensor, own: Tensor | None
    ) -> Tensor:
        rows = unfolded(self.shape, x)
        if own is not None:
            rows = torch.cat([own.flatten(0, 2), rows], dim=1)
        k, v = self.project(rows).permute(2, 0, 3, 1, 4)
        o = core(q.flatten(0, 2).transpose(1, 2), k, v, attn_mask=mask)
        return o.transpose(1, 2).view(q.shape)


def build(device: str, shape: Shape, direction: str = "forward") -> Case:
    """One shape and direction, in float32."""
    torch.manual_seed(0)
    needs_grad = direction != "forward"
    layer = Layer(shape).to(device)
    width = shape.channels // shape.heads
    x = torch.randn(shape.batch, *shape.grid, shape.channels, device=device)
    q = torch.randn(shape.batch, *shape.windows, shape.queries, shape.heads, width, device=device)
    given = [t.requires_grad_(needs_grad) for t in (x, q)]
    own = None
    if shape.before:
        own = torch.randn(shape.batch, *shape.windows, shape.before, shape.channels, device=device)
        given.append(own.requires_grad_(needs_grad))
    leaves = [*given, *layer.parameters()]
    gradient = torch.randn(q.shape, device=device)
    mask = mask_of(shape, device)
    sdpa = F.scaled_dot_product_attention

    def our_forward() -> Tensor:
        return layer.gathered(ops.window_gather_attention, x, q, own)

    forwards: dict[str, Callable[[], Tensor]] = {
        "eager": lambda: layer.unfolded(matmuls, mask, x, q, own),
        "unfold + sdpa": lambda: layer.unfolded(sdpa, mask, x, q, own),
    }
    peers = {name: Peer(directed(f, leaves, [gradient], direction)) for name, f in forwards.items()}
    unmasked = directed(lambda: layer.unfolded(sdpa, None, x, q, own), leaves, [gradient], direction)
    peers["unfold + sdpa, unmasked"] = Peer(unmasked, same=False, note="padding takes part, as released")

    def expected() -> Any:
        wide_layer = Layer(shape).to(device).double()
        wide_layer.load_state_dict(layer.state_dict())
        wide = [t.detach().double().requires_grad_(needs_grad) for t in given]
        run = directed(
            lambda: wide_layer.gathered(reference.window_gather_attention, *(*wide, None)[:3]),
            [*wide, *wide_layer.parameters()],
            [gradient.double()],
            direction,
        )
        return run()

    tokens = shape.grid[0] * shape.grid[1]
    windows = shape.windows[0] * shape.windows[1]
    window, stride, offset = shape.geometry

    def read(axis: int) -> int:
        first = [at * stride + offset for at in range(shape.windows[axis])]
        return sum(min(f + window, shape.grid[axis]) - max(f, 0) for f in first)

    keys = read(0) * read(1) + windows * shape.before
    rows = tokens + windows * shape.before
    macs = shape.batch * (2 * rows * shape.channels**2 + 2 * keys * shape.queries * shape.channels)
    # Tokens in; keys and values out and in; queries in, results out.
    values = shape.batch * shape.channels * (rows * 5 + 2 * windows * shape.queries)
    factor = {"forward": 1, "backward": 2, "both": 3}[direction]
    return Case(
        op="window_gather_attention",
        case=f"{shape.name}, with LayerNorm and projection",
        shape=f"{shape.batch}x{shape.grid[0]}x{shape.grid[1]}x{shape.channels}, windows {shape.geometry}",
        dtype="float32",
        direction=direction,
        ours=directed(our_forward, leaves, [gradient], direction),
        peers=peers,
        expected=expected,
        least_bytes=4 * factor * values,
        flops=2 * factor * macs,
        tolerance=1e-4 if needs_grad else 2e-5,
        forwards={"ours": our_forward, "eager": forwards["eager"]} if needs_grad else {},
        given=leaves,
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    """Classification and the three layers of detection; then the gradients of all."""
    shapes = [s._replace(grid=(14, 21), windows=(2, 3)) for s in SHAPES[1:2]] if quick else SHAPES
    for direction in ("forward", "both"):
        for shape in shapes:
            yield build(device, shape, direction)
