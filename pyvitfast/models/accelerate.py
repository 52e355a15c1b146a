"""Our ops in a timm model that exists already."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pyvitfast.models.architecture import config_of
from pyvitfast.models.crossvit_fusion import swap_blocks
from pyvitfast.models.modules import unwrap


@dataclass(frozen=True)
class AccelerateReport:
    """What :func:`accelerate` did.

    Args:
        enabled: whether the model runs on our ops now.
        blocks: multi-scale encoders found.
        changed: how many of them were not so before.
        macs_before: multiply-accumulates of one image before; None for a model that cannot be counted.
        macs_after: those now.
    """

    enabled: bool
    blocks: int
    changed: int
    macs_before: int | None
    macs_after: int | None

    def __str__(self) -> str:
        where = "linear_cross_attention" if self.enabled else "timm's cross-attention"
        text = f"{self.changed} of {self.blocks} multi-scale encoders changed, all run on {where}"
        if self.macs_before is None or self.macs_after is None:
            return text
        return f"{text}; MACs/image {self.macs_before:,} -> {self.macs_after:,}"


def _macs(model: nn.Module) -> int | None:
    try:
        return config_of(model).macs()
    except (TypeError, NotImplementedError):
        return None


def accelerate(model: nn.Module, enable: bool = True) -> AccelerateReport:
    """Run the cross-attention of a CrossViT on ``linear_cross_attention``, or on timm's code again.

    The modules stay and change their class, so parameters, hooks, optimizers, device and mode are untouched,
    and the state dict is the same. A fusion that the op cannot stand for (attention dropout in training,
    hooks on its parts, wrapped or compressed layers) runs as timm's at each call. Doing it twice is doing it
    once. TorchScript cannot read the changed modules: script the model with ``enable=False``.

    Args:
        model: timm's ``CrossVit`` or ours, or a module that holds one; wrapped by ``torch.compile`` or
            DistributedDataParallel or not. Changed in place, any device and floating dtype.
        enable: False goes back to timm's classes.

    Returns:
        Counts, before and after.

    Raises:
        TypeError: the model holds no multi-scale encoder of CrossViT.

    Example:
        >>> model = timm.create_model("crossvit_15_240", pretrained=True)
        >>> print(vf.models.accelerate(model))

    Source:
        CrossViT (Chen et al., ICCV 2021), section 3.2.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: `model` must be an nn.Module, got {type(model).__name__}.")
    inner = unwrap(model)
    before = _macs(inner)
    blocks, changed = swap_blocks(inner, enable)
    if not blocks:
        raise TypeError(
            "accelerate: `model` must hold timm's MultiScaleBlock, as timm's crossvit_* and our "
            f"linear_crossvit_* do; there is none in {type(inner).__module__}.{type(inner).__name__}. "
            "Subclasses and other fusion schemes are left alone."
        )
    return AccelerateReport(enable, blocks, changed, before, _macs(inner))
