"""STViT on digits and Fashion-MNIST: where tokens come from and what they cost, beside token merging."""

from __future__ import annotations

import argparse
import copy
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from benchmarks.measure import alternate
from benchmarks.papers import data, tome
from benchmarks.papers.report import cell, conclude, watching
from pyvitfast.models.stvit import STViT
from pyvitfast.models.summary import summary
from pyvitfast.tokens import to_stvit

BATCH, RATE, NOISE = 50, 2e-3, 0.15
SHAPE: dict[str, Any] = {
    "patch_size": 4,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 48,
    "depth": 6,
    "num_heads": 2,
    "class_token": False,
    "global_pool": "avg",
    "fc_norm": False,
}
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "avg": {"pool": "avg"},
    "max": {"pool": "max"},
    "learned": {"pool": "learned"},
    "avg without G": {"pool": "avg", "global_centers": False},
    "G only": {"pool": "avg"},
    "pooling only": {"pool": "avg"},
    "token merging": {},
}
SWEEP = (2, 4, 8)


@dataclass(frozen=True)
class Setting:
    """A data set on a canvas: side in pixels, greatest offset of the image, semantic tokens, epochs."""

    data: str
    side: int
    offset: int
    tokens: int
    epochs: int


SETTINGS = {
    "far": Setting("digits", 32, 6, 4, 20),
    "near": Setting("digits", 32, 2, 4, 16),
    "fashion": Setting("fashion-mnist", 28, 2, 3, 8),
    "sweep": Setting("digits", 32, 2, 4, 16),
}


@cache
def images(name: str, seed: int) -> data.Images:
    """The split of a seed; digits enlarged to 16 by 16."""
    if name != "digits":
        return data.fashion(seed, Path("data"))
    split = data.digits(seed, Path("data"))

    def large(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="bilinear")

    return data.Images(large(split.train_x), split.train_y, large(split.test_x), split.test_y)


def rendered(x: Tensor, setting: Setting, generator: torch.Generator) -> Tensor:
    """Images on a canvas, each moved by up to ``offset`` pixels, with noise."""
    side, height = setting.side, x.shape[-1]
    slack = (side - height) // 2 + setting.offset
    ground = float(x.min())
    wide = F.pad(x, [slack + setting.offset] * 4, value=ground)
    first = slack + setting.offset - (side - height) // 2
    moves = torch.randint(-setting.offset, setting.offset + 1, (2, len(x)), generator=generator)
    found = torch.stack(
        [
            image[:, first + down : first + down + side, first + right : first + right + side]
            for image, down, right in zip(wide, *moves.tolist(), strict=True)
        ]
    )
    return found + NOISE * torch.randn(found.shape, generator=generator)


class OnlyCentres(nn.Module):
    """G in the place of pooled centres."""

    def __init__(self, centres: Tensor) -> None:
        super().__init__()
        self.centres = nn.Parameter(centres)

    def forward(self, x: Tensor) -> Tensor:
        return self.centres.expand(len(x), -1, -1)


class OnlyPooling(STViT):
    """Pooled tokens go on by themselves; image tokens are not read again."""

    def _reads(self, index: int, tokens: Tensor, image: Tensor) -> Any:
        return tokens, tokens, None, tokens


def network(arm: str, setting: Setting, seed: int, tokens: int | None = None) -> nn.Module:
    """The model of an arm, freshly initialised; arms of a seed share the weights of their blocks."""
    torch.manual_seed(seed)
    plain = VisionTransformer(img_size=setting.side, **SHAPE)
    for module in plain.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    if arm == "plain":
        return plain
    few: Any = to_stvit(
        plain, tokens or setting.tokens, base=2, warm_start=False, seed=seed, **ARMS.get(arm, {})
    )
    if arm == "token merging":
        plain.__class__ = tome.MergingViT
        plain.r = tome.rate_for(plain, summary(few).macs)
        return plain
    if arm == "G only":
        few.stgm.pool = OnlyCentres(few.stgm.G.detach().clone())
    if arm == "pooling only":
        few.__class__ = OnlyPooling
    return few


@torch.no_grad()
def accuracy(model: nn.Module, setting: Setting, seed: int) -> float:
    """Top-1 in percent on two renders of every test image."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    split, right = images(setting.data, seed), []
    model.eval()
    for _ in range(2):
        x = rendered(split.test_x, setting, generator)
        for part, labels in zip(x.split(500), split.test_y.split(500), strict=True):
            right.append(model(part).argmax(1) == labels)
    return 100.0 * float(torch.cat(right).double().mean())


def job(given: tuple[str, str, int, float, int | None]) -> float:
    """Train one arm on one seed; its accuracy."""
    part, arm, seed, share, tokens = given
    torch.set_num_threads(1)
    setting = SETTINGS[part]
    model = network(arm, setting, seed, tokens)
    split, generator = images(setting.data, seed), torch.Generator().manual_seed(seed)
    epochs = max(1, round(setting.epochs * share))
    steps = epochs * -(-len(split.train_y) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for x, y in split.batches(BATCH, generator):
            optimizer.zero_grad()
            F.cross_entropy(model(rendered(x, setting, generator)), y).backward()
            optimizer.step()
            schedule.step()
    return accuracy(model, setting, seed)


def counted(arm: str, setting: Setting, tokens: int | None = None) -> int:
    """Multiply-accumulates of an image."""
    model = network(arm, setting, 0, tokens)
    return tome.macs(model, model.r) if isinstance(model, tome.MergingViT) else summary(model).macs


def run(parts: list[str], seeds: int, share: float, watch: Any) -> list[dict[str, Any]]:
    """All arms of all parts, seed by seed."""
    wanted: list[tuple[str, str, int | None]] = []
    for part in parts:
        if part == "sweep":
            wanted += [(part, "learned", tokens) for tokens in SWEEP]
        else:
            wanted += [(part, arm, None) for arm in ARMS]
    jobs = [(part, arm, seed, share, tokens) for part, arm, tokens in wanted for seed in range(seeds)]
    with ProcessPoolExecutor(2) as pool:
        results = dict(zip(jobs, watch(pool.map(job, jobs), len(jobs)), strict=True))
    return [
        {
            "part": part,
            "arm": arm if tokens is None else f"{arm}, {tokens**2} tokens",
            "macs": counted(arm, SETTINGS[part], tokens),
            "accuracy": [results[part, arm, seed, share, tokens] for seed in range(seeds)],
        }
        for part, arm, tokens in wanted
    ]


@torch.inference_mode()
def speeds(quick: bool, compiles: bool) -> list[dict[str, Any]]:
    """Seconds of a forward pass of DeiT-S, with 16 semantic tokens and with token merging of equal MACs."""
    torch.manual_seed(0)
    name = "deit_tiny_patch16_224" if quick else "deit_small_patch16_224"
    plain = timm.create_model(name).eval()
    few: Any = to_stvit(plain, 4, pool="avg")
    merging = timm.create_model(name).eval()
    merging.__class__ = tome.MergingViT
    merging.r = tome.rate_for(merging, summary(few).macs)
    rows = []
    for batch in (1, 32):
        x = torch.randn(batch, 3, 224, 224)
        runs = {"plain": plain, "semantic tokens": few, "token merging": merging}
        if compiles:
            for arm in ("plain", "semantic tokens"):
                runs[f"{arm}, compiled"] = torch.compile(copy.deepcopy(runs[arm]), dynamic=False)
        found = alternate(
            {arm: partial(model, x) for arm, model in runs.items()},
            lambda: None,
            "cpu",
            2.0 if quick else 20.0,
        )
        rows += [
            {
                "part": "speed",
                "arm": arm,
                "batch": batch,
                "threads": torch.get_num_threads(),
                "ms": 1e3 * seconds,
                "ratio": found["plain"] / seconds,
            }
            for arm, seconds in found.items()
        ]
    return rows


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the digest calls safe: learned beats plain and average, G alone is worst; and token merging."""
    out = [
        {
            "claim": f"semantic tokens at least twice as fast, batch {row['batch']}",
            "measured": row["ratio"],
            "held": row["ratio"] >= 2,
        }
        for row in rows
        if row["part"] == "speed" and row["arm"] == "semantic tokens"
    ]
    for part in ("far", "near", "fashion"):
        found = {row["arm"]: row["accuracy"] for row in rows if row["part"] == part}
        for worse in ("plain", "avg", "token merging"):
            if found:
                gaps = [a - b for a, b in zip(found["learned"], found[worse], strict=True)]
                gap = statistics.mean(gaps)
                out.append(
                    {
                        "claim": f"{part}: learned at least as good as {worse}",
                        "measured": gap,
                        "held": gap >= 0,
                    }
                )
        if found:
            best = min(statistics.mean(v) for k, v in found.items() if k != "G only")
            gap = best - statistics.mean(found["G only"])
            out.append({"claim": f"{part}: G alone is worst", "measured": gap, "held": gap >= 0})
    return out


def main(arguments: list[str] | None = None) -> int:
    """Run and print; 0 when every claim held."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers.stvit", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the epochs, one seed")
    parser.add_argument(
        "--part", action="append", choices=(*SETTINGS, "speed"), help="may be repeated; default: all"
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="default: 5; with --quick 1")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    seeds = (1 if options.quick else 5) if options.seeds is None else options.seeds
    if seeds < 1:
        parser.error("--seeds must be at least 1")
    watch = watching("semantic tokens")
    parts = options.part or [*SETTINGS, "speed"]
    rows = run([part for part in parts if part in SETTINGS], seeds, 0.1 if options.quick else 1.0, watch)
    timed = speeds(options.quick, not options.quick) if "speed" in parts else []
    for row in timed:
        print(
            f"speed, {row['threads']} threads  batch {row['batch']:2}  {row['arm']:26} {row['ms']:8.2f} ms  "
            f"{row['ratio']:.2f}x"
        )
    for row in rows:
        print(
            f"{row['part']:8} {row['arm']:20} {row['macs'] / 1e6:6.2f} M MACs  top-1 {cell(row['accuracy'])}"
        )
    rows += timed
    return conclude(rows, claims(rows), options.json)


if __name__ == "__main__":
    raise SystemExit(main())
