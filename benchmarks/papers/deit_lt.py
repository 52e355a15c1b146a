"""DeiT-LT on long-tailed digits and Fashion-MNIST: both heads on frequent and rare classes, beside peers."""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.data.random_erasing import RandomErasing
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from benchmarks.papers import data
from benchmarks.papers.report import cell, conclude, watching
from pyvitfast import distill
from pyvitfast.distill.evaluate import GROUPS
from pyvitfast.models.cifar_resnet import BasicBlock, CifarResNet

CLASSES, BATCH, PLACES, NOISE, PAD = 10, 64, 4, 0.06, 2
SHAPE: dict[str, Any] = {
    "patch_size": 4,
    "num_classes": CLASSES,
    "embed_dim": 48,
    "depth": 3,
    "num_heads": 3,
}
TEACHER_EPOCHS, STUDENT_EPOCHS = 60, 120
TEACHER_DRW, STUDENT_DRW = 0.8, 0.75
TEACHERS = ("cross-entropy, strong augmentation", "LDAM + SAM", "PaCo + SAM")
RHO = 0.02
# Arms of the students: the loss, and whose labels the DIST head learns.
STUDENTS: dict[str, tuple[str, str | None]] = {
    "ViT": ("labels", None),
    "ViT, balanced softmax": ("balanced softmax", None),
    "ViT, class-weighted BCE": ("weighted bce", None),
    "two tokens, no teacher": ("two tokens", None),
    "DeiT": ("distill", TEACHERS[0]),
    "no DRW": ("distill", TEACHERS[1]),
    "DeiT-LT, LDAM + SAM": ("DeiT-LT", TEACHERS[1]),
    "DeiT-LT, PaCo + SAM": ("DeiT-LT", TEACHERS[2]),
}
OURS, PACO = "DeiT-LT, LDAM + SAM", "DeiT-LT, PaCo + SAM"


@dataclass(frozen=True)
class Source:
    """Where images come from: side of one and of its canvas, images to test on of each class."""

    name: str
    side: int
    canvas: int
    tested: int


SOURCES = {"digits": Source("digits", 8, 12, 50), "fashion-mnist": Source("fashion-mnist", 14, 16, 100)}


@dataclass(frozen=True)
class LongTailed:
    """Coloured images [N, 3, H, W] of a long-tailed training set and a balanced test set, and class sizes."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    counts: list[int]


def grey(source: Source) -> tuple[Tensor, Tensor]:
    """All images [N, H, W] in 0..1 and their classes."""
    if source.name == "digits":
        digits = load_digits()
        return torch.tensor(digits.images).float() / 16, torch.tensor(digits.target)
    files = data.fashion_files(Path("data"))
    x = data.read_idx(files / "train-images-idx3-ubyte.gz")[:6000].float() / 255
    return F.avg_pool2d(x[:, None], 2)[:, 0], data.read_idx(files / "train-labels-idx1-ubyte.gz")[
        :6000
    ].long()


def placed(images: Tensor, source: Source, generator: torch.Generator) -> Tensor:
    """Each image at a random place of a canvas, in two random colours, half of them swapped, with noise."""
    count, room = len(images), source.canvas - source.side
    ink = images.new_zeros(count, source.canvas, source.canvas)
    offsets = torch.randint(room + 1, (count, 2), generator=generator)
    for canvas, image, (down, right) in zip(ink, images, offsets.tolist(), strict=True):
        canvas[down : down + source.side, right : right + source.side] = image
    swapped = torch.rand(count, 1, 1, generator=generator) < 0.5
    ink = torch.where(swapped, 1 - ink, ink)[:, None]
    bright = 0.7 + 0.3 * torch.rand(count, 3, 1, 1, generator=generator)
    dark = 0.3 * torch.rand(count, 3, 1, 1, generator=generator)
    coloured = dark + (bright - dark) * ink
    coloured += NOISE * torch.randn(coloured.shape, generator=generator)
    return (coloured - 0.5) / 0.25


@cache
def long_tailed(name: str, seed: int) -> LongTailed:
    """The split of a seed: the last images of each class for testing, the rest drawn with a long tail."""
    source = SOURCES[name]
    images, labels = grey(source)
    generator = torch.Generator().manual_seed(seed)
    sizes = [int(120 * 0.05 ** (c / (CLASSES - 1))) for c in range(CLASSES)]
    train, test = [], []
    for c, size in enumerate(sizes):
        members = (labels == c).nonzero().flatten()
        test.append(members[-source.tested :].repeat_interleave(200 // source.tested))
        rest = members[: -source.tested]
        chosen = rest[torch.randperm(len(rest), generator=generator)[:size]]
        train.append(chosen.repeat_interleave(PLACES))
    train_index, test_index = torch.cat(train), torch.cat(test)
    return LongTailed(
        placed(images[train_index], source, generator),
        labels[train_index],
        placed(images[test_index], source, generator),
        labels[test_index],
        [PLACES * size for size in sizes],
    )


def cropped(x: Tensor) -> Tensor:
    """A random crop of each image, its border repeated by two pixels."""
    side = x.shape[-1]
    moves = torch.randint(2 * PAD + 1, (len(x), 2)).tolist()
    wide = F.pad(x, [PAD] * 4, mode="replicate")
    return torch.stack([w[:, d : d + side, r : r + side] for w, (d, r) in zip(wide, moves, strict=True)])


def strong(x: Tensor) -> Tensor:
    """Crop, brightness and colour jitter, random erasing."""
    x = cropped(x)
    x = x * (1 + 0.2 * (torch.rand(len(x), 1, 1, 1) - 0.5)) + 0.4 * (torch.rand(len(x), 3, 1, 1) - 0.5)
    erased: Tensor = RandomErasing(0.25, mode="pixel", device="cpu")(x)
    return erased


def seeded(*entropy: int) -> None:
    """Seed everything that draws."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def fit(
    model: nn.Module,
    split: LongTailed,
    epochs: int,
    optimizer: torch.optim.Optimizer,
    prepare: Callable[[Tensor, Tensor, int], Any],
    loss_of: Callable[..., Tensor],
    after: Callable[[], Any] | None = None,
) -> None:
    """Train on shuffled whole batches with a cosine schedule; both passes of SAM see one prepared batch."""
    base = optimizer.base_optimizer if isinstance(optimizer, distill.SAM) else optimizer
    steps = len(split.train_y) // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(base, steps * epochs)
    model.train()
    for epoch in range(epochs):
        for index in torch.randperm(len(split.train_y))[: steps * BATCH].split(BATCH):
            batch = prepare(split.train_x[index], split.train_y[index], epoch)

            def closure(batch: Any = batch) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(*batch)
                loss.backward()
                return loss

            optimizer.step(closure)
            schedule.step()
            if after is not None:
                after()


def mixup() -> distill.PairedMixup:
    """Mixup or CutMix of every batch."""
    return distill.PairedMixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=CLASSES)


class WideningBlock(BasicBlock):
    """The first block of a stage, its shortcut a learned 1x1 convolution."""

    def __init__(self, in_chans: int, chans: int, stride: int) -> None:
        super().__init__(in_chans, chans, stride)
        self.shortcut = nn.Sequential(
            nn.Conv2d(in_chans, chans, 1, stride, bias=False), nn.BatchNorm2d(chans)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C', H / stride, W / stride], sides rounded up."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.shortcut(x) + y)


def network(kind: str) -> CifarResNet:
    """An untrained teacher of 44 k parameters: three stages of one residual block."""
    cnn = CifarResNet(1, CLASSES, cosine=kind == "LDAM + SAM", width=12)
    cnn.layer2[0], cnn.layer3[0] = WideningBlock(12, 24, 2), WideningBlock(24, 48, 2)
    for module in cnn.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return cnn


def teacher(kind: str, split: LongTailed, epochs: int) -> nn.Module:
    """A trained teacher."""
    drw, mix, cnn = round(TEACHER_DRW * epochs), mixup(), network(kind)
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=2e-4)
    if kind == "LDAM + SAM":
        margins = distill.LDAMLoss(split.counts, drw_epoch=drw)

        def weak(x: Tensor, y: Tensor, epoch: int) -> Any:
            margins.set_epoch(epoch)
            return cropped(x), y

        sam = distill.SAM(sgd(cnn.parameters()), RHO)
        fit(cnn, split, epochs, sam, weak, lambda x, y: margins(cnn(x), y))
        return cnn
    if kind == "PaCo + SAM":
        paco = distill.PaCo(cnn, split.counts)
        sam = distill.SAM(sgd([p for p in paco.parameters() if p.requires_grad]), RHO)
        fit(paco, split, epochs, sam, lambda x, y, _: (cropped(x), strong(x), y), paco, paco.advance)
        return paco.teacher()

    def heavy(x: Tensor, y: Tensor, _: int) -> Any:
        mixed, target = mix(strong(x), y)
        return mixed, target.probabilities(CLASSES, 0.1)

    fit(cnn, split, epochs, sgd(cnn.parameters()), heavy, lambda x, t: F.cross_entropy(cnn(x), t))
    return cnn


def student(arm: str, split: LongTailed, epochs: int, cnn: nn.Module | None) -> nn.Module:
    """A trained student."""
    kind, _ = STUDENTS[arm]
    side, mix = split.train_x.shape[-1], mixup()
    vit: Any = (
        VisionTransformerDistilled if kind in ("two tokens", "distill", "DeiT-LT") else VisionTransformer
    )
    model = vit(img_size=side, **SHAPE)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()  # timm's first weights suit wide models
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)

    def mixed(x: Tensor, y: Tensor, _: int) -> Any:
        return mix(strong(x), y)

    if vit is VisionTransformer:
        losses: dict[str, nn.Module] = {
            "labels": distill.BalancedSoftmaxLoss([1] * CLASSES, smoothing=0.1),
            "balanced softmax": distill.BalancedSoftmaxLoss(split.counts, smoothing=0.1),
            "weighted bce": distill.ClassWeightedBCE(split.counts, smoothing=0.1),
        }
        fit(model, split, epochs, optimizer, mixed, lambda x, t: losses[kind](model(x), t))
        return model
    model.set_distilled_training(True)
    if cnn is None:
        both = distill.TwoTokenLoss()
        fit(model, split, epochs, optimizer, mixed, lambda x, t: both(model(x), t))
        return model
    loss = distill.DeiTLTLoss(
        split.counts, drw_epoch=round(STUDENT_DRW * epochs) if kind == "DeiT-LT" else None
    )
    labels = distill.TeacherPipeline(cnn)

    def prepared(x: Tensor, y: Tensor, epoch: int) -> Any:
        loss.set_epoch(epoch)
        return mix(strong(x), y) if loss.mixes else (strong(x), y)

    fit(model, split, epochs, optimizer, prepared, lambda x, t: loss(model(x), t, labels(x)))
    return model


@torch.no_grad()
def tested(model: nn.Module, split: LongTailed) -> dict[str, dict[str, float]]:
    """Accuracy in percent by head and group of classes."""
    model.eval()
    heads = [distill.head_logits(model, x) for x in split.test_x.split(500)]
    groups = distill.class_groups(split.counts)
    return {
        head: distill.group_accuracy(torch.cat([getattr(h, head) for h in heads]), split.test_y, groups)
        for head in (("cls", "dist", "avg") if hasattr(model, "head_dist") else ("cls",))
    }


def teach(job: tuple[str, int, str, float, str]) -> dict[str, Any]:
    """Train a teacher, keep its weights in a file; its accuracy."""
    name, seed, kind, share, folder = job
    torch.set_num_threads(1)
    split = long_tailed(name, seed)
    seeded(seed, TEACHERS.index(kind))
    cnn = teacher(kind, split, max(1, round(share * TEACHER_EPOCHS)))
    torch.save(cnn.state_dict(), f"{folder}/{seed}-{kind}.pt")
    return tested(cnn, split)


def study(job: tuple[str, int, str, float, str]) -> dict[str, Any]:
    """Train a student; its accuracy."""
    name, seed, arm, share, folder = job
    torch.set_num_threads(1)
    split = long_tailed(name, seed)
    kind = STUDENTS[arm][1]
    cnn = None
    if kind is not None:
        cnn = network(kind)
        cnn.load_state_dict(torch.load(f"{folder}/{seed}-{kind}.pt"))
    seeded(seed, 100)
    return tested(student(arm, split, max(1, round(share * STUDENT_EPOCHS)), cnn), split)


def run(name: str, seeds: int, share: float, watch: Any) -> list[dict[str, Any]]:
    """All teachers, then all students, of all seeds: accuracies by arm, head and group."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(2) as pool:
        for work, arms in ((teach, TEACHERS), (study, STUDENTS)):
            jobs = [(name, seed, arm, share, folder) for arm in arms for seed in range(seeds)]
            results = dict(zip(jobs, watch(pool.map(work, jobs), len(jobs)), strict=True))
            for arm in arms:
                found = [results[name, seed, arm, share, folder] for seed in range(seeds)]
                rows += [
                    {
                        "data": name,
                        "role": "teacher" if work is teach else "student",
                        "arm": arm,
                        "output": output,
                        **{group: [f[output][group] for f in found] for group in found[0][output]},
                    }
                    for output in found[0]
                ]
    return rows


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Gates of the LDAM teacher's student, and two of PaCo's, each by its worst seed."""
    found = {(r["arm"], r["output"]): r for r in rows if r["role"] == "student"}
    tail = {key: row["tail"] for key, row in found.items()}
    out = []

    def gate(claim: str, measured: float, held: bool) -> None:
        out.append({"claim": f"{rows[0]['data']}: {claim}", "measured": measured, "held": held})

    for other, head in (("no DRW", "avg"), ("DeiT", "avg"), ("ViT", "cls")):
        worst = min(a - b for a, b in zip(tail[OURS, "avg"], tail[other, head], strict=True))
        gate(f"tail of DeiT-LT's average 10 points over {other}, worst seed", worst, worst >= 10)
    for arm in (OURS, PACO):
        lowest = min(tail[arm, "dist"])
        gate(f"DIST tail of {arm} above 40, worst seed", lowest, lowest > 40)
    gain = min(a - b for a, b in zip(tail[PACO, "avg"], tail["no DRW", "avg"], strict=True))
    gate(f"tail of the average of {PACO} 10 points over no DRW, worst seed", gain, gain >= 10)
    highest = max(tail["no DRW", "dist"])
    gate("DIST tail without DRW below 20, worst seed", highest, highest < 20)
    overall = (found[OURS, "avg"]["overall"], found["no DRW", "avg"]["overall"])
    gain = min(a - b for a, b in zip(*overall, strict=True))
    gate("DRW raises the average's overall accuracy by 8 points, worst seed", gain, gain > 8)
    return out


def main(arguments: list[str] | None = None) -> int:
    """Run and print; 0 when every gate on digits held."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers.deit_lt", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the epochs, one seed, no gates")
    parser.add_argument("--data", action="append", choices=SOURCES, help="may be repeated; default: both")
    parser.add_argument("--seeds", type=int, metavar="N", help="default: 3; with --quick 1")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    seeds = (1 if options.quick else 3) if options.seeds is None else options.seeds
    if seeds < 1:
        parser.error("--seeds must be at least 1")
    rows: list[dict[str, Any]] = []
    checked: list[dict[str, Any]] = []
    for name in options.data or SOURCES:
        found = run(name, seeds, 0.1 if options.quick else 1.0, watching(f"long-tailed {name}"))
        print(f"{name}: top-1 in percent, mean and deviation of {seeds} seed(s)")
        for row in found:
            accuracies = "  ".join(f"{group} {cell(row[group]):12}" for group in ("overall", *GROUPS))
            print(f"{row['role']:8} {row['arm']:36} {row['output']:5} {accuracies}")
        rows += found
        if name == "digits" and not options.quick:
            checked += claims(found)
    return conclude(rows, checked, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
