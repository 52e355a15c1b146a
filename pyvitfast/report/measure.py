"""Facts about one or two models, measured side by side."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pyvitfast.models.clock import seconds_of
from pyvitfast.models.summary import ModelSummary, summary

BATCHES = (1, 32)


@dataclass(frozen=True)
class Facts:
    """What the report says of a model.

    Args:
        summary: parameters, MACs of one image, widths of the blocks.
        latency: median milliseconds of a forward pass by batch size.
        size: bytes of the model file.
        top1: test accuracy in percent.
        class_mean: mean over classes of the test accuracy, in percent.
        nonzero: parameters that are not zero; None where they were not counted.
    """

    summary: ModelSummary
    latency: dict[int, float]
    size: int
    top1: float
    class_mean: float
    nonzero: int | None = None

    @property
    def sparse(self) -> bool:
        """Whether more is zero than the odd bias or token."""
        return self.nonzero is not None and self.nonzero < 0.99 * self.summary.params


@dataclass(frozen=True)
class Row:
    """A line of the before/after table; ``ratio`` is empty where it would mean nothing."""

    label: str
    before: str
    after: str
    ratio: str


@torch.inference_mode()
def latencies(
    models: list[nn.Module], device: str, batches: Sequence[int] = BATCHES, seconds: float = 1.0
) -> list[dict[int, float]]:
    """Median forward time in milliseconds, by model and batch size.

    The models take turns within each repeat, so a busy machine slows all of them alike.

    Args:
        models: in eval mode.
        device: where to time them; they are moved there and back.
        batches: batch sizes to time.
        seconds: time to spend on each batch size.
    """
    results: list[dict[int, float]] = [{} for _ in models]
    homes = [next(model.parameters()).device for model in models]
    for model in models:
        model.to(device)
    try:
        for batch in batches:
            inputs = [torch.zeros(batch, *summary(model).input_size, device=device) for model in models]
            for _ in range(2):  # the first passes fill caches and choose kernels
                rough = sum(_once(model, x) for model, x in zip(models, inputs))
            repeats = min(200, max(5, int(seconds / rough)))
            times = [[_once(model, x) for model, x in zip(models, inputs)] for _ in range(repeats)]
            for result, column in zip(results, zip(*times)):
                result[batch] = 1e3 * statistics.median(column)
    finally:
        for model, home in zip(models, homes):
            model.to(home)
    return results


def _once(model: nn.Module, images: torch.Tensor) -> float:
    return seconds_of(lambda: model(images), images.device)


def measure(
    models: list[nn.Module],
    files: list[Path],
    accuracies: list[tuple[float, float]],
    device: str,
    batches: Sequence[int] = BATCHES,
) -> list[Facts]:
    """Facts of ``models``, stored in ``files``, with top-1 and class-mean ``accuracies``."""
    timed = latencies(models, device, batches)
    return [
        Facts(
            summary(model),
            latency,
            file.stat().st_size,
            *accuracy,
            sum(int(p.count_nonzero()) for p in model.parameters()),
        )
        for model, latency, file, accuracy in zip(models, timed, files, accuracies)
    ]


def table(before: Facts | None, after: Facts) -> list[Row]:
    """The lines of the report's table; without ``before`` that column and the ratios are empty."""

    def smaller(label: str, old: float | None, new: float, text: str, unit: str) -> Row:
        def show(value: float) -> str:
            return f"{value:{text}} {unit}".strip()

        if old is None:
            return Row(label, "", show(new), "")
        change = f"{old / new:.2f}x less" if old > new else f"{new / old:.2f}x more"
        if old == new:
            change = "unchanged"
        return Row(label, show(old), show(new), change)

    def points(label: str, old: float | None, new: float) -> Row:
        if old is None:
            return Row(label, "", f"{new:.2f} %", "")
        return Row(label, f"{old:.2f} %", f"{new:.2f} %", f"{new - old:+.2f} points")

    rows = [
        smaller("Parameters", before.summary.params if before else None, after.summary.params, ",", ""),
        smaller("MACs per image", before.summary.macs if before else None, after.summary.macs, ",", ""),
    ]
    if after.sparse:
        old_count = before.nonzero if before else None
        rows.insert(1, smaller("Parameters not 0", old_count, after.nonzero or 0, ",", ""))
    for batch in after.latency:
        label = f"Latency, batch {batch}"
        rows.append(
            smaller(label, before.latency[batch] if before else None, after.latency[batch], ".3f", "ms")
        )
    rows += [
        smaller("Size on disk", before.size / 1024 if before else None, after.size / 1024, ",.1f", "KiB"),
        points("Top-1 accuracy", before.top1 if before else None, after.top1),
        points("Mean accuracy over classes", before.class_mean if before else None, after.class_mean),
    ]
    return rows
