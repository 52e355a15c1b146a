"""A larger Vision Transformer from a trained smaller one."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from pyvitfast.grow.fixed import WIDTHS, Growth, grow_fixed, index_maps
from pyvitfast.grow.ligo import LiGOOperator
from pyvitfast.grow.mango import MangoOperator
from pyvitfast.grow.models import Model, Target, finished, open_pair, set_eps
from pyvitfast.grow.operators import GrowthOperator, LossFunction
from pyvitfast.grow.pair import check_average
from pyvitfast.grow.rules import DEPTH

Method: TypeAlias = Callable[[Growth], dict[str, Tensor]] | type[GrowthOperator]

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

# A rule goes from a Growth to the target's state dict; an operator is made from source and target.
METHODS: dict[str, Method] = {
    **dict.fromkeys(_RULES, grow_fixed),
    "mango": MangoOperator,
    "ligo": LiGOOperator,
}


def grow(
    source: Model,
    target: Target,
    method: str = "fpi",
    *,
    width: str | None = None,
    depth: str | None = None,
    noise: float | None = None,
    seed: int = 0,
    maps: Mapping[str, Tensor] | None = None,
    neuron_wise: bool = False,
    head: str = "grow",
    loader: Iterable[Any] | None = None,
    loss_fn: LossFunction | None = None,
    steps: int | None = None,
    **options: Any,
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
    mango          learned, :class:`MangoOperator`: all weights mix through a ring of four cores
    ligo           learned, :class:`LiGOOperator`: width factors and layer coefficients
    =============  =========================================================================================

    Args:
        source: the trained model: a timm ViT, DeiT or Swin Transformer, a file of :func:`pyvitfast.save`, or
            a timm name, whose pretrained weights are loaded.
        target: the architecture: a model, which stays as it is, a file, or a timm name, which is built with
            the source's image channels and classes; or a ``ViTConfig`` or ``SwinConfig``.
        method: one of the above.
        width: width rule of a depth method: ``fpi`` (default), ``net2net``, ``aki`` or ``average``.
        depth: depth rule of a width method: ``stack`` (default; with ``average``, ``identity``),
            ``stack_top``, ``interleave`` or ``identity``. Where a learned operator starts from.
        noise: standard deviation of normal noise on new rows and columns of matrices, relative to the root
            mean square of the matrix. By default 0.02 for fpi and net2net, whose copies otherwise receive
            equal gradients for ever, and 0 for aki and average. 0 is exact. As much comes of noise of
            0.02 / sqrt(D) on the entries of the maps E, where learned operators have it. Size and place are
            our choice.
        seed: of noise and random maps.
        maps: int64 index maps, target unit to source unit, for ``embed``, ``heads`` or ``hidden`` instead of
            the rule's; in a Swin Transformer ``embed.0`` and so on, by stage.
        neuron_wise: let aki take the outgoing columns of new heads and hidden units from the next layer too,
            as a re-implementation does, rather than rows only, as the formula says.
        head: ``"grow"``, or ``"target"`` to keep the target's own classifiers.
        loader: batches that a learned operator is trained on; without, it is used as it starts.
        loss_fn: the loss that it is trained with; see :meth:`GrowthOperator.fit`.
        steps: of its training, 100 by default.
        options: of the learned operator, such as ``rank`` or ``style``, and of its training: ``lr``,
            ``grad_accum``, ``clip``, ``device``, ``progress``.

    Returns:
        A new module that shares no memory with either, in the source's dtype, device and train or eval mode,
        with the source's LayerNorm epsilon: average makes it smaller by the share of copied channels. Its
        ``pretrained_cfg`` has the source's mean and std of images, since its weights were trained on such.
        :func:`report` tells what was done.

    Raises:
        TypeError: a model that is no timm ViT, DeiT or Swin Transformer.
        NotImplementedError: a part that growth does not know, named; average where it is not exact; an
            epsilon that ``pyvitfast.save`` could not keep.
        ValueError: an unknown method, rule or option, one of a learned operator with a fixed rule or the
            other way round, or a pair that does not fit; see :func:`check_pair`.
        FloatingPointError: training of a learned operator met a loss that is not finite.

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
    if method not in METHODS:
        raise ValueError(f"grow: `method` must be one of {', '.join(METHODS)}, got {method!r}.")
    made = METHODS[method]
    if isinstance(made, type):
        fixed = {"width": width, "maps": maps, "neuron_wise": neuron_wise or None}
        _refuse(method, "is learned and starts from index maps of its own", fixed)
        start = {"depth": "stack" if depth is None else depth, "noise": noise, "seed": seed, "head": head}
        return _learned(made, source, target, start, loader, loss_fn, steps, options)
    width, depth = _rules(method, width, depth)
    learned = {"loader": loader, "loss_fn": loss_fn, "steps": steps, **options}
    _refuse(method, "is a fixed rule, and nothing is trained", learned)
    if noise is None:
        noise = _NOISE[width]
    if not math.isfinite(noise) or noise < 0:
        raise ValueError(f"grow: `noise` must be a number of at least 0, got {noise}.")
    pair = open_pair(source, target, head, seed)
    old, new = pair.source, pair.target
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
    growth = Growth(
        state=pair.state,
        source=old,
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
    grown = made(growth)
    grown |= {key: pair.big.state_dict()[key] for key in pair.kept}
    set_eps(pair.big, growth)
    return finished(pair.big, grown, method, growth, pair.resized, pair.kept)


def _refuse(method: str, reason: str, given: Mapping[str, Any]) -> None:
    if found := [name for name, value in given.items() if value is not None]:
        raise ValueError(
            f"grow: `{found[0]}` must be left out with method {method!r}, which {reason}, got "
            f"{given[found[0]]!r}."
        )


def _learned(
    kind: type[GrowthOperator],
    source: Model,
    target: Target,
    start: Mapping[str, Any],
    loader: Iterable[Any] | None,
    loss_fn: LossFunction | None,
    steps: int | None,
    options: Mapping[str, Any],
) -> nn.Module:
    of_start = set(inspect.signature(kind).parameters) - {"source", "target"}
    of_fit = set(inspect.signature(kind.fit).parameters) - {"self"}
    if unknown := sorted(set(options) - of_start - of_fit):
        raise ValueError(
            f"grow: options of method {kind.method!r} must be among "
            f"{', '.join(sorted((of_start | of_fit) - set(start)))}, got {', '.join(unknown)}."
        )
    training = {name: value for name, value in options.items() if name in of_fit}
    if steps is not None:
        training["steps"] = steps
    if (loader is None) != (loss_fn is None) or (loader is None and training):
        raise ValueError(
            "grow: `loader` and `loss_fn` must both be given to train the operator, or neither and nothing "
            f"else of training, got {'no' if loader is None else 'a'} loader, "
            f"{'no' if loss_fn is None else 'a'} loss_fn and {training}."
        )
    operator = kind(source, target, **start, **{n: v for n, v in options.items() if n in of_start})
    if loader is not None and loss_fn is not None:
        operator.fit(loader, loss_fn, **training)
    return operator.materialize()


def _rules(method: str, width: str | None, depth: str | None) -> tuple[str, str]:
    own_width, own_depth = _RULES.get(method, ("fpi", "stack"))
    for name, given, own, known in (
        ("width", width, own_width, WIDTHS),
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
