"""Times of parts of Vision Transformers of any widths, for latency tables."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyvitfast.models.clock import seconds_of
from pyvitfast.models.config import ViTConfig
from pyvitfast.models.vision_transformer import BlockDims, ViTDims
from pyvitfast.prune.structure import UnitTable

AXES = ("embed_dim", "heads", "qk_dim", "v_dim", "mlp")
# Seconds from which a point is timed three times only; the timer's noise is small against it.
_SLOW = 0.1
# Points of the automatic grid on each axis, the ends included.
_POINTS = {"embed_dim": 5, "heads": 4, "qk_dim": 4, "v_dim": 4, "mlp": 8}
_KINDS = {"embed_dim": "embed", "heads": "head", "qk_dim": "qk", "v_dim": "v", "mlp": "mlp"}


def bad(rule: str, got: object) -> ValueError:
    """An error of a table or its measurement."""
    return ValueError(f"LatencyTable: {rule}, got {got}.")


def device_name(device: torch.device) -> str:
    """The hardware behind ``device``, as its vendor calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def ends(config: ViTConfig) -> tuple[dict[str, int], dict[str, int]]:
    """Smallest and largest width on each axis: one group of pruning, and the model's own."""
    sizes: dict[str, list[tuple[int, int]]] = {}
    for s in UnitTable(config).structures.values():
        sizes.setdefault(s.kind, []).append((s.group_size, s.size))
    low = {axis: min(group for group, _ in sizes[kind]) for axis, kind in _KINDS.items()}
    high = {axis: max(size for _, size in sizes[kind]) for axis, kind in _KINDS.items()}
    return low, high


def grid_points(config: ViTConfig, given: Mapping[str, Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """The widths on each axis: those given, else points spread evenly over what pruning can reach.

    Raises:
        ValueError: an axis of another name.
    """
    if unknown := sorted(set(given) - set(AXES)):
        raise bad(f"`grids` must have keys out of {', '.join(AXES)}", unknown)
    low, high = ends(config)

    def automatic(axis: str) -> Iterator[int]:
        first, last = low[axis], high[axis]
        for x in np.linspace(first, last, _POINTS[axis]):
            yield min(last, max(1, round(float(x) / first)) * first)

    return tuple(tuple(sorted({*(given.get(axis) or automatic(axis))})) for axis in AXES)


def probe_dims(config: ViTConfig, grids: Sequence[Sequence[int]]) -> list[ViTDims]:
    """Whole models to fit a table to, within the grid: ever narrower ones, and some of mixed widths."""
    low, _ = ends(config)
    limits = {axis: (grid[0], grid[-1]) for axis, grid in zip(AXES, grids, strict=True)}
    random = np.random.default_rng(0)

    def scaled(axis: str, size: int, share: float) -> int:
        width = min(size, max(1, round(size * share / low[axis])) * low[axis])
        return max(1, limits[axis][0], min(limits[axis][1], width))

    def model(share: Callable[[str], float]) -> ViTDims:
        blocks = (
            BlockDims(*(scaled(axis, getattr(block, axis), share(axis)) for axis in AXES[1:]))
            for block in config.dims.blocks
        )
        return ViTDims(scaled("embed_dim", config.dims.embed_dim, share("embed_dim")), tuple(blocks))

    def mixed(least: float, most: float) -> Callable[[str], float]:
        # As pruning goes: query and key narrow first, the residual stream last.
        spans = {axis: (least, most) for axis in AXES} | {"embed_dim": (1.0, 1.0), "qk_dim": (0.1, most / 2)}
        return lambda axis: float(random.uniform(*spans[axis]))

    def even(share: float) -> Callable[[str], float]:
        return lambda axis: share

    shares = [even(s) for s in (1.0, 0.92, 0.85, 0.78, 0.7, 0.6, 0.45, 0.3)]
    shares += [mixed(*s) for s in ((0.5, 1.0), (0.3, 1.0), (0.3, 0.8), (0.1, 0.6), (0.1, 0.4))]
    return [model(share) for share in shares]


class Timer:
    """Runs halves of blocks, the model without blocks, and whole models."""

    def __init__(self, config: ViTConfig, device: torch.device, dtype: torch.dtype, batch: int) -> None:
        self.config, self.device, self.dtype, self.batch = config, device, dtype, batch
        self.tokens = config.tokens()[1]
        self.store = torch.empty(0, device=device, dtype=dtype)
        self.images = torch.empty(0, device=device, dtype=dtype)
        self.probes: Sequence[ViTDims] = ()
        self.parts: dict[tuple[str, tuple[int, ...]], Callable[[], Tensor]] = {}

    def _input(self, *shape: int) -> Tensor:
        count = self.batch * math.prod(shape)
        if self.images.numel() < count:
            self.images = torch.full((count,), 0.5, device=self.device, dtype=self.dtype)
        return self.images[:count].view(self.batch, *shape)

    def _model(self, embed: int, *blocks: BlockDims) -> Any:
        config = self.config.prune(ViTDims(embed, blocks))
        with torch.device("meta"):
            model = replace(config, scales=config.scales[: len(blocks)]).build().eval()
        for module in model.modules():
            for name, meta in module.named_parameters(recurse=False):
                # One storage for all weights: thousands of blocks with their own would not fit in memory.
                if self.store.numel() < meta.numel():
                    self.store = torch.full((meta.numel(),), 0.01, device=self.device, dtype=self.dtype)
                weight = self.store[: meta.numel()].view(meta.shape)
                setattr(module, name, nn.Parameter(weight, requires_grad=False))
        return model

    def _whole(self, dims: ViTDims) -> Any:
        """A model with storage for each weight, as it will run."""
        with torch.device("meta"):
            model = self.config.prune(dims).build().eval()
        model = model.to(self.dtype).to_empty(device=self.device).requires_grad_(False)
        for parameter in model.parameters():
            parameter.fill_(0.01)
        return model

    def _part(self, part: str, widths: tuple[int, ...]) -> Callable[[], Tensor]:
        if part in ("rest", "whole"):
            model = self._model(widths[0]) if part == "rest" else self._whole(self.probes[widths[0]])
            images = self._input(self.config.in_chans, *self.config.img_size)
            return lambda: model(images)
        x = self._input(self.tokens, widths[0])
        if part == "mlp":
            block = self._model(widths[0], BlockDims(1, 1, 1, widths[1])).blocks[0]
            return lambda: x + block.ls2(block.mlp(block.norm2(x)))
        block = self._model(widths[0], BlockDims(widths[1], widths[2], widths[3], 1)).blocks[0]
        return lambda: x + block.ls1(block.attn(block.norm1(x)))

    def calls(self, part: str, widths: tuple[int, ...]) -> int:
        """Build a part, warm it up, and say how many calls make a timing of a millisecond."""
        self.parts[part, widths] = self._part(part, widths)
        self.seconds(part, widths, 2)
        return min(50, max(1, int(1e-3 / max(1e-7, self.seconds(part, widths, 1)))))

    @torch.inference_mode()
    def seconds(self, part: str, widths: tuple[int, ...], calls: int) -> float:
        """Mean time of ``calls`` passes."""
        return seconds_of(self.parts[part, widths], self.device, calls)

    def medians(
        self, parts: Sequence[tuple[str, tuple[int, ...]]], repeats: int, advance: Callable[[], None]
    ) -> list[float]:
        """Median seconds of each part; they take turns."""
        times: list[list[float]] = [[] for _ in parts]
        calls: list[int] = []
        for part, widths in reversed(parts):  # the largest first, whose storage the others share
            calls.insert(0, self.calls(part, widths))
            advance()
        for turn in range(repeats):
            # Forth and back, so that a drift of the machine's speed does not follow the grid.
            for i in range(len(parts))[:: 1 if turn % 2 == 0 else -1]:
                if len(times[i]) < 3 or times[i][0] < _SLOW:
                    times[i].append(self.seconds(*parts[i], calls[i]))
                advance()
        return [statistics.median(t) for t in times]

    def in_pairs(self, repeats: int, advance: Callable[[], None]) -> list[float]:
        """Median seconds of the whole models, each in turns with the first one and relative to it.

        Two at a time and one call each, as a user compares a model with its parent: what is in the caches
        and in the allocator's hands depends on what ran before.
        """
        self.parts.clear()
        first = ("whole", (0,))
        alone, ratios = [], [1.0]
        self.calls(*first)
        for i in range(1, len(self.probes)):
            other = ("whole", (i,))
            self.calls(*other)
            ours: list[float] = []
            theirs: list[float] = []
            for _ in range(repeats + 1):
                if len(ours) < 7 or ours[-1] < _SLOW:
                    ours.append(self.seconds(*first, 1))
                    theirs.append(self.seconds(*other, 1))
                advance()
                advance()
            del self.parts[other]
            ratios.append(statistics.median(theirs[1:]) / statistics.median(ours[1:]))
            alone += ours[1:]
        return [statistics.median(alone) * ratio for ratio in ratios] if alone else []
