"""Accuracy of each head, and of frequent, middle and rare classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pyvitfast.distill.weights import Counts, checked_counts
from pyvitfast.models.modules import both_logits, unwrap

GROUPS = ("head", "mid", "tail")
# Classes of each group, by number of classes: CIFAR-10, CIFAR-100, ImageNet-LT, iNaturalist-2018.
_PUBLISHED = {10: (3, 4, 3), 100: (36, 35, 29), 1000: (390, 445, 165), 8142: (842, 3701, 3599)}


class HeadLogits(NamedTuple):
    """Logits of each head and their mean, [B, C] each.

    Args:
        cls: of the class token.
        dist: of the distillation token.
        avg: their mean, what the model predicts by.
    """

    cls: Tensor
    dist: Tensor
    avg: Tensor


def head_logits(model: nn.Module, images: Tensor) -> HeadLogits:
    """Logits of both heads of a timm ``VisionTransformerDistilled``, in train or eval mode, and their mean.

    The mean is of logits, as the released code and timm have it; the mean of probabilities, which the DeiT
    paper describes, may pick another class.

    Args:
        model: with two heads, wrapped by ``torch.compile`` or DistributedDataParallel or not. A model with
            one has the same logits three times.
        images: [B, C, H, W].

    Raises:
        TypeError: a model with two heads on one pooled feature, such as timm's LeViT.
    """
    logits = both_logits(model, images)
    if isinstance(logits, Tensor):
        if hasattr(inner := unwrap(model), "set_distilled_training"):
            raise TypeError(
                f"head_logits: `model` must be a VisionTransformerDistilled or have one head, got "
                f"{type(inner).__name__}, whose two heads share a feature."
            )
        return HeadLogits(logits, logits, logits)
    return HeadLogits(*logits, (logits[0] + logits[1]) / 2)


def class_groups(counts: Counts, split: Literal["index", "count"] = "index") -> dict[str, list[int]]:
    """Classes that are ``"head"``, ``"mid"`` and ``"tail"``.

    Classes are sorted by decreasing count, equal ones in their order. ``"index"`` cuts at fixed places: 3, 4
    and 3 classes of 10; 36, 35 and 29 of 100; 390, 445 and 165 of 1000; 842, 3701 and 3599 of 8142, as
    published for CIFAR-10-LT, CIFAR-100-LT, ImageNet-LT and iNaturalist-2018. For another number of classes
    head and tail are 3/10 of them each, rounded: our choice. ``"count"``: more than 100 images, 20 to 100,
    fewer than 20.

    Args:
        counts: training images of each class, [C].
        split: ``"index"`` or ``"count"``.

    Returns:
        Class numbers by group, by decreasing count; a group may be empty.

    Raises:
        ValueError: an unknown split, or bad counts.

    Source:
        DeiT-LT (Rangwani et al., CVPR 2024), released code.
    """
    n = checked_counts(counts, "class_groups", "zero")
    order: list[int] = n.argsort(descending=True, stable=True).tolist()
    classes = len(n)
    if split == "index":
        outer = round(0.3 * classes)
        sizes = _PUBLISHED.get(classes, (outer, classes - 2 * outer, outer))
    elif split == "count":
        many, few = int((n > 100).sum()), int((n < 20).sum())
        sizes = (many, classes - many - few, few)
    else:
        raise ValueError(f"class_groups: `split` must be one of index, count, got {split!r}.")
    head, mid = sizes[0], sizes[0] + sizes[1]
    return dict(zip(GROUPS, (order[:head], order[head:mid], order[mid:]), strict=True))


def group_accuracy(
    predictions: Tensor, labels: Tensor, groups: Mapping[str, Sequence[int]]
) -> dict[str, float]:
    """Top-1 accuracy in percent: of all images as ``"overall"``, and of each group of classes.

    A group's accuracy is the mean of its classes' accuracies. Give the predictions of the whole test set at
    once, gathered from all processes: means of shards are other numbers.

    Args:
        predictions: classes int64 [N], or logits [N, C].
        labels: int64 [N].
        groups: class numbers by name, from :func:`class_groups`.

    Returns:
        By name. Classes without test images are left out, and so are groups of such classes only.

    Raises:
        ValueError: no images, shapes that differ, or a negative class in a group.
    """
    if predictions.ndim == 2:
        predictions = predictions.argmax(1)
    if predictions.shape != labels.shape or labels.ndim != 1 or not len(labels):
        raise ValueError(
            f"group_accuracy: `predictions` and `labels` must be [N] with N of at least 1, got "
            f"{list(predictions.shape)} and {list(labels.shape)}."
        )
    hits = predictions == labels
    found = {"overall": 100 * float(hits.double().mean())}
    members = [c for group in groups.values() for c in group]
    if min(members, default=0) < 0:
        raise ValueError(f"group_accuracy: `groups` must hold class numbers from 0, got {min(members)}.")
    classes = max([int(labels.max()), *members]) + 1
    total = labels.bincount(minlength=classes).double()
    right = labels[hits].bincount(minlength=classes).double()
    accuracy = right / total
    for name, group in groups.items():
        chosen = torch.as_tensor(group, dtype=torch.long, device=labels.device)
        there = accuracy[chosen][total[chosen] > 0]
        if len(there):
            found[name] = 100 * float(there.mean())
    return found
