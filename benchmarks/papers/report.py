"""What the reports of all papers share."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track


def conditions() -> dict[str, Any]:
    """What a reader of timings must know."""
    return {
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
    }


def watching(what: str) -> Callable[[Iterable[Any], int], Iterable[Any]]:
    """A progress bar named ``what`` over so many values; it leaves nothing behind."""
    console = Console(stderr=True)
    return lambda values, count: track(values, what, total=count, console=console, transient=True)


def conclude(rows: list[dict[str, Any]], checked: list[dict[str, Any]], path: Path | None) -> int:
    """Print the claims and write rows, claims and conditions to ``path``; 0 when every claim held."""
    print_claims(checked)
    if path is not None:
        path.write_text(json.dumps({"conditions": conditions(), "rows": rows, "claims": checked}, indent=2))
    return 0 if all(claim["held"] for claim in checked) else 1


def cell(values: list[float]) -> str:
    """Mean and deviation over seeds."""
    if not values:
        return "failed"
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} ± {spread:.1f}"


def print_claims(checked: list[dict[str, Any]]) -> None:
    for claim in checked:
        verdict = "held    " if claim["held"] else "NOT HELD"
        value = claim["measured"]
        spread = f" ± {claim['spread']:.2g}" if claim.get("spread") is not None else ""
        measured = "nothing" if value is None else f"{value:.3g}{spread}"
        print(f"{verdict}  {claim['claim']} (measured {measured})")
