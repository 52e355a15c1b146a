"""Measured latency on the CPU, and accuracy at equal measured latency."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import timm
import torch
from torch import nn

import pyvitfast  # noqa: F401  (registers nvit_revit_small where this version has it)
from benchmarks.measure import alternate
from benchmarks.papers.nvit.data import Task
from benchmarks.papers.report import conditions
from pyvitfast.models.config import ViTConfig
from pyvitfast.models.vision_transformer import ViTDims
from pyvitfast.prune import LatencyTable, NViTPruner

WHOLE_MODELS = ("deit_base_patch16_224", "deit_small_patch16_224", "nvit_revit_small")
CURVES = ("nvit", "torch-pruning, global", "torch-pruning, isomorphic")
POINTS = (0.75, 0.6)
HALVED = ("deit_tiny_patch16_224", "deit_small_patch16_224")
HALF, AT_MOST = 0.5, 0.55


def medians(
    models: dict[str, nn.Module], batch: int, shape: tuple[int, ...], seconds: float
) -> dict[str, float]:
    """Median seconds of a forward pass of each model; the models take turns."""
    x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
    runs: dict[str, Callable[[], Any]] = {name: partial(model, x) for name, model in models.items()}
    for model in models.values():
        model.eval()
    with torch.inference_mode():
        return alternate(runs, lambda: None, "cpu", seconds)


def between(points: list[tuple[float, float]], latency: float) -> float | None:
    """Accuracy at ``latency`` on the line through (latency, accuracy) points; None outside of them."""
    points = sorted(points)
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= latency <= x1:
            return y0 if x0 == x1 else y0 + (y1 - y0) * (latency - x0) / (x1 - x0)
    return None


def equal_latency(task: Task, found: dict[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
    """Accuracy of NViT and of Torch-Pruning where both take the same measured time.

    ``found`` is the task's part of an accuracy run: widths and accuracies of all models, by which freshly
    initialised ones are built and timed at batch 256. Curves start at the dense model.
    """
    size = task.model["img_size"]
    dense = timm.models.VisionTransformer(in_chans=1, num_classes=10, depth=4, num_heads=4, **task.model)
    config = ViTConfig.from_model(dense)
    points: list[dict[str, Any]] = []
    for seed, accuracy in enumerate(found["dense"]):
        rows = [m for m in found["models"] if m["seed"] == seed and m["criterion"] in CURVES]
        models = {"dense": dense}
        for row in rows:
            dims = ViTDims.from_dict(row["dims"])
            models[f"{row['criterion']} {row['budget']}"] = config.prune(dims).build()
        times = medians(models, 256, (1, size, size), 20.0)
        for name in CURVES:
            points.append(
                {"criterion": name, "seed": seed, "budget": 1.0, "latency": 1.0}
                | {"one-shot": accuracy, "finetuned": accuracy}
            )
        for row in rows:
            share = times[f"{row['criterion']} {row['budget']}"] / times["dense"]
            kept = {key: row[key] for key in ("criterion", "seed", "budget", "one-shot", "finetuned")}
            points.append(kept | {"latency": share})
        progress(f"{task.name}, seed {seed}: dense {1e3 * times['dense']:.1f} ms for 256 images")
    at: dict[str, dict[str, dict[str, list[float | None]]]] = {}
    for name in CURVES:
        for when in ("one-shot", "finetuned"):
            for latency in POINTS:
                values = at.setdefault(name, {}).setdefault(when, {}).setdefault(str(latency), [])
                for seed in range(len(found["dense"])):
                    line = [p for p in points if p["criterion"] == name and p["seed"] == seed]
                    values.append(between([(p["latency"], p[when]) for p in line], latency))
    return conditions() | {"batch": 256, "points": points, "at": at}


def print_equal_latency(name: str, timed: dict[str, Any]) -> None:
    def cell(values: list[float]) -> str:
        return f"{statistics.mean(values):.1f}" if values else "n/a"

    print(
        f"\n{name}: accuracy at equal measured latency, batch {timed['batch']}, "
        f"{timed['threads']} thread(s), load {timed['load']}; means over seeds: latency as a share of the "
        "dense model's, top-1 one-shot -> after 3 epochs"
    )
    for criterion in CURVES:
        mine = [p for p in timed["points"] if p["criterion"] == criterion]
        for budget in sorted({p["budget"] for p in mine}, reverse=True):
            rows = [p for p in mine if p["budget"] == budget]
            latency, before, after = (
                statistics.mean(p[key] for p in rows) for key in ("latency", "one-shot", "finetuned")
            )
            print(
                f"  {criterion:<28}{budget:5.0%} MACs: {latency:6.1%} latency  {before:5.1f} -> {after:5.1f}"
            )
        for latency in POINTS:
            values = [timed["at"][criterion][when][str(latency)] for when in ("one-shot", "finetuned")]
            kept = [[v for v in column if v is not None] for column in values]
            seeds = f"{len(kept[0])} of {len(values[0])} seeds"
            text = f"at {latency:.0%} of the latency: {cell(kept[0])} -> {cell(kept[1])} ({seeds})"
            print(f"  {criterion:<28}{text}")


def pruned_at_random(model: nn.Module, shares: list[float]) -> dict[float, nn.Module]:
    """Compacted models at each share of the MACs, units chosen at random."""
    pruner = NViTPruner(model, target=min(shares), groups_per_step=8)
    generator = torch.Generator().manual_seed(0)
    reached: dict[float, nn.Module] = {}
    while not pruner.done:
        pruner.prune_once(torch.rand(pruner.table.count, generator=generator))
        for share in shares:
            if share not in reached and pruner.fraction <= share:
                reached[share] = pruner.compact()
    return reached


def cpu_latency(quick: bool, progress: Callable[[str], None]) -> dict[str, Any]:
    """Whole models against DeiT-B, and compacted models against their share of the MACs."""
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    families: dict[str, dict[str, nn.Module]] = {"DeiT-B": {}}
    for name in WHOLE_MODELS:
        if timm.is_model(name):
            families["DeiT-B"][name] = timm.create_model(name)
        else:
            skipped.append(f"{name}: timm knows no such model in this version")
    for name in ("deit_tiny_patch16_224",) if quick else ("deit_tiny_patch16_224", "deit_small_patch16_224"):
        families[name] = {name: timm.create_model(name)}
        for share, slim in pruned_at_random(timm.create_model(name), [0.75, 0.5, 0.25]).items():
            families[name][f"{name}, {share:.0%} of MACs"] = slim
    for family, models in families.items():
        for batch in (1, 8) if quick else (1, 32):
            times = medians(models, batch, (3, 224, 224), 10.0 if quick else 60.0)
            first = next(iter(models))
            whole = ViTConfig.from_model(models[first]).macs()
            for name, model in models.items():
                rows.append(
                    {
                        "against": family,
                        "model": name,
                        "batch": batch,
                        "ms": 1e3 * times[name],
                        "latency_ratio": times[name] / times[first],
                        "macs_ratio": ViTConfig.from_model(model).macs() / whole,
                    }
                )
            progress(f"latency of {family} and others at batch {batch}")
    return conditions() | {"rows": rows, "skipped": skipped}


def print_cpu_latency(timed: dict[str, Any]) -> None:
    print(
        f"\nCPU latency, {timed['threads']} thread(s), load {timed['load']}, medians of alternating runs;"
        " compacted models were pruned at random"
    )
    print(f"{'model':<42}{'batch':>6}{'ms':>10}{'latency':>10}{'MACs':>8}{'speed-up':>10}")
    for row in timed["rows"]:
        print(
            f"{row['model']:<42}{row['batch']:>6}{row['ms']:>10.1f}{row['latency_ratio']:>10.3f}"
            f"{row['macs_ratio']:>8.3f}{1 / row['latency_ratio']:>9.2f}x"
        )
    for reason in timed["skipped"]:
        print(f"skipped  {reason}")


def half_of_the_latency(quick: bool, progress: Callable[[str], None]) -> dict[str, Any]:
    """Models pruned to half of their parent's time by a measured table, and the time they then take.

    One table and one pruned model for each batch size, as a user would make them. Scores come from one
    minibatch of noise through random weights: enough to spread removals over all structures.
    """
    rows: list[dict[str, Any]] = []
    for name in HALVED[:1] if quick else HALVED:
        for batch in (1, 8) if quick else (1, 32):
            torch.manual_seed(0)
            dense = timm.create_model(name)
            table = LatencyTable.measure(dense, "cpu", batch, progress=False)
            masked = copy.deepcopy(dense)
            pruner = NViTPruner(masked, target=HALF, budget="latency", latency=table)
            masked(torch.randn(2, 3, 224, 224)).logsumexp(1).mean().backward()
            pruner.score()
            scores = pruner.unit_scores
            while not pruner.done:
                pruner.prune_once(scores)
            slim = pruner.compact()
            times = medians({"dense": dense, "slim": slim}, batch, (3, 224, 224), 10.0 if quick else 40.0)
            ratio = times["slim"] / times["dense"]
            rows.append(
                {
                    "claim": f"{name} pruned to half its latency, batch {batch}: ratio <= {AT_MOST}",
                    "measured": ratio,
                    "margin": AT_MOST,
                    "held": ratio <= AT_MOST,
                    "model": name,
                    "batch": batch,
                    "table_ms": 1e3 * table.query(ViTConfig.from_model(dense).dims),
                    "dense_ms": 1e3 * times["dense"],
                    "slim_ms": 1e3 * times["slim"],
                    "table_ratio": pruner.fraction,
                    "latency_ratio": ratio,
                    "macs_ratio": pruner.history[-1]["macs"],
                    "dims": pruner.dims.to_dict(),
                }
            )
            progress(f"{name} at batch {batch}: {ratio:.3f} of the latency")
    return conditions() | {"rows": rows}


def print_half(timed: dict[str, Any]) -> None:
    print(
        f"\nPruned to {HALF:.0%} of the parent's latency by a measured table, {timed['threads']} thread(s), "
        f"load {timed['load']}, medians of alternating runs"
    )
    heads = f"{'table ms':>10}{'ms':>9}{'pruned ms':>11}{'table':>8}{'ratio':>8}{'MACs':>8}"
    print(f"{'model':<28}{'batch':>6}{heads}")
    for row in timed["rows"]:
        print(
            f"{row['model']:<28}{row['batch']:>6}{row['table_ms']:>10.1f}{row['dense_ms']:>9.1f}"
            f"{row['slim_ms']:>11.1f}{row['table_ratio']:>8.3f}{row['latency_ratio']:>8.3f}{row['macs_ratio']:>8.3f}"
        )
