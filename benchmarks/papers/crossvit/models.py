"""Whole models: ours beside timm's, eager, compiled and frozen; and the parts that the time goes to."""

from __future__ import annotations

import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import timm
import timm.models.crossvit
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from timm.models.crossvit import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from benchmarks.measure import error, flat, rounds
from benchmarks.papers.crossvit.stage import perturb
from pyvitfast.models import accelerate

SIDES = ("timm", "ours")
MODES = ("eager", "compiled", "frozen")
PARTS = ("large blocks", "small blocks", "fusion stage", "patch embedding", "resize", "rest")
TOLERANCE = 1e-4


def prepared(model: nn.Module, mode: str, x: Tensor) -> Callable[[], Tensor]:
    """A call of a model that is compiled as ``mode`` says; a copy, so that no two share a graph."""
    if mode == "eager":
        run: Any = model
    else:
        frozen = mode == "frozen"
        # Dynamo asks the setting, inductor the option, which also keeps the graphs apart.
        run = torch.compile(copy.deepcopy(model), dynamic=False, options={"freezing": frozen})
        with torch._inductor.config.patch(freezing=frozen):
            run(x)
    return lambda: run(x)


@contextmanager
def stopwatch(model: nn.Module) -> Iterator[dict[str, float]]:
    """Seconds spent in each part of a CrossViT, the encoder with its blocks.

    Methods of the classes are replaced: hooks on modules would send ours the slower way that serves hooks.
    """
    seconds: dict[str, float] = defaultdict(float)
    small = model.embed_dim[0]

    def timed(function: Callable[..., Any], label: Callable[..., str]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            start = time.perf_counter()
            out = function(*arguments, **settings)
            seconds[label(*arguments)] += time.perf_counter() - start
            return out

        return call

    def branch(block: Block, *_: Any) -> str:
        return "small blocks" if block.norm1.normalized_shape[0] == small else "large blocks"

    encoder = type(model.blocks[0])
    with ExitStack() as stack:
        for owner, name, label in (
            (Block, "forward", branch),
            (PatchEmbed, "forward", lambda *_: "patch embedding"),
            (encoder, "forward", lambda *_: "encoders"),
            (timm.models.crossvit, "scale_image", lambda *_: "resize"),
        ):
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name), label)))
        yield seconds


def parts_of(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Seconds of one forward pass by part."""
    with stopwatch(model) as seconds:
        start = time.perf_counter()
        model(x)
        total = time.perf_counter() - start
    found = {part: seconds.get(part, 0.0) for part in PARTS}
    found["fusion stage"] = seconds["encoders"] - found["large blocks"] - found["small blocks"]
    found["rest"] = total - sum(found.values())
    return found


def shares(models: dict[str, nn.Module], x: Tensor, repeats: int) -> dict[str, dict[str, float]]:
    """Median share of the time by part; the models take turns."""
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for _ in range(repeats + 1):
        for name, model in models.items():
            seen[name].append(parts_of(model, x))
    out = {}
    for name, runs in seen.items():
        medians = {part: statistics.median(r[part] for r in runs[1:]) for part in PARTS}
        out[name] = {part: value / sum(medians.values()) for part, value in medians.items()}
    return out


def measure_model(name: str, batch: int, seconds: float, failed: list[str]) -> dict[str, Any]:
    """Times of all candidates at one batch size; ratios are timm's time over ours in the same round."""
    torch.manual_seed(0)
    model = perturb(timm.create_model(name)).eval()
    changed = copy.deepcopy(model)
    accelerate(changed)
    sides = dict(zip(SIDES, (model, changed)))
    x = torch.randn(batch, 3, *model.img_size)
    candidates: dict[str, Callable[[], Tensor]] = {}
    notes: dict[str, str] = {}
    worst = 0.0
    with torch.inference_mode():
        expected = flat(model(x))
        for mode in MODES:
            for side, whose in sides.items():
                key = f"{side} {mode}"
                try:
                    call = prepared(whose, mode, x)
                    off = error(flat(call()), expected)
                except Exception as problem:
                    notes[key] = f"n/a: {type(problem).__name__}: {problem}".splitlines()[0][:200]
                    continue
                if off > TOLERANCE:
                    failed.append(f"{name} batch {batch}: {key} off by {off:.3g}, allowed {TOLERANCE:g}")
                    continue
                worst = max(worst, off)
                candidates[key] = call
        times = rounds(candidates, lambda: None, "cpu", seconds)
        parts = shares(sides, x, 3 if seconds < 5 else 7)
    torch._dynamo.reset()
    ratios, quartiles = {}, {}
    for mode in MODES:
        if {f"timm {mode}", f"ours {mode}"} <= times.keys():
            paired = [a / b for a, b in zip(times[f"timm {mode}"], times[f"ours {mode}"])]
            ratios[mode] = statistics.median(paired)
            quartiles[mode] = statistics.quantiles(paired, n=4)[::2]
    medians = {key: statistics.median(values) for key, values in times.items()}
    best = {
        side: min((t for key, t in medians.items() if key.startswith(side)), default=None) for side in sides
    }
    return {
        "model": name,
        "batch": batch,
        "median_ms": {key: 1e3 * value for key, value in medians.items()},
        "images_per_s": {key: batch / value for key, value in medians.items()},
        "ratio": ratios,
        "quartiles": quartiles,
        "ratio_best": best["timm"] / best["ours"] if best["timm"] and best["ours"] else None,
        "rounds": min(map(len, times.values())),
        "shares": parts,
        "max_error": worst,
        "notes": notes,
    }


def run(
    names: tuple[str, ...], batches: tuple[int, ...], quick: bool, progress: Progress, failed: list[str]
) -> list[dict[str, Any]]:
    """A row for each model and batch."""
    plan = [(name, batch) for name in names for batch in batches]
    return [
        measure_model(name, batch, 1.0 if quick else 60.0, failed)
        for name, batch in progress.track(plan, description="whole models")
    ]


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whole models can gain little: the exchange is a few percent of them. They must not lose."""
    found = []
    for row in rows:
        value = row["ratio"].get("eager")
        text = f"{row['model']} batch {row['batch']}, eager: timm's time over ours at least 0.99"
        held = value is not None and value >= 0.99
        found.append({"claim": text, "margin": 0.99, "measured": value, "held": held})
    return found


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    """Times and ratios, then shares of the time."""
    console.print("\nWhole models, timm / ours; x: timm's time over ours in the same round, with quartiles")
    table = Table("model", "batch", *(c for mode in MODES for c in (f"{mode} ms", f"x {mode}")), "x best")
    number = lambda v, spec: "-" if v is None else format(v, spec)  # noqa: E731
    for row in rows:
        cells = []
        for mode in MODES:
            cells.append(" / ".join(number(row["median_ms"].get(f"{s} {mode}"), ".1f") for s in SIDES))
            low, high = row["quartiles"].get(mode, (None, None))
            ratio = number(row["ratio"].get(mode), ".2f")
            cells.append(f"{ratio} ({number(low, '.2f')}-{number(high, '.2f')})")
        table.add_row(row["model"], str(row["batch"]), *cells, number(row["ratio_best"], ".2f"))
    console.print(table)
    table = Table("model", "batch", "side", *PARTS, title="share of the eager time")
    for row in rows:
        for side, found in row["shares"].items():
            cells = [f"{found[part]:.1%}" for part in PARTS]
            table.add_row(row["model"], str(row["batch"]), side, *cells)
    console.print(table)
    for row in rows:
        for key, note in row["notes"].items():
            console.print(f"{row['model']} batch {row['batch']}: {key}: {note}", style="dim")
