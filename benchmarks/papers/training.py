"""Training and testing, the same for all models of a comparison."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.papers.data import Images


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, label_smoothing=0.1)


def train(model: nn.Module, data: Images, epochs: int, lr: float, batch: int, seed: int) -> None:
    """AdamW with a cosine schedule."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, epochs * math.ceil(len(data.train_y) / batch)
    )
    model.train()
    for _ in range(epochs):
        for x, y in data.batches(batch, generator):
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: Images) -> float:
    """Top-1 on the test images, in percent."""
    model.eval()
    right = [model(x).argmax(1) == y for x, y in zip(data.test_x.split(500), data.test_y.split(500))]
    return 100.0 * float(torch.cat(right).double().mean())
