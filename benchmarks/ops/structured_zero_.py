"""Re-zeroing half-pruned matrices of a DeiT, against masked_fill and indexing."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.measure import Case, Peer
from benchmarks.ops.saliency_rowcol import block_shapes
from pyvitfast import ops, reference


def cases(device: str, quick: bool) -> Iterator[Case]:
    """Half the rows and columns dead, in groups of 16 as NViT prunes."""
    embed, mlp, name = (192, 768, "deit_tiny") if quick else (768, 3072, "deit_base")
    shapes = block_shapes(embed, mlp) * 12
    tensors = [torch.randn(s, device=device) for s in shapes]

    def alive(size: int) -> Tensor:
        return (torch.rand(size // 16, device=device) > 0.5).repeat_interleave(16)

    masks = {size: alive(size) for size in {n for s in shapes for n in s}}
    rows = [masks[s[0]] for s in shapes]
    cols = [masks[s[1]] for s in shapes]
    dead = sum(s[0] * s[1] - int(r.sum()) * int(c.sum()) for s, r, c in zip(shapes, rows, cols, strict=True))

    def spoil() -> None:
        for tensor in tensors:
            tensor.fill_(1.0)

    def ours() -> list[Tensor]:
        ops.structured_zero_(tensors, rows, cols)
        return tensors

    def eager() -> list[Tensor]:
        reference.structured_zero_(tensors, rows, cols)
        return tensors

    def masked_fill() -> list[Tensor]:
        for tensor, row, col in zip(tensors, rows, cols, strict=True):
            tensor.masked_fill_(~row.unsqueeze(1), 0.0).masked_fill_(~col, 0.0)
        return tensors

    def product() -> list[Tensor]:
        torch._foreach_mul_(tensors, [(r.unsqueeze(1) & c).float() for r, c in zip(rows, cols, strict=True)])
        return tensors

    def one(tensor: Tensor, row: Tensor, col: Tensor) -> None:
        tensor.copy_(torch.where(row.unsqueeze(1) & col, tensor, 0.0))

    compiled = torch.compile(one, dynamic=True)

    def compile_() -> list[Tensor]:
        for args in zip(tensors, rows, cols, strict=True):
            compiled(*args)
        return tensors

    def expected() -> list[Tensor]:
        return [(r.unsqueeze(1) & c).double() for r, c in zip(rows, cols, strict=True)]

    yield Case(
        op="structured_zero_",
        case=f"{name} half dead",
        shape=f"{len(shapes)} matrices",
        dtype="float32",
        direction="forward",
        ours=ours,
        peers={
            "eager": Peer(eager),
            "masked_fill": Peer(masked_fill),
            "foreach_mul": Peer(product),
            "compile": Peer(compile_),
        },
        expected=expected,
        least_bytes=4 * dead,
        tolerance=0.0,
        before=spoil,
    )
