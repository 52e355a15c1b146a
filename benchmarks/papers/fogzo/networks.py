"""E2, E3 and their kin: small networks in two bits, each arm at its own best learning rate.

A perceptron, a Vision Transformer and a residual network on digits, and a language model in the manner of
LLaMA on the text of Python's own language reference.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.papers.data import Images, digits
from pyvitfast.quantize import FOGZO, QuantConfig, prepare

# Name: estimator, share of straight-through steps, steps for the compute of a FOGZO arm (by counted passes).
ARMS = {
    "STE": ("ste", 0.0, 1.0),
    "FOGZO": ("fogzo", 0.0, 1.0),
    "70% STE + 30% FOGZO": ("fogzo", 0.7, 1.0),
    "n-SPSA, equal compute": ("spsa", 0.0, 2.5),
}


@dataclass(frozen=True)
class Task:
    """What is trained, for how long, and the rates that are tried."""

    model: Callable[[], nn.Module]
    config: QuantConfig
    steps: int
    batch: int
    rates: tuple[float, ...]
    text: bool = False


class Attention(nn.Module):
    """Causal attention with rotated queries and keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] to the same."""
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        half = q.shape[-1] // 2
        angle = torch.arange(length)[:, None] / 10_000 ** (torch.arange(half) / half)
        cosine, sine = angle.cos(), angle.sin()

        def turned(t: Tensor) -> Tensor:
            a, b = t[..., :half], t[..., half:]
            return torch.cat([a * cosine - b * sine, a * sine + b * cosine], -1)

        mixed = F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return out


class LanguageBlock(nn.Module):
    """Attention and a gated MLP, each behind an RMS norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention, self.first, self.second = (
            Attention(width, heads),
            nn.RMSNorm(width),
            nn.RMSNorm(width),
        )
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] to the same."""
        x = x + self.attention(self.first(x))
        y = self.second(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class LanguageModel(nn.Module):
    """Bytes to logits of the next byte."""

    def __init__(self, width: int = 64, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, width)
        self.blocks = nn.Sequential(*(LanguageBlock(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 128, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T] to [B, 128, T]."""
        return self.head(self.norm(self.blocks(self.embed(x)))).transpose(1, 2)


def perceptron() -> nn.Module:
    """64-10-10 with weights of the size of its levels."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 10))
    for layer in (model[1], model[3]):
        nn.init.normal_(layer.weight, std=0.5)
        nn.init.zeros_(layer.bias)
    return model


def vision_transformer() -> nn.Module:
    """Patch 2, width 32, two blocks of two heads."""
    return VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=32, depth=2, num_heads=2, mlp_ratio=4
    )


def residual_network() -> nn.Module:
    """Four basic blocks of 8 to 32 channels."""
    return ResNet(
        BasicBlock, (1, 1, 1, 1), num_classes=10, in_chans=1, channels=(8, 16, 16, 32), stem_width=8
    )


def fixed(**values: Any) -> QuantConfig:
    """Two bits on the half-integer grid with scales that do not learn, as the paper first does."""
    return QuantConfig(weight_bits=2, granularity="tensor", scale="fixed", **values)


TASKS = {
    "E2 perceptron": Task(perceptron, fixed(scale_value=0.5, skip=()), 1200, 128, (0.005, 0.02, 0.08)),
    "E3 vision transformer": Task(
        vision_transformer, fixed(skip=("patch_embed.*", "head")), 400, 64, (0.003, 0.012, 0.04)
    ),
    "residual network": Task(residual_network, fixed(skip=("conv1", "fc")), 300, 64, (0.003, 0.012, 0.04)),
    "language model": Task(LanguageModel, fixed(skip=("head",)), 400, 16, (0.003, 0.01, 0.03), text=True),
}


@cache
def text() -> Tensor:
    """Python's language reference as bytes below 128."""
    from pydoc_data import topics

    raw = "\n".join(topics.topics[key] for key in sorted(topics.topics))
    return torch.tensor(list(raw.encode("ascii", "ignore")))


@cache
def images(seed: int) -> Images:
    """Digits, split by the seed."""
    return digits(seed, Path("data"))


def batches(task: Task, seed: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """A function that draws a batch to learn from."""
    generator = torch.Generator().manual_seed(seed)
    if task.text:
        data = text()[: -len(text()) // 10]

        def windows() -> tuple[Tensor, Tensor]:
            start = torch.randint(len(data) - 65, (task.batch,), generator=generator)
            both = data[start[:, None] + torch.arange(65)]
            return both[:, :-1], both[:, 1:]

        return windows
    split = images(seed)

    def pictures() -> tuple[Tensor, Tensor]:
        index = torch.randint(len(split.train_y), (task.batch,), generator=generator)
        return split.train_x[index], split.train_y[index]

    return pictures


@torch.no_grad()
def score(model: nn.Module, task: Task, seed: int) -> float:
    """Test accuracy in percent, or the loss on held-out text."""
    model.eval()
    if task.text:
        data = text()[-len(text()) // 10 :][: 65 * 200].view(-1, 65)
        return float(F.cross_entropy(model(data[:, :-1]), data[:, 1:]))
    split = images(seed)
    return 100 * float((model(split.test_x).argmax(1) == split.test_y).double().mean())


def final(name: str, arm: str, rate: float, seed: int, share: float) -> tuple[float, float]:
    """Mean training loss over the last tenth of the steps, and the score; ``share`` shortens the run."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)
    task = TASKS[name]
    estimator, start, factor = ARMS[arm]
    torch.manual_seed(seed)
    model = prepare(task.model(), task.config)
    steps = max(10, int(task.steps * factor * share))
    inner = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    optimizer = FOGZO(inner, model, estimator=estimator, total_steps=steps, start_frac=start, seed=seed)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        inner, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps)
    )
    draw = batches(task, seed)
    last: list[float] = []
    for step in range(steps):
        x, y = draw()
        loss = optimizer.step(lambda x=x, y=y: F.cross_entropy(model(x), y))  # type: ignore[misc]
        schedule.step()
        if step >= 0.9 * steps:
            last.append(float(loss))
    return statistics.mean(last), score(model, task, seed)


def _one(job: tuple[Any, ...]) -> tuple[float, float]:
    return final(*job)


def run(
    names: Sequence[str],
    seeds: int,
    share: float = 1.0,
    workers: int = 2,
    watch: Callable[[Iterable[Any], int], Iterable[Any]] = lambda values, count: values,
) -> list[dict[str, Any]]:
    """For each network and arm the rate with the lowest training loss: means and spreads over the seeds."""
    rows = []
    for name in names:
        for arm in ARMS:
            rates = TASKS[name].rates
            jobs = [(name, arm, rate, seed, share) for rate in rates for seed in range(seeds)]
            with ProcessPoolExecutor(workers) as pool:
                results = list(watch(pool.map(_one, jobs), len(jobs)))
            by_rate = {rate: results[i * seeds : (i + 1) * seeds] for i, rate in enumerate(rates)}
            finite = {r: v for r, v in by_rate.items() if all(math.isfinite(loss) for loss, _ in v)}
            if not finite:
                rows.append({"task": name, "arm": arm, "lr": None, "loss": [], "score": []})
                continue
            best = min(finite, key=lambda rate: statistics.mean(loss for loss, _ in finite[rate]))
            rows.append(
                {
                    "task": name,
                    "arm": arm,
                    "lr": best,
                    "loss": [loss for loss, _ in finite[best]],
                    "score": [value for _, value in finite[best]],
                }
            )
    return rows
