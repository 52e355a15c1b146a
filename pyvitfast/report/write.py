"""From a finished run to its report: table on the terminal, figures and page in the folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from pyvitfast.report import plots
from pyvitfast.report.measure import BATCHES, Facts, Row, measure, table
from pyvitfast.report.page import page

_SAVED = "Training operations saved"
_HEADS = "Accuracy of each head"


@dataclass(frozen=True)
class Subject:
    """A model to report on, with its file and its test accuracy in percent."""

    model: nn.Module
    file: Path
    top1: float
    class_mean: float


def write_report(
    folder: Path,
    title: str,
    after: Subject,
    before: Subject | None,
    events: Sequence[dict[str, Any]],
    settings: Mapping[str, Any],
    device: str,
    console: Console,
    batches: Sequence[int] = BATCHES,
    samples: Tensor | None = None,
) -> Path:
    """Measure, print the table, write ``report.html`` and the PNG files.

    Args:
        folder: the run's output folder.
        title: heading of the page and the table.
        after: the final model.
        before: the model it was made from, or None.
        events: the run's metrics.
        settings: the run's settings.
        device: where latency is measured.
        console: where the table is printed.
        batches: batch sizes whose latency is measured.
        samples: test images [B, C, H, W] over which semantic tokens are drawn.

    Returns:
        Path of the page.
    """
    subjects = [s for s in (before, after) if s is not None]
    facts = measure(
        [s.model for s in subjects],
        [s.file for s in subjects],
        [(s.top1, s.class_mean) for s in subjects],
        device,
        batches,
    )
    old: Facts | None = facts[0] if before is not None else None
    new = facts[-1]
    rows = table(old, new)
    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    note = f"Latency: median of alternating forward passes on {device}, {threads}."
    lines = _lines(rows, old is not None)
    _print(title, lines, console, note)
    saved = savings(events)
    if saved:
        _print(_SAVED, saved, console, wraps=True)
    heads = accuracy_of_heads(events)
    if heads:
        _print(_HEADS, heads, console)
    images = _figures(folder, old, new, events)
    if samples is not None and _reads_patches(after.model):
        images["What the semantic tokens attend to"] = folder / "report-tokens.png"
        plots.semantic_tokens(images["What the semantic tokens attend to"], after.model, samples)
    start: dict[str, Any] = next((e for e in events if e["event"] == "start"), {})
    text = page(
        title,
        lines,
        note,
        images,
        settings,
        start.get("versions", {}),
        start.get("command", []),
        {name: rows for name, rows in ((_SAVED, saved), (_HEADS, heads)) if rows},
    )
    path = folder / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


def _reads_patches(model: nn.Module) -> bool:
    """Whether the model has semantic tokens whose last layer reads the image."""
    config: Any = getattr(getattr(model, "stgm", None), "config", None)
    return config is not None and (config.layers == 1 or config.concat_keys)


def savings(events: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """What growth saved as rows of text, the first one the head; empty without a run from scratch."""
    found = next((e for e in events if e["event"] == "saving"), None)
    if found is None:
        return []

    def percent(share: float | None, otherwise: str) -> str:
        return otherwise if share is None else f"{100 * share:.1f} %"

    never = found["excl_small"] is None
    return [
        ["", f"operations to {found['goal']:.2f} %", "saved", "saved, source's training charged"],
        ["scratch", f"{found['scratch']:.3g}", "", ""],
        [
            found["arm"],
            "never reached" if never else f"{found['spent']:.3g}",
            percent(found["excl_small"], "nothing"),
            percent(found["incl_small"], "nothing" if never else "not known"),
        ],
    ]


def accuracy_of_heads(events: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Accuracy by head and group of classes as rows of text, the first one the head; empty without any."""
    found = next((e for e in reversed(events) if e["event"] == "heads"), None)
    if found is None:
        return []
    names = list(found["accuracy"]["avg"])
    return [
        ["", *names],
        *(
            [head.upper(), *(f"{accuracy[name]:.2f} %" for name in names)]
            for head, accuracy in found["accuracy"].items()
        ),
    ]


def _figures(
    folder: Path, old: Facts | None, new: Facts, events: Sequence[dict[str, Any]]
) -> dict[str, Path]:
    images: dict[str, Path] = {}
    if old is not None:
        heading = "What is left" if new.summary.params <= old.summary.params else "Sizes beside the source"
        images[heading] = folder / "report.png"
        plots.remaining(images[heading], old, new)
        if old.summary.blocks and new.summary.blocks:
            images["Widths of the blocks"] = folder / "report-widths.png"
            plots.widths(images["Widths of the blocks"], old.summary, new.summary)
    if any(e["event"] == "compact" for e in events):
        images["Accuracy along the pruning path"] = folder / "report-path.png"
        plots.path_of_pruning(images["Accuracy along the pruning path"], events)
    if any(e["event"] == "saving" for e in events):
        heading = "Accuracy and loss by training operations"
        images[heading] = folder / "report-growth.png"
        plots.growth(images[heading], events)
    if heads := [e for e in events if e["event"] == "heads"]:
        images["Rare classes and tokens"] = folder / "report-heads.png"
        plots.heads(images["Rare classes and tokens"], heads[-1])
    if any(e["event"] == "epoch" for e in events):
        name = "report-training.png" if old is not None else "report.png"
        images["Training"] = folder / name
        plots.training(images["Training"], events)
    return images


def _lines(rows: Sequence[Row], compares: bool) -> list[list[str]]:
    """The main table as text, the first line the head."""
    if not compares:
        return [["", "model"], *([row.label, row.after] for row in rows)]
    head = ["", "before", "after", "change"]
    return [head, *([row.label, row.before, row.after, row.ratio] for row in rows)]


def _print(
    title: str, lines: Sequence[Sequence[str]], console: Console, note: str | None = None, wraps: bool = False
) -> None:
    shown = Table(
        title=title, box=box.SIMPLE_HEAD, caption=note, title_justify="left", caption_justify="left"
    )
    for place, head in enumerate(lines[0]):
        shown.add_column(head, justify="right" if place else "left", no_wrap=bool(place) and not wraps)
    for line in lines[1:]:
        shown.add_row(*line)
    console.print(shown)
