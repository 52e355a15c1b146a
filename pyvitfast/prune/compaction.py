"""From a masked model to a model with really smaller dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyvitfast import ops
from pyvitfast.prune.shards import whole
from pyvitfast.prune.structure import Axis, UnitTable


def _kept(table: UnitTable, alive: Tensor) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """Kept rows and columns of each parameter; None where nothing is cut."""
    rows: dict[str, list[Tensor] | None] = {}
    cols: dict[str, Tensor | None] = {}

    def index(axis: Axis) -> Tensor:
        return table.alive(axis, alive).nonzero().flatten()

    for piece in table.pieces:
        cols[piece.parameter] = index(piece.cols) if piece.cols else None
        if piece.rows is None:
            rows[piece.parameter] = None
            continue
        parts = rows.setdefault(piece.parameter, [])
        if parts is not None:
            parts.append(index(piece.rows) + piece.start)
    joined = {name: None if parts is None else torch.cat(parts) for name, parts in rows.items()}
    return {name: (joined[name], cols[name]) for name in rows}


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.view(-1, tensor.shape[-1]) if tensor.ndim == 3 else tensor


def compact_model(
    model: nn.Module, table: UnitTable, alive: Tensor, optimizer: Any, ln_fix: bool
) -> nn.Module:
    """Build the smaller model and move the optimizer onto it; see :meth:`NViTPruner.compact`."""
    dims = table.dims(alive)
    config: Any = table.config
    old = dict(model.named_parameters())
    some = next(iter(old.values()))
    device = some.device
    # Weights are replaced below; buffers outside the state dict, such as Swin's masks, must follow here.
    slim: nn.Module = config.prune(dims).build().to(device, some.dtype)
    kept = {
        name: tuple(None if i is None else i.to(device) for i in pair)
        for name, pair in _kept(table, alive).items()
    }
    factors: dict[str, tuple[float, int]] = {}
    for piece in table.pieces:
        if piece.is_norm_weight and piece.rows is not None:
            mask = table.alive(piece.rows, alive)
            left = int(mask.sum())
            factors[piece.parameter] = (len(mask) / left) ** 0.5, left
    states: Mapping[Tensor, dict[str, Any]] = {} if optimizer is None else optimizer.state

    jobs: list[tuple[str, str | None, Tensor]] = []
    for name, parameter in old.items():
        jobs.append((name, None, whole(parameter.detach())))
        for state, value in states.get(parameter, {}).items():
            # Only what runs along the parameter is cut: step counts and factored moments are not.
            if isinstance(value, Tensor) and value.ndim and value.shape == parameter.shape:
                jobs.append((name, state, value.detach()))
    scales: list[Tensor | None] = []
    for name, key, tensor in jobs:
        factor, left = factors.get(name, (1.0, 0)) if ln_fix and key is None else (1.0, 0)
        wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        scales.append(None if factor == 1.0 else torch.full((left,), factor, dtype=wide, device=device))
    gathered = ops.implementation("structured_gather", device)(
        [_matrix(tensor) for _, _, tensor in jobs],
        [kept.get(name, (None, None))[0] for name, _, _ in jobs],
        [kept.get(name, (None, None))[1] for name, _, _ in jobs],
        row_scale=scales,
    )

    weights: dict[str, Tensor] = {}
    moved: dict[str, dict[str, Tensor]] = {}
    for (name, key, tensor), result in zip(jobs, gathered, strict=True):
        if tensor.ndim == 3:
            result = result.view(*tensor.shape[:-1], -1)
        if key is None:
            weights[name] = result
        else:
            moved.setdefault(name, {})[key] = result
    slim.load_state_dict(weights, assign=True)
    new = dict(slim.named_parameters())
    for name, parameter in old.items():
        new[name].requires_grad_(parameter.requires_grad)
    for attribute in (
        "pretrained_cfg",
        "default_cfg",
        "distilled_training",
    ):
        if hasattr(model, attribute):
            setattr(slim, attribute, getattr(model, attribute))
    for name, module in model.named_modules():  # a Swin's stages have a flag each
        if hasattr(module, "grad_checkpointing"):
            slim.get_submodule(name).grad_checkpointing = module.grad_checkpointing
    slim.train(model.training)
    if optimizer is not None:
        _move_optimizer(optimizer, old, new, moved)
    return slim


def _move_optimizer(
    optimizer: Any,
    old: dict[str, nn.Parameter],
    new: dict[str, nn.Parameter],
    moved: dict[str, dict[str, Tensor]],
) -> None:
    names = {id(parameter): name for name, parameter in old.items()}
    for group in optimizer.param_groups:
        group["params"] = [new[names[id(p)]] if id(p) in names else p for p in group["params"]]
    for name, parameter in old.items():
        if parameter in optimizer.state:
            optimizer.state[new[name]] = {
                **optimizer.state.pop(parameter),
                **moved.get(name, {}),
            }
