"""NViT pruning against other criteria, on scikit-learn's digits, in minutes on two CPU cores.

    python -m benchmarks.papers.nvit [--quick] [--seeds N] [--json FILE]

One dense micro ViT is trained for each seed. Every criterion prunes a copy of it in the same loop: score 6
minibatches of 100 images, the same ones each time, remove the 3 lowest groups, repeat until the MAC budget is
reached, with no training in between. Reported is the top-1 accuracy of the compacted
model, at once and after 3 epochs of finetuning.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pyvitfast import ops
from pyvitfast.prune import NViTPruner

GROUPS = {"embed": 4, "head": 1, "qk": 2, "v": 2, "mlp": 8}
SCORED_BATCHES, SCORED_SIZE = 6, 100


@dataclass(frozen=True)
class Digits:
    """1300 images to train on and 497 to test on, [N, 1, 8, 8] with mean 0 and deviation 1."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def load(cls, seed: int) -> Digits:
        """A random split."""
        data = load_digits()
        x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)
        x = (x - x.mean()) / x.std()
        y = torch.tensor(data.target)
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
        train, test = order[:1300], order[1300:]
        return cls(x[train], y[train], x[test], y[test])

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in random order."""
        for index in torch.randperm(len(self.train_y), generator=generator).split(size):
            yield self.train_x[index], self.train_y[index]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, label_smoothing=0.1)


def train(model: nn.Module, data: Digits, epochs: int, lr: float, seed: int) -> None:
    """AdamW with a cosine schedule, batches of 50."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * 26)
    model.train()
    for _ in range(epochs):
        for x, y in data.batches(50, generator):
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    """Top-1 on the test images, in percent."""
    return 100.0 * float((model.eval()(data.test_x).argmax(1) == data.test_y).double().mean())


def dense_model(data: Digits, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        embed_dim=48,
        depth=4,
        num_heads=4,
        weight_init="reset",
    )
    train(model, data, 30, 2e-3, seed)
    return model


def unit_sums(pruner: NViTPruner, values: Callable[[nn.Parameter], Tensor], absolute: bool = False) -> Tensor:
    """For each unit the sum of weight times ``values`` over its members, [U]."""
    scored = pruner.table.scored("subset")
    weights = [piece.of(pruner.model.get_parameter(piece.parameter).detach()) for piece, _ in scored]
    others = [piece.of(values(pruner.model.get_parameter(piece.parameter))) for piece, _ in scored]
    workspace = ops.implementation("saliency_rowcol", "cpu")(weights, others, abs=absolute)
    shapes = [(w.shape[0], w[0].numel() if w.ndim > 1 else 1) for w in weights]
    indptr, indices = pruner.table.csr(scored, shapes)
    owner = torch.repeat_interleave(torch.arange(pruner.table.count), indptr.diff())
    return torch.zeros(pruner.table.count).index_add_(0, owner, workspace[indices])


def gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


@dataclass
class Criterion:
    """NViT itself, with settings of its own."""

    settings: dict[str, Any] = field(default_factory=dict)

    def scores(self, pruner: NViTPruner, backward: Iterator[None], seed: int) -> Tensor | None:
        """Scores for the next removal; None leaves them to the pruner."""
        for _ in backward:
            pruner.score()
        return None


@dataclass
class Averaged(Criterion):
    """A power of the mean over minibatches of each unit's sum, then a running average over removals."""

    absolute: bool = False
    power: int = 1
    momentum: float = 0.9
    average: Tensor | None = None

    def scores(self, pruner: NViTPruner, backward: Iterator[None], seed: int) -> Tensor:
        sums = [unit_sums(pruner, gradient, self.absolute) for _ in backward]
        now = torch.stack(sums).mean(0) ** self.power
        if self.average is not None:
            now = self.momentum * self.average + (1 - self.momentum) * now
        self.average = now
        return now


@dataclass
class Magnitude(Criterion):
    """Sum of squared weights, as it is or divided by the mean over the structure."""

    per_layer: bool = False

    def scores(self, pruner: NViTPruner, backward: Iterator[None], seed: int) -> Tensor:
        squares = unit_sums(pruner, lambda parameter: parameter.detach())
        if self.per_layer:
            masks = pruner.masks
            for s in pruner.structures:
                part = squares[s.start : s.stop]
                part /= part[masks[s.name]].mean()
        return squares


@dataclass
class Random(Criterion):
    """Uniform numbers, drawn anew for each removal."""

    def scores(self, pruner: NViTPruner, backward: Iterator[None], seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + len(pruner.history))
        return torch.rand(pruner.table.count, generator=generator)


REPO_DIVISORS = {"embed": 12.0, "head": 12.0, "qk": 2.0, "v": 2.0}
CRITERIA: dict[str, Callable[[], Criterion]] = {
    "nvit": Criterion,
    "nvit, full membership": lambda: Criterion({"membership": "full"}),
    "nvit, repo divisors": lambda: Criterion({"divisors": REPO_DIVISORS}),
    "taylor sum |w g|": lambda: Averaged(absolute=True),
    # A running average of squares is itself a mean of squares and hides the wrong order, so both are shown.
    "nvit, not averaged": lambda: Criterion({"momentum": 0.0}),
    "square of mean": lambda: Averaged(power=2, momentum=0.0),
    "square of mean, averaged": lambda: Averaged(power=2),
    "magnitude, global": Magnitude,
    "magnitude, per layer": lambda: Magnitude(per_layer=True),
    "random": Random,
}
QUICK = (
    "nvit",
    "nvit, not averaged",
    "square of mean",
    "square of mean, averaged",
    "magnitude, global",
    "random",
)


def prune(
    model: nn.Module, data: Digits, criterion: Criterion, budgets: list[float], seed: int
) -> dict[float, nn.Module]:
    """The compacted model at each budget, largest first; one run passes all of them."""
    pruner = NViTPruner(
        model, target=min(budgets), groups_per_step=3, group_sizes=GROUPS, **criterion.settings
    )

    def backward() -> Iterator[None]:
        batches = data.batches(SCORED_SIZE, torch.Generator().manual_seed(seed))
        for _ in range(SCORED_BATCHES):
            model.zero_grad()
            loss_of(model, *next(batches)).backward()
            yield

    reached: dict[float, nn.Module] = {}
    while not pruner.done:
        pruner.prune_once(criterion.scores(pruner, backward(), seed))
        for budget in budgets:
            if budget not in reached and pruner.fraction <= budget:
                reached[budget] = pruner.compact()
    return reached


def report(results: dict[str, dict[str, dict[str, list[float]]]], name: str, budget: str, when: str) -> str:
    values = results[name][budget][when]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):5.1f} ± {spread:4.1f}"


def claims(results: dict[str, dict[str, dict[str, list[float]]]]) -> list[dict[str, Any]]:
    """The gate at 40 % of the MACs: what NViT must win by, and what it won by, in points."""

    def mean(name: str, when: str) -> float:
        return statistics.mean(results[name]["0.4"][when])

    found = []
    for when, other, margin in (
        ("one-shot", "magnitude, global", 20.0),
        ("one-shot", "random", 50.0),
        ("one-shot", "square of mean", 5.0),
        ("finetuned", "magnitude, global", 2.0),
    ):
        won = mean("nvit", when) - mean(other, when)
        text = f"{when}: nvit >= {other} + {margin:g}"
        found.append({"claim": text, "margin": margin, "measured": won, "held": won >= margin})
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="40 %% of the MACs and the gate's criteria only")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    names = list(QUICK) if options.quick else list(CRITERIA)
    budgets = [0.4] if options.quick else [0.6, 0.4]
    start = time.perf_counter()

    def progress(text: str) -> None:
        print(f"[{time.perf_counter() - start:6.1f} s] {text}", file=sys.stderr, flush=True)

    results: dict[str, dict[str, dict[str, list[float]]]] = {
        name: {str(b): {"one-shot": [], "finetuned": []} for b in budgets} for name in names
    }
    dense_accuracy = []
    for seed in range(options.seeds):
        data = Digits.load(seed)
        dense = dense_model(data, seed)
        dense_accuracy.append(accuracy(dense, data))
        progress(f"seed {seed}: dense {dense_accuracy[-1]:.1f} %")
        for name in names:
            for budget, slim in prune(copy.deepcopy(dense), data, CRITERIA[name](), budgets, seed).items():
                entry = results[name][str(budget)]
                entry["one-shot"].append(accuracy(slim, data))
                train(slim, data, 3, 5e-4, seed)
                entry["finetuned"].append(accuracy(slim, data))
                before, after = entry["one-shot"][-1], entry["finetuned"][-1]
                progress(f"seed {seed}: {name} at {budget:.0%} MACs: {before:.1f} -> {after:.1f} %")

    print(f"dense: {statistics.mean(dense_accuracy):.1f} % top-1, {options.seeds} seeds, mean ± sd")
    print(f"{'criterion':<26}" + "".join(f"{f'{b:.0%} one-shot':>18}{'3 epochs':>16}" for b in budgets))
    for name in names:
        cells = (report(results, name, str(b), w) for b in budgets for w in ("one-shot", "finetuned"))
        print(f"{name:<26}" + "".join(f"{cell:>17}" for cell in cells))
    checked = claims(results)
    for claim in checked:
        verdict = "held    " if claim["held"] else "NOT HELD"
        print(f"{verdict}  {claim['claim']} points (measured {claim['measured']:+.1f})")
    if options.json:
        options.json.write_text(
            json.dumps(
                {
                    "paper": "nvit",
                    "quick": options.quick,
                    "seeds": options.seeds,
                    "torch": torch.__version__,
                    "threads": torch.get_num_threads(),
                    "seconds": time.perf_counter() - start,
                    "dense": dense_accuracy,
                    "results": results,
                    "claims": checked,
                },
                indent=2,
            )
        )
    return 0 if all(claim["held"] for claim in checked) else 1


if __name__ == "__main__":
    sys.exit(main())
