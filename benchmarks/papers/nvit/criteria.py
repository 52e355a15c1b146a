"""The dense model, and the criteria: all prune in the same loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from benchmarks.papers.data import Images
from benchmarks.papers.nvit.data import Task
from benchmarks.papers.training import loss_of, train
from pyvitfast import ops
from pyvitfast.prune import NViTPruner

SCORED_BATCHES, SCORED_SIZE = 6, 100


def dense_model(task: Task, data: Images, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = VisionTransformer(
        in_chans=1, num_classes=10, depth=4, num_heads=4, weight_init="reset", **task.model
    )
    train(model, data, task.epochs, task.lr, task.batch, seed)
    return model


def backwards(model: nn.Module, data: Images, seed: int, add: bool = False) -> Iterator[None]:
    """Gradients of the minibatches that are scored, one after the other, or with ``add`` their sum."""
    batches = data.batches(SCORED_SIZE, torch.Generator().manual_seed(seed))
    model.zero_grad()
    for _ in range(SCORED_BATCHES):
        if not add:
            model.zero_grad()
        loss_of(model, *next(batches)).backward()
        yield


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
    ln_fix: bool = True

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
    "nvit, no LayerNorm fix": lambda: Criterion(ln_fix=False),
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


SHORT = ("nvit", "taylor sum |w g|", "square of mean", "magnitude, global", "random")


def prune(
    model: nn.Module, task: Task, data: Images, criterion: Criterion, budgets: list[float], seed: int
) -> dict[float, nn.Module]:
    """The compacted model at each budget, largest first; one run passes all of them."""
    pruner = NViTPruner(
        model, target=min(budgets), groups_per_step=3, group_sizes=task.groups, **criterion.settings
    )
    reached: dict[float, nn.Module] = {}
    while not pruner.done:
        pruner.prune_once(criterion.scores(pruner, backwards(model, data, seed), seed))
        for budget in budgets:
            if budget not in reached and pruner.fraction <= budget:
                reached[budget] = pruner.compact(ln_fix=criterion.ln_fix)
    return reached
