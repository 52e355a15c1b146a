"""The model and the protocol that belong to each data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.papers.data import LOADERS, Images


@dataclass(frozen=True)
class Task:
    """A data set, its micro ViT (depth 4, 4 heads) and how it is trained, pruned and finetuned."""

    name: str
    model: dict[str, Any]
    groups: dict[str, int]
    epochs: int
    held_out: int
    tuning_seeds: int
    tuning_epochs: int
    lr: float = 2e-3
    finetune_lr: float = 5e-4
    batch: int = 50

    def load(self, seed: int, folder: Path) -> Images:
        return LOADERS[self.name](seed, folder)


TASKS = {
    "digits": Task(
        "digits",
        {"img_size": 8, "patch_size": 2, "embed_dim": 48},
        {"embed": 4, "head": 1, "qk": 2, "v": 2, "mlp": 8},
        epochs=30,
        held_out=300,
        tuning_seeds=3,
        tuning_epochs=3,
    ),
    "fashion-mnist": Task(
        "fashion-mnist",
        {"img_size": 28, "patch_size": 4, "embed_dim": 64},
        {"embed": 4, "head": 1, "qk": 4, "v": 4, "mlp": 16},
        epochs=10,
        held_out=1000,
        tuning_seeds=1,
        tuning_epochs=1,
    ),
}
