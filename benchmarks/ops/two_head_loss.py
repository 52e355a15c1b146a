"""The loss of DeiT-LT: a class head on mixed labels and a distillation head on a teacher's, weighted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Case, Peer, directed
from pyvitfast import ops, reference

ALPHA, SMOOTHING = 0.5, 0.1


def eager(
    cls: Tensor, dist: Tensor, labels: Tensor, teacher: Tensor, weights: Tensor | None, lam: float | None
) -> Tensor:
    """As a user writes it: timm's dense targets and soft cross-entropy, torch's weighted one."""
    if lam is None:
        cls_loss = F.cross_entropy(cls, labels)
    else:
        on, off = 1 - SMOOTHING + SMOOTHING / cls.shape[1], SMOOTHING / cls.shape[1]
        one = torch.full_like(cls, off).scatter_(1, labels[:, None], on)
        other = torch.full_like(cls, off).scatter_(1, labels.flip(0)[:, None], on)
        target = one * lam + other * (1 - lam)
        cls_loss = torch.sum(-target * F.log_softmax(cls, dim=-1), dim=-1).mean()
    return (1 - ALPHA) * cls_loss + ALPHA * F.cross_entropy(dist, teacher.argmax(1), weight=weights)


def case(device: str, batch: int, classes: int, late: bool, direction: str) -> Case:
    """One shape, before the re-weighting or ``late``, after it."""
    torch.manual_seed(0)
    gradient = direction != "forward"
    cls, dist = (torch.randn(batch, classes, device=device, requires_grad=gradient) for _ in range(2))
    labels = torch.randint(classes, (batch,), device=device)
    teacher = torch.randn(batch, classes, device=device)
    weights = torch.rand(classes, device=device) if late else None
    lam = None if late else 0.3
    pair = (None, None) if late else (labels.flip(0), torch.tensor(0.3, device=device))
    upstream = torch.ones((), device=device)
    compiled = torch.compile(eager, dynamic=False)

    def ours(op: Any, heads: list[Tensor], scores: Tensor, given: Tensor | None) -> Tensor:
        smoothing = 0.0 if late else SMOOTHING
        loss: Tensor = op(*heads, labels, scores, given, *pair, alpha=ALPHA, smoothing=smoothing).loss
        return loss

    def expected() -> Any:
        twins = [t.detach().double().requires_grad_(gradient) for t in (cls, dist)]
        wide = None if weights is None else weights.double()
        form = lambda: ours(reference.two_head_loss, twins, teacher.double(), wide)  # noqa: E731
        return directed(form, twins, [upstream.double()], direction)()

    def candidate(form: Callable[[], Tensor]) -> Callable[[], Any]:
        return directed(form, [cls, dist], [upstream], direction)

    logits = batch * classes
    least = {"forward": 3 * logits, "backward": 4 * logits, "both": 7 * logits}[direction]
    return Case(
        op="two_head_loss",
        case=f"{batch} x {classes} {'weighted' if late else 'mixed'}",
        shape=f"[{batch}, {classes}]",
        dtype="float32",
        direction=direction,
        ours=candidate(lambda: ours(ops.two_head_loss, [cls, dist], teacher, weights)),
        peers={
            "eager": Peer(candidate(lambda: eager(cls, dist, labels, teacher, weights, lam))),
            "compile": Peer(candidate(lambda: compiled(cls, dist, labels, teacher, weights, lam))),
        },
        expected=expected,
        least_bytes=4 * least,
        tolerance=1e-5,
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    """CIFAR-10, ImageNet-LT and iNaturalist-2018, before and after the re-weighting."""
    for classes in (10,) if quick else (10, 1000, 8142):
        for late in (False, True):
            for direction in ("forward", "backward", "both"):
                yield case(device, 8 if quick else 128, classes, late, direction)
