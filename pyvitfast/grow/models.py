"""The two models of a growth: how they are opened, and how the grown one is put together."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import timm
import timm.data
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from pyvitfast.grow.fixed import AnyLayout, Growth
from pyvitfast.grow.layout import Layout
from pyvitfast.grow.outcome import growth_report
from pyvitfast.grow.pair import check_pair
from pyvitfast.grow.swin import SwinLayout
from pyvitfast.models.architecture import config_of
from pyvitfast.models.checkpoint import load
from pyvitfast.models.config import ViTConfig
from pyvitfast.models.modules import plain_class, unwrap
from pyvitfast.models.swin_config import SwinConfig
from pyvitfast.models.swin_transformer import PrunedSwinTransformer

Model: TypeAlias = nn.Module | str | os.PathLike[str]
Target: TypeAlias = Model | ViTConfig | SwinConfig


@dataclass(frozen=True, eq=False)
class Pair:
    """A trained model and one of the architecture that it grows into.

    Args:
        big: the target, a copy, in the source's dtype, device and mode; its weights are its own still.
        state: the source's state dict, with position embeddings of the target's grid.
        source: layout of ``state``.
        target: layout of ``big``.
        resized: parameters that were interpolated for another image grid.
        kept: parameters that stay the target's own.
        training: mode of both.
    """

    big: nn.Module
    state: dict[str, Tensor]
    source: AnyLayout
    target: AnyLayout
    resized: tuple[str, ...]
    kept: tuple[str, ...]
    training: bool


def open_pair(source: Model, target: Target, head: str, seed: int) -> Pair:
    """Open both models and check that one can grow into the other.

    Raises:
        TypeError, NotImplementedError, ValueError: as :func:`pyvitfast.grow.grow`.
    """
    if head not in ("grow", "target"):
        raise ValueError(f"grow: `head` must be 'grow' or 'target', got {head!r}.")
    with torch.random.fork_rng(devices=[]):  # building a model draws its first weights
        torch.default_generator.manual_seed(seed)
        small = _source(source)
        old = layout_of(small)
        big = _target(target, old)
        new = layout_of(big)
    check_pair(old, new, keep_head=head == "target")
    keep_normalisation(small, big)
    weights = {key: t.detach() for key, t in small.state_dict().items()}
    state = old.resized(weights, new.img_size)
    some = next(iter(weights.values()))
    big = big.to(some.device, some.dtype).train(small.training)
    return Pair(
        big=big,
        state=state,
        source=replace(old, img_size=new.img_size),
        target=new,
        resized=tuple(key for key in state if state[key] is not weights[key]),
        kept=tuple(key for key in big.state_dict() if head == "target" and key.startswith(new.head_names)),
        training=small.training,
    )


def finished(
    big: nn.Module,
    grown: Mapping[str, Tensor],
    method: str,
    growth: Growth,
    resized: tuple[str, ...],
    kept: tuple[str, ...],
) -> nn.Module:
    """``big`` with the weights ``grown`` and the report of how they came about."""
    big.load_state_dict(grown)
    notes: Any = big
    notes.growth = growth_report(method, growth, resized, kept)
    return big


def layout_of(model: nn.Module) -> AnyLayout:
    """The layout of a model of a family that grows.

    Raises:
        TypeError: another family.
        NotImplementedError: a part that growth does not know.
    """
    swin = plain_class(unwrap(model)) in (SwinTransformer, PrunedSwinTransformer)
    return SwinLayout.of(model) if swin else Layout.of(model)


def keep_normalisation(source: nn.Module, target: nn.Module) -> bool:
    """Make ``target`` expect images with the mean and standard deviation that ``source`` was trained with.

    A model that says nothing of them has timm's default, ImageNet's.

    Returns:
        Whether it expected others.
    """
    theirs, ours = (timm.data.resolve_model_data_config(m) for m in (source, target))
    kept = {key: theirs[key] for key in ("mean", "std")}
    if all(ours[key] == value for key, value in kept.items()):
        return False
    known: Any = target
    known.pretrained_cfg = known.default_cfg = {**(getattr(target, "pretrained_cfg", None) or {}), **kept}
    return True


def _is_file(model: str | os.PathLike[str]) -> bool:
    return not isinstance(model, str) or Path(model).suffix == ".safetensors" or os.sep in model


def _source(model: Model) -> nn.Module:
    if isinstance(model, nn.Module):
        return unwrap(model)
    if _is_file(model):
        return load(model)
    _check_name("source", str(model))
    try:
        made: nn.Module = timm.create_model(str(model), pretrained=True).eval()
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"grow: `source` must be trained, and timm could not load weights for {model!r}: {error}. Pass a "
            "model or a file of pyvitfast.save."
        ) from error
    return made


def _target(model: Target, source: AnyLayout) -> nn.Module:
    if isinstance(model, ViTConfig | SwinConfig):
        return model.build()
    if isinstance(model, nn.Module):
        return copy.deepcopy(unwrap(model))
    if _is_file(model):
        return load(model)
    _check_name("target", str(model))
    made: nn.Module = timm.create_model(str(model), num_classes=source.num_classes, in_chans=source.in_chans)
    return made


def _check_name(role: str, name: str) -> None:
    if not timm.is_model(name):
        raise ValueError(
            f"grow: `{role}` must be a model, a .safetensors file or a name that timm knows, got {name!r}. "
            "See timm.list_models()."
        )


def set_eps(model: nn.Module, growth: Growth) -> None:
    """Give LayerNorms the source's epsilon, by the share of copied channels.

    Raises:
        NotImplementedError: an epsilon that ``pyvitfast.save`` could not keep.
    """
    source, target = growth.source, growth.target
    embed = growth.maps[source.stages[0].axis("embed")]
    share = len(embed.index) / (len(embed.index) + embed.means)
    for name, norm in model.named_modules():
        if isinstance(norm, nn.LayerNorm):
            norm.eps = source.eps * (1.0 if name.endswith(("q_norm", "k_norm")) else share)
    if source.eps * share != target.eps:
        try:
            config_of(model)
        except NotImplementedError as error:
            raise NotImplementedError(
                f"grow: LayerNorms must get eps {source.eps * share:g} where the target has {target.eps:g}, "
                f"which pyvitfast.save could not keep for this model: {error} Build the target with the "
                "source's eps, and with a width that is a multiple of the source's."
            ) from error
