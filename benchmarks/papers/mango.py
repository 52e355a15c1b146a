"""Growth of a small Vision Transformer on digits: every rule beside training from scratch.

    python -m benchmarks.papers.mango [--quick] [--part width|depth|both|weak] [--data digits|fashion-mnist]
                                      [--seeds N] [--json FILE]

width: a trained source of width 24 and three layers to width 48. depth: to six layers. both: to both. weak:
the negative control, a source of width 16 and two layers, trained half as long, to width 48, four layers.
Arms train the target for as many steps; operators are trained for 100 steps before. Savings are the
operations to scratch's final accuracy, without and with the small model's training. Batches are those of one
seed in all arms.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.papers import data
from benchmarks.papers.report import cell, conclude, watching
from benchmarks.papers.training import accuracy
from pyvitfast.grow import LiGOOperator, MangoOperator, grow
from pyvitfast.models.summary import summary
from pyvitfast.train.savings import Costs, saving, update_flops

BATCH, RATE, OPERATOR_STEPS, EVALUATIONS = 64, 2e-3, 100, 60
ARMS = ("scratch", "scratch, equal cost", "stack", "net2net", "fpi", "aki", "ligo", "mango R=1", "mango R=4")


@dataclass(frozen=True)
class Setting:
    """Widths, layers and heads of source and target, and how long both are trained."""

    source: tuple[int, int, int]
    target: tuple[int, int, int]
    source_steps: int = 1200
    steps: int = 600


SETTINGS = {
    "width": Setting((24, 3, 2), (48, 3, 4)),
    "depth": Setting((24, 3, 2), (24, 6, 2)),
    "both": Setting((24, 3, 2), (48, 6, 4)),
    "weak": Setting((16, 2, 2), (48, 4, 6), source_steps=600, steps=1000),
}


@cache
def images(name: str, seed: int) -> data.Images:
    """The split of a seed."""
    load = {"digits": data.digits, "fashion-mnist": data.fashion}[name]
    return load(seed, Path("data"))


def network(shape: tuple[int, int, int], name: str, seed: int) -> VisionTransformer:
    """A ViT of patch 2 (Fashion-MNIST: 4). timm's own first weights are too small for such widths."""
    torch.manual_seed(seed)
    width, depth, heads = shape
    side = images(name, 0).train_x.shape[-1]
    model = VisionTransformer(
        img_size=side,
        patch_size=2 if side == 8 else 4,
        in_chans=1,
        num_classes=10,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    patches = model.patch_embed.proj
    nn.init.xavier_uniform_(patches.weight.flatten(1))  # a view: as the linear layer that it is
    nn.init.zeros_(patches.bias)
    return model


class Batches:
    """Batches of images, each moved by up to one pixel; the same for the same seed."""

    def __init__(self, name: str, seed: int) -> None:
        self.split = images(name, seed)
        self.generator = torch.Generator().manual_seed(seed)

    def __next__(self) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(self.split.train_y), (BATCH,), generator=self.generator)
        x = F.pad(self.split.train_x[index], (1, 1, 1, 1))
        side = x.shape[-1] - 2
        down, right = torch.randint(3, (2, BATCH), generator=self.generator)
        windows = x.unfold(2, side, 1).unfold(3, side, 1)
        return windows[torch.arange(BATCH), :, down, right], self.split.train_y[index]

    def __iter__(self) -> Batches:
        return self


def objective(output: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy with label smoothing."""
    return F.cross_entropy(output, labels, label_smoothing=0.1)


def trained(model: nn.Module, name: str, seed: int, steps: int, every: int) -> list[tuple[float, float]]:
    """Train in place by AdamW and a cosine; (updates, accuracy) of each evaluation."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    batches, curve = Batches(name, seed), []
    for step in range(steps):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = RATE * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        x, y = next(batches)
        objective(model(x), y).backward()
        optimizer.step()
        if (step + 1) % every == 0 or step + 1 == steps:
            curve.append((step + 1.0, accuracy(model, images(name, seed))))
    return curve


def source_of(setting: Setting, name: str, seed: int, share: float) -> VisionTransformer:
    """The small model, trained."""
    model = network(setting.source, name, seed)
    steps = max(2, int(setting.source_steps * share))
    trained(model, name, seed + 100, steps, steps)
    return model


def arm(job: tuple[str, str, str, int, float]) -> dict[str, Any]:
    """One arm on one seed: its curve, accuracy before training, and costs."""
    part, name, method, seed, share = job
    torch.set_num_threads(1)
    setting = SETTINGS[part]
    steps = max(2, int(setting.steps * share))
    every = max(1, steps // EVALUATIONS)
    target = network(setting.target, name, seed)
    update = update_flops(summary(target).macs, BATCH)
    small_steps = max(2, int(setting.source_steps * share))
    costs = Costs(update)
    if method.startswith("scratch"):
        if "equal" in method:
            ratio = summary(network(setting.source, name, seed)).macs / summary(target).macs
            steps += int(ratio * small_steps)
        return {
            "start": accuracy(target, images(name, seed)),
            "curve": trained(target, name, seed, steps, every),
        }
    small = source_of(setting, name, seed, share)
    charged = small_steps * update_flops(summary(small).macs, BATCH)
    operator = 0.0
    if method.startswith(("mango", "ligo")):
        made: Any = (
            LiGOOperator(small, target, style="repo", seed=seed)
            if method == "ligo"
            else MangoOperator(small, target, rank=int(method[-1]), seed=seed)
        )
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            made.weights()
        turns = max(2, int(OPERATOR_STEPS * share))
        made.fit(Batches(name, seed + 200), objective, steps=turns, progress=False)
        operator = turns * (update + 3.0 * counter.get_total_flops())
        big = made.materialize()
    else:
        big = grow(small, target, method=method, seed=seed)
    costs = Costs(update, operator, charged)
    start = accuracy(big, images(name, seed))
    curve = trained(big, name, seed, steps, every)
    return {"start": start, "curve": curve, "costs": costs}


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the width setting: each of four methods at least 1.5 points over scratch, and 25 % saved."""
    found = {row["arm"]: row for row in rows if row["part"] == "width"}
    if not found:
        return []
    base = statistics.mean(found["scratch"]["accuracy"])
    out = []
    for name in ("fpi", "aki", "ligo", "mango R=1"):
        gain = statistics.mean(found[name]["accuracy"]) - base
        out.append({"claim": f"{name} 1.5 points over scratch", "measured": gain, "held": gain >= 1.5})
        saved = [s for s in found[name]["saving"] if s is not None]
        mean = statistics.mean(saved) if len(saved) == len(found[name]["saving"]) else math.nan
        out.append({"claim": f"{name} saves 25 %", "measured": mean, "held": mean >= 25})
    return out


def run(parts: list[str], name: str, seeds: int, share: float, watch: Any) -> list[dict[str, Any]]:
    """All arms of all parts: accuracies before and after training, and savings, by seed."""
    jobs = [(part, name, method, seed, share) for part in parts for method in ARMS for seed in range(seeds)]
    with ProcessPoolExecutor(2) as pool:
        results = dict(zip(jobs, watch(pool.map(arm, jobs), len(jobs)), strict=True))
    rows = []
    for part in parts:
        for method in ARMS:
            mine = [results[part, name, method, seed, share] for seed in range(seeds)]
            row: dict[str, Any] = {"part": part, "data": name, "arm": method}
            row["start"] = [m["start"] for m in mine]
            row["accuracy"] = [m["curve"][-1][1] for m in mine]
            row["saving"], row["saving_incl_small"] = [], []
            for seed, m in enumerate(mine):
                scratch = results[part, name, "scratch", seed, share]["curve"]
                if "costs" in m:
                    found = saving(scratch, [(0.0, m["start"]), *m["curve"]], m["costs"])
                    both = (found.excl_small, found.incl_small)
                    for key, value in zip(("saving", "saving_incl_small"), both, strict=True):
                        row[key].append(None if value is None else 100 * value)
            rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run and print; 0 when every claim held."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers.mango", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps, one seed")
    parser.add_argument(
        "--part", action="append", choices=tuple(SETTINGS), help="may be repeated; default: all"
    )
    parser.add_argument("--data", choices=("digits", "fashion-mnist"), default="digits")
    parser.add_argument("--seeds", type=int, metavar="N", help="default: 3; with --quick 1")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    seeds = (1 if options.quick else 3) if options.seeds is None else options.seeds
    if seeds < 1:
        parser.error("--seeds must be at least 1")
    parts = options.part or list(SETTINGS)
    rows = run(parts, options.data, seeds, 0.1 if options.quick else 1.0, watching("growth"))
    for row in rows:
        saved = ["never" if s is None else f"{s:.0f}" for s in row["saving"]]
        with_small = ["never" if s is None else f"{s:.0f}" for s in row["saving_incl_small"]]
        print(
            f"{row['part']:6} {row['arm']:20} start {cell(row['start'])}  final {cell(row['accuracy'])}  "
            f"saved % {', '.join(saved) or '-'}  with the small model {', '.join(with_small) or '-'}"
        )
    return conclude(rows, claims(rows), options.json)


if __name__ == "__main__":
    sys.exit(main())
