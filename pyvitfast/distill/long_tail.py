"""Long-tailed subsets of labelled data, and the order of classes by their size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pyvitfast.distill.weights import Counts, checked_counts

KINDS = ("exp", "step")


def long_tail_counts(
    n_max: int, classes: int, imbalance: float = 100, kind: Literal["exp", "step"] = "exp"
) -> list[int]:
    r"""Images of each class in a long-tailed set.

    ``"exp"``: :math:`n_c = \lfloor n_{max} \rho^{-c/(C-1)} \rfloor`. ``"step"``: the first half of the
    classes has :math:`n_{max}`, the rest :math:`\lfloor n_{max} / \rho \rfloor`; of an odd number the
    middle one is among the rest.

    Args:
        n_max: images of the largest class.
        classes: C.
        imbalance: rho, size of the largest over the smallest class, at least 1.
        kind: ``"exp"`` or ``"step"``.

    Raises:
        ValueError: a value out of its range.

    Source:
        Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS 2019:
        CIFAR-10-LT and CIFAR-100-LT.

    Example:
        >>> long_tail_counts(5000, 10, 100)
        [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    """
    if n_max < 1 or classes < 1:
        raise ValueError(
            f"long_tail_counts: `n_max` and `classes` must be at least 1, got {n_max} and {classes}."
        )
    if not 1 <= imbalance < float("inf"):
        raise ValueError(f"long_tail_counts: `imbalance` must be finite and at least 1, got {imbalance!r}.")
    if kind not in KINDS:
        raise ValueError(f"long_tail_counts: `kind` must be one of {', '.join(KINDS)}, got {kind!r}.")
    factor = 1 / imbalance
    if kind == "step":
        return [n_max if c < classes // 2 else int(n_max * factor) for c in range(classes)]
    return [int(n_max * factor ** (c / max(1, classes - 1))) for c in range(classes)]


def long_tail_indices(
    labels: Sequence[int],
    imbalance: float = 100,
    kind: Literal["exp", "step"] = "exp",
    seed: int = 0,
) -> list[int]:
    """Indices of the long-tailed subset that the literature calls CIFAR-LT, of any labelled data.

    For each class in turn its positions, in file order, are shuffled by NumPy's legacy generator, and the
    first ``long_tail_counts`` of them are kept. With seed 0 and CIFAR's training labels these are the
    published images; the set at a larger imbalance is a part of that at a smaller one.

    Args:
        labels: class numbers from 0; the first class becomes the largest.
        imbalance: size of the largest over the smallest class, at least 1.
        kind: ``"exp"`` or ``"step"``.
        seed: of the generator, a private one. Published sets have 0 whatever the seed of the run.

    Returns:
        Indices by class, in the order of the shuffle. ``n_max`` is the size of the largest class: where
        classes differ in size, none gets more than it has, and each that has an image keeps at least one.

    Raises:
        TypeError: labels that are not whole numbers.
        ValueError: no labels, a negative one, or a bad ``imbalance`` or ``kind``.
    """
    array = np.asarray(labels)
    if array.ndim == 1 and len(array) and array.dtype.kind not in "iub":
        raise TypeError(f"long_tail_indices: `labels` must be whole numbers, got {array.dtype}.")
    if array.ndim != 1 or not len(array) or array.min() < 0:
        raise ValueError("long_tail_indices: `labels` must be class numbers from 0, at least one.")
    sizes = np.bincount(array)
    wanted = long_tail_counts(int(sizes.max()), len(sizes), imbalance, kind)
    random_state = np.random.RandomState(seed)
    kept: list[int] = []
    for c, count in enumerate(wanted):
        members = np.flatnonzero(array == c)
        random_state.shuffle(members)
        kept.extend(members[: max(1, count)].tolist())
    return kept


def class_ranks(counts: Counts) -> list[int]:
    """Place of each class among all by decreasing count: ``ranks[c]`` is 0 for the largest class.

    Classes of equal count keep their order. The released code sorts unstably, so its maps differ between
    builds of NumPy: use a published checkpoint only with the map that it was trained with, and keep yours
    beside the model.

    Args:
        counts: images of each class, [C].

    Returns:
        A class map for :class:`TeacherPipeline`: the student's number of the original class c.

    Example:
        >>> class_ranks([5, 5, 7, 5, 7])
        [2, 3, 0, 4, 1]
    """
    order = checked_counts(counts, "class_ranks", "zero").argsort(descending=True, stable=True)
    ranks: list[int] = order.argsort().tolist()
    return ranks


def checked_class_map(class_map: Sequence[int] | Tensor, classes: int) -> Tensor:
    """``class_map`` as int64 [C] on the CPU.

    Raises:
        TypeError: it is no list, array or tensor of numbers.
        ValueError: it has another length, a number outside [0, C), or one twice.
    """
    try:
        found = torch.as_tensor(class_map).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        if "verflow" in str(error):
            raise ValueError(
                f"class map: numbers must be from 0 to {classes - 1}, got one past int64."
            ) from error
        raise TypeError(
            f"class map: it must be a list, an array or a tensor, got {type(class_map).__name__}: {error}."
        ) from error
    if found.ndim != 1 or len(found) != classes:
        raise ValueError(
            f"class map: there must be one number for each of the teacher's {classes} classes, got shape "
            f"{list(found.shape)}."
        )
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise ValueError(f"class map: numbers must be whole, got {found.dtype}.")
    found = found.long()
    if outside := ((found < 0) | (found >= classes)).nonzero().flatten().tolist():
        first = outside[0]
        raise ValueError(
            f"class map: numbers must be from 0 to {classes - 1}, got {int(found[first])} for class {first}."
        )
    if repeated := (found.bincount(minlength=classes) > 1).nonzero().flatten().tolist():
        raise ValueError(
            f"class map: each number must stand once, but {repeated[0]} stands for several classes."
        )
    return found
