"""Whether one model can grow into another."""

from __future__ import annotations

from dataclasses import asdict

from pyvitfast.grow.layout import Layout
from pyvitfast.grow.swin import SwinLayout

_WHY = {
    "patch_size": "patches of another size need other filters",
    "in_chans": "filters for other image channels do not grow",
    "act": "another activation computes another function",
}
_MAY_DIFFER = {"dim", "depth", "heads", "hidden", "stages", "img_size", "num_classes", "eps"}


def _need(name: str, rule: str, good: bool, source: object, target: object, mend: str) -> None:
    if not good:
        raise ValueError(f"grow: the target's {name} must be {rule}, got {source} -> {target}. {mend}")


def check_pair(source: Layout | SwinLayout, target: Layout | SwinLayout, keep_head: bool = False) -> None:
    """Refuse a pair that no rule grows.

    Args:
        source: what is there.
        target: what it shall become.
        keep_head: the target's classifiers stay as they are, so classes may differ.

    Raises:
        ValueError: another family, fewer layers, a smaller width, heads of a width that is no multiple,
            another patch size, other optional parts, or other classes; the message names it.
    """
    families = {Layout: "ViT", SwinLayout: "Swin"}
    _need(
        "family",
        "the source's",
        type(source) is type(target),
        families[type(source)],
        families[type(target)],
        "Take a target of the source's family.",
    )
    _need(
        "number of stages",
        "as in the source",
        len(source.stages) == len(target.stages),
        len(source.stages),
        len(target.stages),
        "Take a target with as many stages.",
    )
    one, other = asdict(source), asdict(target)
    for name in one:
        if name not in _MAY_DIFFER:
            reason = _WHY.get(name, "this part has no counterpart to grow from")
            mend = f"Build the target with {name}={one[name]!r}: {reason}."
            _need(name, "as in the source", one[name] == other[name], one[name], other[name], mend)
    if not keep_head:
        _need(
            "num_classes",
            "as in the source",
            source.num_classes == target.num_classes,
            source.num_classes,
            target.num_classes,
            'Build the target with as many classes, or pass head="target" to keep the target\'s own head.',
        )
    for a, b in zip(source.stages, target.stages, strict=True):
        where = f" of {a.prefix}"
        _need(f"depth{where}", "no smaller", b.depth >= a.depth, a.depth, b.depth, "Growth drops no layers.")
        for name in ("dim", "heads", "hidden"):
            few, many = getattr(a, name), getattr(b, name)
            mend = "Growth drops no units; pyvitfast.prune does."
            _need(f"{name}{where}", "no smaller", many >= few, few, many, mend)
        _need(
            f"head_dim{where}",
            "a multiple of the source's",
            b.head_dim % a.head_dim == 0,
            a.head_dim,
            b.head_dim,
            "Give the target another number of heads: whole heads are copied.",
        )


def check_average(source: Layout | SwinLayout, target: Layout | SwinLayout) -> None:
    """Refuse average expansion to a width that is no multiple where it would change the function.

    Raises:
        NotImplementedError: the part that stands in the way, by name.
    """
    if all(b.dim % a.dim == 0 for a, b in zip(source.stages, target.stages, strict=True)):
        return
    reason = ""
    if source.writing_norm:
        reason = f"{source.writing_norm} writes to the residual stream, and its output has no mean channel"
    elif source.final_norm == "fc_norm" and "max" in source.global_pool:
        reason = "the greatest of the means is not the mean of the greatest, as pooling before fc_norm needs"
    if reason:
        raise NotImplementedError(
            f"grow: method average needs a width that is a multiple of the source's here, got "
            f"{source.stages[0].dim} -> {target.stages[0].dim}: {reason}. Take such a width, or method aki."
        )
