"""Parameters and gradients that are split over processes, as by torch's ``fully_shard``."""

from __future__ import annotations

from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

Group: TypeAlias = Any  # torch.distributed.ProcessGroup, which CPU-only builds may lack


def local(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` that this process holds; all of it when it is not split."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of ``tensor``; a split one is gathered, so all processes must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def held_rows(name: str, parameter: Tensor) -> tuple[int, int]:
    """First index and the one after the last of dimension 0 that this process holds.

    Raises:
        NotImplementedError: split along another dimension, or more than once.
    """
    count = parameter.shape[0]
    if not isinstance(parameter, DTensor):
        return 0, count
    mesh = parameter.device_mesh
    splits = [(i, p) for i, p in enumerate(parameter.placements) if not p.is_replicate()]
    if not splits:
        return 0, count
    dims = [i for i, p in splits if isinstance(p, Shard) and p.dim == 0]
    if len(splits) != 1 or not dims:
        raise NotImplementedError(
            f"NViTPruner: {name}: must be split once, along dimension 0, as fully_shard does, "
            f"got {parameter.placements}."
        )
    each = -(-count // mesh.size(dims[0]))
    start = min(count, mesh.get_local_rank(dims[0]) * each)
    return start, start + parameter.to_local().shape[0]


def shard_group(model: nn.Module) -> Group | None:
    """The processes that hold the parts of ``model``'s parameters; None when nothing is split."""
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            for i, placement in enumerate(parameter.placements):
                if not placement.is_replicate():
                    return parameter.device_mesh.get_group(i)
    return None
