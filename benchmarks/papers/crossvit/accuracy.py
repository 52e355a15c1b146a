"""CrossViT-micro with each fusion scheme, and a DeiT-micro of equal MACs, trained alike from scratch."""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from benchmarks.papers.data import LOADERS, Images
from benchmarks.papers.report import cell
from benchmarks.papers.training import accuracy, train
from pyvitfast.models import CrossViTConfig, ViTConfig

FUSIONS = ("cross_attention", "none", "class_token", "pairwise", "all_attention")
DEIT = "deit"
HEADS = ("top1", "small", "large")


@dataclass(frozen=True)
class Task:
    """The micro model of a data set, and how all of its arms are trained."""

    crossvit: CrossViTConfig
    epochs: int
    lr: float = 2e-3
    batch: int = 50


_MICRO = CrossViTConfig(
    img_size=(8, 8),
    img_scale=(1.0, 1.0),
    patch_size=(1, 2),
    in_chans=1,
    num_classes=10,
    embed_dim=(32, 64),
    depth=((1, 2, 0),) * 2,
    num_heads=(2, 4),
    mlp_ratio=(2.0, 2.0, 1.0),
)
TASKS = {
    "digits": Task(_MICRO, epochs=15),
    "fashion-mnist": Task(replace(_MICRO, img_size=(28, 28), patch_size=(4, 7)), epochs=8),
}


def deit(config: CrossViTConfig) -> VisionTransformer:
    """A ViT with the large branch's patches and as many blocks, as wide as equal MACs allow.

    Raises:
        ValueError: nothing comes within 3 %.
    """

    def build(shape: tuple[int, float]) -> VisionTransformer:
        return VisionTransformer(
            img_size=config.img_size,
            patch_size=config.patch_size[1],
            in_chans=config.in_chans,
            num_classes=config.num_classes,
            embed_dim=shape[0],
            depth=sum(sum(encoder[:2]) for encoder in config.depth),
            num_heads=config.num_heads[1],
            mlp_ratio=shape[1],
            weight_init="reset",
        )

    def off(shape: tuple[int, float]) -> float:
        return abs(ViTConfig.from_model(build(shape)).macs() / config.macs() - 1)

    best = min(product(range(16, 129, config.num_heads[1]), (4.0, 3.5)), key=off)
    if off(best) > 0.03:
        raise ValueError(f"deit: the nearest width and MLP ratio {best} are {off(best):.1%} off in MACs")
    return build(best)


class Branch(nn.Module):
    """One head of a CrossViT on its own."""

    def __init__(self, model: nn.Module, branch: int) -> None:
        super().__init__()
        self.model, self.branch = model, branch

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model.head[self.branch](self.model.forward_features(x)[self.branch][:, 0])
        return logits


def arms(config: CrossViTConfig) -> dict[str, CrossViTConfig | None]:
    """Configuration by name; the DeiT has none of this kind."""
    return {DEIT: None} | {name: replace(config, fusion=name) for name in FUSIONS}


def train_arm(
    task: Task, config: CrossViTConfig | None, data: Images, epochs: int, seed: int
) -> dict[str, Any]:
    """Accuracies, parameters and MACs of one arm and seed."""
    torch.manual_seed(seed)
    model = deit(task.crossvit) if config is None else config.build()
    train(model, data, epochs, task.lr, task.batch, seed)
    row: dict[str, Any] = {"seed": seed, "top1": accuracy(model, data)}
    if config is None:
        counts: Any = ViTConfig.from_model(model)
        return row | {"params": counts.params(), "macs": counts.macs(), "macs_unfolded": counts.macs()}
    row |= {name: accuracy(Branch(model, i), data) for i, name in enumerate(HEADS[1:])}
    return row | {
        "params": config.params(),
        "macs": config.macs(),
        "macs_unfolded": config.macs(folded=False),
    }


def run(name: str, options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """All arms and seeds on one data set."""
    task = TASKS[name]
    epochs = options.epochs or (2 if options.quick else task.epochs)
    task = replace(task, lr=options.lr or task.lr)
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms(task.crossvit)}
    plan = [
        (seed, arm, config) for seed in range(options.seeds) for arm, config in arms(task.crossvit).items()
    ]
    bar = progress.add_task(name, total=len(plan))
    for seed, arm, config in plan:
        progress.update(bar, description=f"{name}, seed {seed}: {arm}")
        data = LOADERS[name](seed, options.data_dir)
        found[arm].append(train_arm(task, config, data, epochs, seed))
        progress.advance(bar)
    return {"seeds": options.seeds, "epochs": epochs, "lr": task.lr, "batch": task.batch, "arms": found}


def claims(name: str, entry: dict[str, Any]) -> list[dict[str, Any]]:
    """What the paper found, in points and paired by seed. Nothing depends on it: the models are tiny."""
    found = []

    def note(text: str, ours: str, theirs: str, key: str = "top1", sign: int = 1) -> None:
        pairs = zip(entry["arms"][ours], entry["arms"][theirs])
        differences = [sign * (a[key] - b[key]) for a, b in pairs]
        measured = statistics.mean(differences)
        found.append(
            {
                "claim": f"{name}: {text}",
                "margin": 0.0,
                "measured": measured,
                "spread": statistics.stdev(differences) if len(differences) > 1 else None,
                "held": measured > 0,
            }
        )

    note("cross-attention better than a DeiT of equal MACs", "cross_attention", DEIT)
    for other in FUSIONS[1:]:
        note(f"cross-attention better than {other}", "cross_attention", other)
    note("the small head alone gains by cross-attention", "cross_attention", "none", "small")
    note("the large head alone loses by cross-attention", "cross_attention", "none", "large", -1)
    return found


def show(console: Console, name: str, entry: dict[str, Any]) -> None:
    """Means and deviations of all arms."""
    title = f"{name}: top-1 in %, {entry['seeds']} seeds, {entry['epochs']} epochs, mean ± sd"
    table = Table("arm", "mean of heads", "small head", "large head", "params", "MACs", title=title)
    for arm, rows in entry["arms"].items():
        accuracies = [cell([row[key] for row in rows]) if key in rows[0] else "-" for key in HEADS]
        macs = f"{rows[0]['macs']:,}"
        if rows[0]["macs_unfolded"] != rows[0]["macs"]:
            macs += f" (unfolded {rows[0]['macs_unfolded']:,})"
        table.add_row(arm, *accuracies, f"{rows[0]['params']:,}", macs)
    console.print(table)
