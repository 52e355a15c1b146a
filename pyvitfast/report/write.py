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
from torch import nn

from pyvitfast.report import plots
from pyvitfast.report.measure import BATCHES, Facts, Row, measure, table
from pyvitfast.report.page import page

_SAVED = "Training operations saved"


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
    _print(rows, old is not None, title, note, console)
    saved = savings(events)
    if saved:
        _print_rows(_SAVED, saved, console)
    images = _figures(folder, old, new, events)
    start: dict[str, Any] = next((e for e in events if e["event"] == "start"), {})
    text = page(
        title,
        rows,
        old is not None,
        note,
        images,
        settings,
        start.get("versions", {}),
        start.get("command", []),
        {_SAVED: saved} if saved else {},
    )
    path = folder / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


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
    if any(e["event"] == "epoch" for e in events):
        name = "report-training.png" if old is not None else "report.png"
        images["Training"] = folder / name
        plots.training(images["Training"], events)
    return images


def _print(rows: Sequence[Row], compares: bool, title: str, note: str, console: Console) -> None:
    shown = Table(
        title=title, box=box.SIMPLE_HEAD, caption=note, title_justify="left", caption_justify="left"
    )
    shown.add_column("")
    for head in ("before", "after", "change") if compares else ("model",):
        shown.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(row.label, *((row.before, row.after, row.ratio) if compares else (row.after,)))
    console.print(shown)


def _print_rows(title: str, rows: Sequence[Sequence[str]], console: Console) -> None:
    shown = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for place, head in enumerate(rows[0]):
        shown.add_column(head, justify="right" if place else "left")
    for row in rows[1:]:
        shown.add_row(*row)
    console.print(shown)
