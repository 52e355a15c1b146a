"""What a growth did."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from pyvitfast.grow.fixed import WIDTHS, Growth
from pyvitfast.models.modules import unwrap


@dataclass(frozen=True, eq=False)
class GrowthReport:
    """What :func:`pyvitfast.grow.grow` did.

    Args:
        method: the method.
        width: its width rule; of a learned operator, the method.
        depth: its depth rule; of a learned operator, where it started.
        noise: relative size of the noise on new rows and columns.
        function_preserving: the grown model computes the source's outputs, up to rounding; never claimed for
            a learned operator.
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


def growth_report(
    method: str, growth: Growth, resized: tuple[str, ...], kept: tuple[str, ...]
) -> GrowthReport:
    """The report of a model that ``growth`` made."""
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
        function_preserving=growth.width in WIDTHS and exact_width and exact_depth and not (resized or kept),
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
