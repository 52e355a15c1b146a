"""A larger Vision Transformer from a trained smaller one."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from pyvitfast.grow.fixed import AnyLayout, Growth, grow_fixed, index_maps
from pyvitfast.grow.layout import Layout
from pyvitfast.grow.pair import check_average, check_pair
from pyvitfast.grow.rules import DEPTH
from pyvitfast.grow.swin import SwinLayout
from pyvitfast.models.architecture import config_of
from pyvitfast.models.checkpoint import load
from pyvitfast.models.modules import plain_class, unwrap
from pyvitfast.models.swin_transformer import PrunedSwinTransformer

Model: TypeAlias = nn.Module | str | os.PathLike[str]
Method: TypeAlias = Callable[[Growth], dict[str, Tensor]]

# Width and depth rule of each method; what stands here is what its name says, the other one may be chosen.
_RULES = {
    "fpi": ("fpi", "stack"),
    "net2net": ("net2net", "stack"),
    "aki": ("aki", "stack"),
    "average": ("average", "identity"),
    "stack": ("fpi", "stack"),
    "interleave": ("fpi", "interleave"),
    "identity": ("fpi", "identity"),
}
_NOISE = {"fpi": 0.02, "net2net": 0.02, "aki": 0.0, "average": 0.0}

# A learned operator is one more entry: from a Growth to the target's state dict.
METHODS: dict[str, Method] = dict.fromkeys(_RULES, grow_fixed)


@dataclass(frozen=True, eq=False)
class GrowthReport:
    """What :func:`grow` did.

    Args:
        method: the method.
        width: its width rule.
        depth: its depth rule.
        noise: relative size of the noise on new rows and columns.
        function_preserving: the grown model computes the source's outputs, up to rounding.
        copied: parameters with the source's shape.
        grown: parameters with more units.
        resized: parameters interpolated for another image grid.
        kept: parameters that are the target's own.
        inserted: blocks that add nothing to the residual stream yet.
        params_before: parameters of the source.
        params_after: parameters of the grown model.
        growth: the maps, which :func:`grow_optimizer_state` reads.
    """

    method: str
    width: str
    depth: str
    noise: float
    function_preserving: bool
    copied: tuple[str, ...]
    grown: tuple[str, ...]
    resized: tuple[str, ...]
    kept: tuple[str, ...]
    inserted: tuple[str, ...]
    params_before: int
    params_after: int
    growth: Growth = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold."""
        plain = ("method", "width", "depth", "noise", "function_preserving", "params_before", "params_after")
        lists = ("copied", "grown", "resized", "kept", "inserted")
        return {n: getattr(self, n) for n in plain} | {n: list(getattr(self, n)) for n in lists}

    def __str__(self) -> str:
        counts = ", ".join(f"{len(getattr(self, n))} {n}" for n in ("copied", "grown", "resized", "kept"))
        return (
            f"{self.method} (width {self.width}, depth {self.depth}, noise {self.noise:g}), "
            f"{'' if self.function_preserving else 'not '}function preserving: {self.params_before:,} -> "
            f"{self.params_after:,} parameters in tensors {counts}; "
            f"blocks that add nothing yet: {', '.join(self.inserted) or 'none'}"
        )


def grow(
    source: Model,
    target: Model,
    method: str = "fpi",
    *,
    width: str | None = None,
    depth: str | None = None,
    noise: float | None = None,
    seed: int = 0,
    maps: Mapping[str, Tensor] | None = None,
    neuron_wise: bool = False,
    head: str = "grow",
) -> nn.Module:
    r"""A model of the target's architecture with weights made from a smaller, trained one.

    A linear layer W [out, in] becomes :math:`E_{out} W \bar E_{in}^\top`: rows are copied, columns are copied
    and divided by their number of copies. Where LayerNorm sees every channel as often as before, the grown
    model computes the source's function.

    =============  =========================================================================================
    method         what it does
    =============  =========================================================================================
    fpi            each unit copied in turn; exact without noise where the width is a multiple
    net2net        units beyond the source's copied at random; LayerNorm then sees other statistics
    aki            like fpi, with new units from the next layer; not exact, and no two units are alike
    average        whole copies, and channels that carry the mean; exact for any width
    stack          blocks repeated as a whole; the remainder from the bottom (``stack_top``: from the top)
    interleave     each block repeated on the spot
    identity       new blocks that add nothing yet; exact
    =============  =========================================================================================

    Args:
        source: the trained model: a timm ViT, DeiT or Swin Transformer, a file of :func:`pyvitfast.save`, or
            a timm name, whose pretrained weights are loaded.
        target: the architecture: a model, which stays as it is, a file, or a timm name, which is built with
            the source's image channels and classes.
        method: one of the above.
        width: width rule of a depth method: ``fpi`` (default), ``net2net``, ``aki`` or ``average``.
        depth: depth rule of a width method: ``stack`` (default; with ``average``, ``identity``),
            ``stack_top``, ``interleave`` or ``identity``.
        noise: standard deviation of normal noise on new rows and columns of matrices, relative to the root
            mean square of the matrix. By default 0.02 for fpi and net2net, whose copies otherwise receive
            equal gradients for ever, and 0 for aki and average. 0 is exact. As much comes of noise of
            0.02 / sqrt(D) on the entries of the maps E. Size and place are our choice.
        seed: of noise and random maps.
        maps: int64 index maps, target unit to source unit, for ``embed``, ``heads`` or ``hidden`` instead of
            the rule's; in a Swin Transformer ``embed.0`` and so on, by stage.
        neuron_wise: let aki take the outgoing columns of new heads and hidden units from the next layer too,
            as a re-implementation does, rather than rows only, as the formula says.
        head: ``"grow"``, or ``"target"`` to keep the target's own classifiers.

    Returns:
        A new module that shares no memory with either, in the source's dtype, device and train or eval mode,
        with the source's LayerNorm epsilon: average makes it smaller by the share of copied channels.
        :func:`report` tells what was done.

    Raises:
        TypeError: a model that is no timm ViT, DeiT or Swin Transformer.
        NotImplementedError: a part that growth does not know, named; average where it is not exact; an
            epsilon that ``pyvitfast.save`` could not keep.
        ValueError: an unknown method or rule, or a pair that does not fit; see :func:`check_pair`.

    Warns:
        RuntimeWarning: fpi to a width that is no multiple of the source's.

    Source:
        Net2Net (Chen, Goodfellow, Shlens, ICLR 2016); bert2BERT (Chen et al., ACL 2022) for fpi and aki;
        LEMON (Wang et al., ICLR 2024) for average; StackBERT (Gong et al., ICML 2019). Copying in turn rather
        than at random, the order of inserted blocks and the noise are our choice.

    Example:
        >>> small = pyvitfast.load("deit_small.safetensors")
        >>> big = pyvitfast.grow.grow(small, "deit_base_patch16_224", method="fpi")
        >>> print(pyvitfast.grow.report(big))
    """
    width, depth = _rules(method, width, depth)
    if noise is None:
        noise = _NOISE[width]
    if not math.isfinite(noise) or noise < 0:
        raise ValueError(f"grow: `noise` must be a number of at least 0, got {noise}.")
    if head not in ("grow", "target"):
        raise ValueError(f"grow: `head` must be 'grow' or 'target', got {head!r}.")
    with torch.random.fork_rng(devices=[]):  # building a model draws its first weights
        torch.default_generator.manual_seed(seed)
        small = _source(source)
        old = layout_of(small)
        big = _target(target, old)
        new = layout_of(big)
    check_pair(old, new, keep_head=head == "target")
    if width == "average":
        check_average(old, new)
    if width == "fpi" and any(b.dim % a.dim for a, b in zip(old.stages, new.stages, strict=True)):
        warnings.warn(
            "grow: the target's width is no multiple of the source's "
            f"({', '.join(f'{a.dim} -> {b.dim}' for a, b in zip(old.stages, new.stages, strict=True))}), so "
            'LayerNorm sees other statistics and fpi changes the function; method="average" does not.',
            RuntimeWarning,
            stacklevel=2,
        )
    weights = {key: t.detach() for key, t in small.state_dict().items()}
    state = old.resized(weights, new.img_size)
    growth = Growth(
        state=state,
        source=replace(old, img_size=new.img_size),
        target=new,
        width=width,
        depth=depth,
        maps=index_maps(old, new, width, seed, maps or {}),
        layers=tuple(
            DEPTH[depth](a.depth, b.depth, old.alternating)
            for a, b in zip(old.stages, new.stages, strict=True)
        ),
        noise=noise,
        seed=seed,
        neuron_wise=neuron_wise,
    )
    grown = METHODS[method](growth)
    kept = [key for key in big.state_dict() if head == "target" and key.startswith(new.head_names)]
    grown |= {key: big.state_dict()[key] for key in kept}
    some = next(iter(weights.values()))
    big = big.to(some.device, some.dtype)
    big.load_state_dict(grown)
    _set_eps(big, old, new, growth)
    big.train(small.training)
    resized = tuple(key for key in state if state[key] is not weights[key])
    notes: Any = big
    notes.growth = _report(method, growth, resized, tuple(kept))
    return big


def _rules(method: str, width: str | None, depth: str | None) -> tuple[str, str]:
    if method not in METHODS:
        raise ValueError(f"grow: `method` must be one of {', '.join(METHODS)}, got {method!r}.")
    own_width, own_depth = _RULES.get(method, ("fpi", "stack"))
    for name, given, own, known in (
        ("width", width, own_width, tuple(_NOISE)),
        ("depth", depth, own_depth, tuple(DEPTH)),
    ):
        if given is not None and given not in known:
            raise ValueError(f"grow: `{name}` must be one of {', '.join(known)}, got {given!r}.")
        if given is not None and method == own and given != own and given != f"{own}_top":
            raise ValueError(
                f"grow: `{name}` must be left out with method {method!r}, which is a {name} rule itself, got "
                f"{given!r}. Choose the method by one of width and depth, and the other rule by name."
            )
    return width or own_width, depth or own_depth


def layout_of(model: nn.Module) -> AnyLayout:
    """The layout of a model of a family that grows.

    Raises:
        TypeError: another family.
        NotImplementedError: a part that growth does not know.
    """
    swin = plain_class(unwrap(model)) in (SwinTransformer, PrunedSwinTransformer)
    return SwinLayout.of(model) if swin else Layout.of(model)


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


def _target(model: Model, source: AnyLayout) -> nn.Module:
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


def _set_eps(model: nn.Module, source: AnyLayout, target: AnyLayout, growth: Growth) -> None:
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


def _report(method: str, growth: Growth, resized: tuple[str, ...], kept: tuple[str, ...]) -> GrowthReport:
    old, new = growth.source.parameters(), growth.target.parameters()
    same = {key for key, p in new.items() if old[growth.origin(key)[0]].shape == p.shape}
    used = {axis for p in old.values() for axis in (p.writes and p.writes[1], p.reads) if axis}
    wider = any(bool(growth.maps[axis].new.any()) for axis in used)
    embeds = [growth.maps[stage.axis("embed")] for stage in growth.source.stages]
    statistics = all(embed.means or embed.uniform for embed in embeds)
    exact_width = not wider or (statistics and not growth.noise and growth.width != "aki")
    exact_depth = growth.depth == "identity" or not any(
        a.depth != b.depth for a, b in zip(growth.source.stages, growth.target.stages, strict=True)
    )
    return GrowthReport(
        method=method,
        width=growth.width,
        depth=growth.depth,
        noise=growth.noise,
        function_preserving=method in _RULES and exact_width and exact_depth and not (resized or kept),
        copied=tuple(key for key in new if key in same and key not in (*resized, *kept)),
        grown=tuple(key for key in new if key not in same and key not in kept),
        resized=resized,
        kept=kept,
        inserted=tuple(
            f"{stage.prefix}.{i}"
            for stage, layers in zip(growth.target.stages, growth.layers, strict=True)
            for i, added in enumerate(layers.inserted)
            if added
        ),
        params_before=sum(math.prod(p.shape) for p in old.values()),
        params_after=sum(math.prod(p.shape) for p in new.values()),
        growth=replace(growth, state={}),
    )


def report(model: nn.Module) -> GrowthReport:
    """What :func:`grow` did to make a model.

    Raises:
        ValueError: the model is not from :func:`grow` in this process; files do not keep the report.
    """
    found = getattr(unwrap(model), "growth", None)
    if not isinstance(found, GrowthReport):
        raise ValueError("report: `model` must come from grow() in this process, got one without a report.")
    return found
