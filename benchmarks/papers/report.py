"""What the reports of all papers share."""

from __future__ import annotations

import os
import statistics
from typing import Any

import torch


def conditions() -> dict[str, Any]:
    """What a reader of timings must know."""
    return {
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
    }


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
