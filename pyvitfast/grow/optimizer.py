"""The moments of an optimizer for a grown model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyvitfast.grow.fixed import WIDTHS, Growth, scaled_queries
from pyvitfast.grow.layout import Parameter
from pyvitfast.grow.outcome import report
from pyvitfast.models.modules import unwrap

# The power of the gradient that an entry of the state averages.
_POWERS = {"exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}


def grow_optimizer_state(
    optimizer: torch.optim.Optimizer,
    source: nn.Module,
    grown: nn.Module,
    new_optimizer: torch.optim.Optimizer,
) -> tuple[str, ...]:
    r"""Carry an optimizer's moments over to a grown model, where copies have gradients that are known.

    Let a source's parameter w have copies :math:`w'_a = s w`. If growth preserves the function and the copies
    may be exchanged, they have equal gradients, and the chain rule gives :math:`g = \sum_a s g'_a`. In
    :math:`W_2 = E W \bar E^\top` an entry has :math:`c_{out} c_{in}` copies with :math:`s = 1 / c_{in}`, so
    :math:`g' = g / c_{out}`; first moments are divided by :math:`c_{out}` and second moments by its square.
    Noise makes this an approximation. The derivation is ours.

    Args:
        optimizer: of the source; Adam, AdamW, NAdam-like or SGD with momentum.
        source: the model that it trained.
        grown: from :func:`grow`, made of ``source``.
        new_optimizer: over the parameters of ``grown``; its state is written in place, its settings stay.

    Returns:
        Names of the parameters whose state was carried over. Others start fresh: those of inserted blocks,
        kept heads and resized embeddings, and all of them where copies are not exchangeable or the function
        changes: learned operators, aki, unequal counts of channels, mean channels, repeated blocks.

    Raises:
        ValueError: ``grown`` is not from :func:`grow`, ``source`` is not the model it was made of, or the
            state holds a tensor whose meaning is not known.
    """
    done = report(grown)
    growth = done.growth
    old, new = growth.source.parameters(), growth.target.parameters()
    weights = dict(unwrap(source).named_parameters())
    for key, p in old.items():
        found = tuple(weights[key].shape) if key in weights else None
        if found != p.shape and key not in done.resized:
            raise ValueError(
                f"grow_optimizer_state: `source` must be the model that was grown, with {key} of shape "
                f"{p.shape}, got {found}."
            )
    if not _exchangeable(growth):
        return ()
    held = {id(p) for group in new_optimizer.param_groups for p in group["params"]}
    carried = []
    for key, parameter in unwrap(grown).named_parameters():
        name, _, inserted = growth.origin(key)
        state = optimizer.state.get(weights[name], {})
        if not state or inserted or key in (*done.kept, *done.resized) or id(parameter) not in held:
            continue
        new_optimizer.state[parameter] = {
            entry: _carried(growth, key, new[key], entry, value) for entry, value in state.items()
        }
        carried.append(key)
    return tuple(carried)


def _exchangeable(growth: Growth) -> bool:
    pairs = zip(growth.source.stages, growth.target.stages, strict=True)
    repeated = growth.depth != "identity" and any(a.depth != b.depth for a, b in pairs)
    uniform = all(growth.maps[stage.axis("embed")].uniform for stage in growth.source.stages)
    return uniform and not repeated and growth.width in WIDTHS and growth.width != "aki"


def _carried(growth: Growth, key: str, p: Parameter, entry: str, value: object) -> object:
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value.clone() if isinstance(value, Tensor) else value
    if entry not in _POWERS:
        raise ValueError(
            f"grow_optimizer_state: `optimizer` must hold no tensors but {', '.join(_POWERS)} and numbers, "
            f"got {entry} of {key}. Start the new optimizer fresh."
        )
    grown = growth.maps[p.reads].copy(value, 1) if p.reads else value.clone()
    if p.writes:
        dim, out = p.writes[0], growth.maps[p.writes[1]]
        shape = [1] * grown.ndim
        shape[dim] = -1
        grown = out.copy(grown, dim) / out.counts[out.index].view(shape).to(grown) ** _POWERS[entry]
    return grown / scaled_queries(growth, key, torch.ones_like(grown)) ** _POWERS[entry]
