"""The gate: what must hold on digits at 40 % of the MACs."""

from __future__ import annotations

import statistics
from typing import Any

PEERS = ("torch-pruning, global", "torch-pruning, isomorphic")
BUDGET = "0.4"

Results = dict[str, dict[str, dict[str, list[float]]]]


def mean(results: Results, name: str, when: str) -> float | None:
    """Over the seeds that have a result; None without any."""
    values = results.get(name, {}).get(BUDGET, {}).get(when, [])
    return statistics.mean(values) if values else None


def claims(results: Results) -> list[dict[str, Any]]:
    """What NViT must reach and win by, in points, and what it did; what was not measured did not hold."""
    found: list[dict[str, Any]] = []

    def note(text: str, least: float, measured: float | None) -> None:
        held = measured is not None and measured >= least
        found.append({"claim": text, "margin": least, "measured": measured, "held": held})

    for when, least in (("one-shot", 92.5), ("finetuned", 94.5)):
        note(f"{when}: nvit >= {least:g} %", least, mean(results, "nvit", when))
    for when, others, margin in (
        ("one-shot", ("magnitude, global",), 20.0),
        ("one-shot", ("random",), 50.0),
        ("one-shot", ("square of mean",), 5.0),
        ("finetuned", ("magnitude, global",), 2.0),
        ("finetuned", PEERS, 5.0),
    ):
        means = {other: value for other in others if (value := mean(results, other, when)) is not None}
        best = max(means, key=lambda name: means[name], default=others[0])
        ours = mean(results, "nvit", when)
        won = ours - means[best] if ours is not None and means else None
        note(f"{when}: nvit >= {best} + {margin:g} points", margin, won)
    return found
