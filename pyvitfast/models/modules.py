"""What modules are: under their wrappers, and by the name of their class."""

from __future__ import annotations

import timm.layers
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

_ROOMS = {"torch.nn": torch.nn, "timm.layers": timm.layers}


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile`` and DistributedDataParallel."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of ``module`` as it was written: ``fully_shard`` puts a subclass in its place."""
    kind = type(module)
    return kind.__bases__[1] if issubclass(kind, FSDPModule) else kind


def layer_name(layer: nn.Module) -> str:
    """The qualified name of the class of ``layer``, from which :func:`layer_class` finds it.

    Raises:
        NotImplementedError: it is neither torch's nor timm's.
    """
    kind = type(layer)
    for room, module in _ROOMS.items():
        if getattr(module, kind.__name__, None) is kind:
            return f"{room}.{kind.__name__}"
    raise NotImplementedError(
        f"architecture: layers must be classes of torch.nn or timm.layers, got "
        f"{kind.__module__}.{kind.__qualname__}."
    )


def layer_class(name: str) -> type[nn.Module]:
    """The class that :func:`layer_name` named.

    Raises:
        ValueError: no class of torch.nn or timm.layers.
    """
    room, _, kind = name.rpartition(".")
    found = getattr(_ROOMS.get(room), kind, None)
    if isinstance(found, type) and issubclass(found, nn.Module):
        return found
    raise ValueError(f"architecture: layers must be classes of torch.nn or timm.layers, got {name!r}.")
