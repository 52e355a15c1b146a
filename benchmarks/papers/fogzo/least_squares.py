"""E1: quantised least squares with one sharp direction, where the straight-through estimator oscillates."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from pyvitfast.quantize import FOGZO, QuantConfig, prepare

SIZE = 64
RATES = (0.001, 0.002, 0.003, 0.006, 0.01, 0.03, 0.06, 0.1, 0.2, 0.3, 0.6)


@dataclass(frozen=True)
class Arm:
    """A way to train: estimator, share of plain steps first, and as many steps as its compute allows.

    Args:
        name: of the row.
        estimator: of FOGZO.
        steps: optimizer steps.
        omega: energy of the noise.
        start: share of straight-through steps at the beginning.
        rates: learning rates to tune over with ``--quick``.
        directions: measured a step.
    """

    name: str
    estimator: str
    steps: int
    omega: float = 1.0
    start: float = 0.0
    rates: tuple[float, ...] = RATES
    directions: int = 1


ARMS = (
    Arm("STE", "ste", 600, rates=(0.003, 0.006, 0.01, 0.03)),
    Arm("STE, equal compute", "ste", 1000, rates=(0.003, 0.006, 0.01, 0.03)),
    Arm("n-SPSA, equal compute", "spsa", 1500, rates=(0.03, 0.1, 0.3)),
    Arm("FOGZO", "fogzo", 600, rates=(0.06, 0.1, 0.2, 0.3)),
    Arm("FOGZO omega=0.1", "fogzo", 600, omega=0.1, rates=(0.06, 0.1, 0.2, 0.3)),
    Arm("70% STE + 30% FOGZO", "fogzo", 600, start=0.7, rates=(0.03, 0.06, 0.1)),
)
# The negative controls want other rates: with one bit plain steps are best at the largest.
CONTROLS = (
    Arm("STE", "ste", 600, rates=(0.01, 0.06, 0.3, 0.6)),
    Arm("FOGZO", "fogzo", 600, rates=(0.01, 0.06, 0.2, 0.3)),
)


def rounded(x: Tensor) -> Tensor:
    """Two bits on the half-integer grid with scale 1."""
    return (x - 0.5).round().clamp(-2, 1) + 0.5


def problem(index: int, spiked: bool, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Matrix [64, 64], target [64] and starting weights [64]."""
    generator = torch.Generator().manual_seed(index)
    matrix = torch.randn(SIZE, SIZE, generator=generator) / 8
    if spiked:
        matrix = matrix + 2 * torch.randn(SIZE, 1, generator=generator) / 8
    solution = 1.2 * torch.randn(SIZE, generator=generator)
    solution = rounded(solution) if bits == 2 else torch.where(solution >= 0, 1.0, -1.0)
    return matrix, matrix @ solution, 0.7 * torch.randn(SIZE, generator=generator)


def final_loss(arm: Arm, rate: float, index: int, seed: int, decay: bool, spiked: bool, bits: int) -> float:
    """Mean loss over the last tenth of the steps."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)  # steps without a slope are part of this experiment
    matrix, target, start = problem(index, spiked, bits)
    model = nn.Sequential(nn.Linear(SIZE, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(start[None])
    prepare(
        model,
        QuantConfig(
            weight_bits=bits, granularity="tensor", scale="fixed", scale_value=1.0, mask="identity", skip=()
        ),
    )
    inner = torch.optim.Adam(model.parameters(), lr=rate)
    optimizer = FOGZO(
        inner,
        model,
        estimator=arm.estimator,
        omega=arm.omega,
        total_steps=arm.steps,
        start_frac=arm.start,
        n=arm.directions,
        seed=seed,
    )

    def loss() -> Tensor:
        return (model(matrix)[:, 0] - target).square().sum() / 2

    total, counted = 0.0, 0
    for step in range(arm.steps):
        if decay:
            inner.param_groups[0]["lr"] = rate * (1 - step / arm.steps)
        optimizer.step(loss)
        if step >= 0.9 * arm.steps:
            with torch.no_grad():
                total, counted = total + float(loss()), counted + 1
    return total / counted


def _one(job: tuple[Any, ...]) -> float:
    return final_loss(*job)


def run(
    arms: Sequence[Arm],
    problems: int,
    seeds: int,
    decay: bool,
    spiked: bool = True,
    bits: int = 2,
    quick: bool = False,
    workers: int = 2,
    watch: Callable[[Iterable[float], int], Iterable[float]] = lambda values, count: values,
) -> list[dict[str, Any]]:
    """The best learning rate of each arm: mean loss over problems, and its spread over noise seeds.

    All of ``RATES`` are tried on a quarter of the problems, the best three on all of them; with ``quick`` the
    few rates of the arm.
    """

    def tried(arm: Arm, rates: Sequence[float], problems: int, seeds: int) -> dict[float, list[float]]:
        jobs = [
            (arm, rate, index, seed, decay, spiked, bits)
            for rate in rates
            for seed in range(seeds)
            for index in range(problems)
        ]
        with ProcessPoolExecutor(workers) as pool:
            losses = iter(list(watch(pool.map(_one, jobs, chunksize=8), len(jobs))))
        return {rate: [statistics.mean(islice(losses, problems)) for _ in range(seeds)] for rate in rates}

    rows = []
    for arm in arms:
        rates: Sequence[float] = arm.rates
        if not quick:
            coarse = tried(arm, RATES, -(-problems // 4), 1)
            rates = sorted(RATES, key=lambda rate: coarse[rate][0])[:3]
        means = tried(arm, rates, problems, seeds)
        best = min(means, key=lambda rate: statistics.mean(means[rate]))
        rows.append(
            {
                "arm": arm.name,
                "lr": best,
                "loss": statistics.mean(means[best]),
                "spread": statistics.stdev(means[best]) if seeds > 1 else 0.0,
                "schedule": "decay" if decay else "constant",
                "spiked": spiked,
                "bits": bits,
            }
        )
    return rows


def claims(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pass bar on the spiked problem, each arm at its own best rate and schedule, and both controls."""
    best: dict[tuple[bool, int, str], float] = {}
    for row in rows:
        key = row["spiked"], row["bits"], row["arm"]
        best[key] = min(best.get(key, float("inf")), row["loss"])

    def ratio(above: str, below: str, spiked: bool = True, bits: int = 2) -> float:
        return best[spiked, bits, above] / max(best[spiked, bits, below], 1e-9)

    ratios = [
        ("FOGZO at most 0.8 x STE, equal steps", ratio("FOGZO", "STE"), 0.8, 1),
        ("FOGZO at most 0.8 x STE, equal compute", ratio("FOGZO", "STE, equal compute"), 0.8, 1),
        ("70/30 mix at most 0.5 x STE", ratio("70% STE + 30% FOGZO", "STE"), 0.5, 1),
        ("n-SPSA at equal compute at least 1.4 x FOGZO", ratio("n-SPSA, equal compute", "FOGZO"), 1.4, -1),
        ("control: without the sharp direction FOGZO does not win", ratio("FOGZO", "STE", False), 1.0, -1),
        ("control: with one bit FOGZO does not win", ratio("FOGZO", "STE", True, 1), 1.0, -1),
    ]
    return [
        {"claim": text, "measured": value, "held": value * sign <= bar * sign}
        for text, value, bar, sign in ratios
    ]


def sweep(problems: int, watch: Callable[[Iterable[float], int], Iterable[float]]) -> list[dict[str, Any]]:
    """E4: loss by total forward passes for n-SPSA and FOGZO with n directions, at rates fixed in advance."""
    rows = []
    for estimator, n, rate in (
        ("spsa", 1, 0.03),
        ("spsa", 4, 0.06),
        ("spsa", 16, 0.1),
        ("spsa", 64, 0.1),
        ("fogzo", 1, 0.1),
        ("fogzo", 4, 0.1),
    ):
        for forwards in (1500, 3000, 6000, 12_000):
            # A backward pass counts as two forward ones.
            steps = forwards // (2 * n + (3 if estimator == "fogzo" else 0))
            arm = Arm(f"{estimator} n={n}", estimator, max(steps, 10), directions=n)
            jobs = [(arm, rate, index, 0, True, True, 2) for index in range(problems)]
            with ProcessPoolExecutor(2) as pool:
                losses = list(watch(pool.map(_one, jobs), len(jobs)))
            rows.append({"arm": arm.name, "forwards": forwards, "loss": statistics.mean(losses)})
    return rows


def equal_loss(rows: Sequence[dict[str, Any]]) -> float | None:
    """Forward passes of the best n-SPSA over those of FOGZO at the least loss that n-SPSA reached."""
    spsa = min((row for row in rows if row["arm"].startswith("spsa")), key=lambda row: row["loss"])
    ours = [r for r in rows if r["arm"].startswith("fogzo") and r["loss"] <= spsa["loss"]]
    return spsa["forwards"] / min(r["forwards"] for r in ours) if ours else None
