"""Per-unit squares of a DeiT's structural groups, against index_add."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.measure import Case, Peer
from pyvitfast import ops, reference


def cases(device: str, quick: bool) -> Iterator[Case]:
    """As many units and entries as DeiT-B, or DeiT-Ti."""
    units, size, nnz = (39_312, 160_000, 260_000) if not quick else (9_900, 40_000, 65_000)
    lengths = torch.full((units,), nnz // units)
    lengths[: nnz - int(lengths.sum())] += 1
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int().to(device)
    indices = torch.randint(0, size, (nnz,), dtype=torch.int32, device=device)
    workspace = torch.randn(size, device=device)
    acc = torch.zeros(units, device=device)
    counts = torch.zeros(2, dtype=torch.int64, device=device)

    def reset() -> None:
        acc.zero_()
        counts.zero_()

    def ours() -> Tensor:
        ops.saliency_commit_(acc, counts, workspace, indptr, indices)
        return acc

    def eager() -> Tensor:
        reference.saliency_commit_(acc, counts, workspace, indptr, indices)
        return acc

    owner = torch.repeat_interleave(torch.arange(units, device=device), lengths.to(device))

    def prepared() -> Tensor:
        sums = torch.zeros_like(acc).index_add_(0, owner, workspace[indices])
        clean = workspace.isfinite().all() & sums.isfinite().all()
        return acc.add_(torch.where(clean, sums.square(), 0.0))

    compiled = torch.compile(prepared)

    def expected() -> list[Tensor]:
        sums = torch.zeros(units, dtype=torch.float64, device=device)
        return [sums.index_add_(0, owner, workspace.double()[indices]).square()]

    yield Case(
        op="saliency_commit_",
        case="deit_base" if not quick else "deit_tiny",
        shape=f"{units} units, {nnz} entries",
        dtype="float32",
        direction="forward",
        ours=ours,
        peers={"eager": Peer(eager), "index_add": Peer(prepared), "compile": Peer(compiled)},
        expected=expected,
        least_bytes=4 * (size + 2 * nnz + 3 * units),
        flops=nnz,
        tolerance=1e-5,
        before=reset,
    )
