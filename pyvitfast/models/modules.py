"""What modules are: under their wrappers, and by the name of their class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import timm.layers
import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.distributed.fsdp import FSDPModule

from pyvitfast import ops, reference

Logits: TypeAlias = Tensor | tuple[Tensor, Tensor]
# Tensors whose values a kernel can read as they are; tracers put the last two in place of the first two.
_PLAIN_TENSORS = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)
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


def both_logits(model: nn.Module, images: Tensor) -> Logits:
    """Logits of ``model`` in either mode: of class and distillation head [B, C] each if it has both.

    timm's distilled models give both only while training, and their mean otherwise.
    """
    inner: Any = unwrap(model)
    if not isinstance(inner, VisionTransformerDistilled):
        logits: Tensor = model(images)
        return logits
    features = inner.forward_features(images)
    return inner.head(features[:, 0]), inner.head_dist(features[:, 1])


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of ``module`` as it was written: ``fully_shard`` puts a subclass in its place."""
    kind = type(module)
    return kind.__bases__[1] if issubclass(kind, FSDPModule) else kind


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``module`` is a ``kind`` that nobody wrapped, hooked or gave another forward."""
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def is_plain_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a plain ``Linear`` whose weight a kernel can read.

    Compressed and distributed weights sit in an ordinary Linear as a tensor of another class.
    """
    return is_plain(module, nn.Linear) and type(module.weight) in _PLAIN_TENSORS


def is_plain_layer_norm(module: nn.Module) -> bool:
    """Whether ``module`` is torch's ``LayerNorm``, or timm's outside its fast mode, which is the same."""
    if is_plain(module, timm.layers.LayerNorm):
        return not module._fast_norm  # what it computes under autocast then is timm's own
    return is_plain(module, nn.LayerNorm)


_in_plain_torch = False


@contextmanager
def plain_torch() -> Iterator[None]:
    """Models take references instead of ops, for files that must run without us."""
    global _in_plain_torch
    before, _in_plain_torch = _in_plain_torch, True
    try:
        yield
    finally:
        _in_plain_torch = before


def kernel(name: str, device: torch.device) -> Callable[..., Any]:
    """Op ``name`` or its reference; without the lookup of ``ops.implementation``, which has no trace."""
    if ops.available(name, device) and not _in_plain_torch:
        compiled: Callable[..., Any] = getattr(ops, name)
        return compiled
    if torch.compiler.is_compiling() or _in_plain_torch:
        plain: Callable[..., Any] = getattr(reference, name)
        return plain
    return ops.implementation(name, device)  # says once that it is the reference


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
