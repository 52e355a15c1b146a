"""Compaction of a DeiT's weights and Adam state, against ``w[rows][:, cols]``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.measure import Case, Peer
from benchmarks.ops.saliency_rowcol import block_shapes
from pyvitfast import ops


def build(device: str, name: str, embed: int, mlp: int, depth: int, group: int) -> Case:
    """Half of the rows and columns kept, in groups of ``group``."""
    shapes = [s for s in block_shapes(embed, mlp) * depth for _ in range(3)]
    tensors = [torch.randn(s, device=device) for s in shapes]

    def kept(size: int) -> Tensor:
        alive = (torch.rand(size // group) > 0.5).repeat_interleave(group)
        return alive.nonzero().flatten().to(device)

    indices = {size: kept(size) for size in {n for s in shapes for n in s}}
    rows = [indices[s[0]] for s in shapes]
    cols = [indices[s[1]] for s in shapes]
    triples = list(zip(tensors, rows, cols, strict=True))
    compiled = torch.compile(lambda t, r, c: t[r][:, c], dynamic=True)
    kept_entries = sum(r.numel() * c.numel() for _, r, c in triples)
    return Case(
        op="structured_gather",
        case=f"{name} half kept in groups of {group}",
        shape=f"{len(shapes)} matrices",
        dtype="float32",
        direction="forward",
        ours=lambda: ops.structured_gather(tensors, rows, cols),
        peers={
            "eager": Peer(lambda: [t[r][:, c] for t, r, c in triples]),
            "broadcast_index": Peer(lambda: [t[r.unsqueeze(1), c] for t, r, c in triples]),
            "index_select": Peer(lambda: [t.index_select(0, r).index_select(1, c) for t, r, c in triples]),
            "compile": Peer(lambda: [compiled(t, r, c) for t, r, c in triples]),
        },
        expected=lambda: [t.double()[r][:, c] for t, r, c in triples],
        least_bytes=8 * kept_entries,
        tolerance=0.0,
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    """Groups of 16 as NViT prunes, and single entries."""
    name, embed, mlp, depth = ("deit_tiny", 192, 768, 12) if quick else ("deit_base", 768, 3072, 12)
    for group in (16, 1):
        yield build(device, name, embed, mlp, depth, group)
