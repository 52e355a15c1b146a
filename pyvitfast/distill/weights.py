"""Class weights from the effective number of samples, and when a loss starts to use them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Counts: TypeAlias = Sequence[int] | Sequence[float] | Tensor
Empty: TypeAlias = Literal["error", "zero", "one"]
EMPTY = ("error", "zero", "one")


def checked_counts(counts: Counts, owner: str, empty: str, empties: tuple[str, ...] = EMPTY) -> Tensor:
    """``counts`` as float64 [C] on the CPU, with 1 in place of 0 where ``empty`` is ``"one"``.

    Args:
        counts: training images of each class.
        owner: who asks, for the message.
        empty: what to do with a class without images: refuse (``"error"``), leave it 0, or make it 1.
        empties: what ``empty`` may be.

    Raises:
        TypeError: what is no list, array or tensor of numbers.
        ValueError: not one dimension, no class, a count that is negative or not finite, an unknown ``empty``,
            or an empty class where that is an error.
    """
    if empty not in empties:
        raise ValueError(f"{owner}: `empty` must be one of {', '.join(empties)}, got {empty!r}.")
    try:
        given = torch.as_tensor(counts).detach()
    except (TypeError, ValueError, RuntimeError) as error:  # torch knows many words for it
        raise TypeError(
            f"{owner}: `counts` must be a list, an array or a tensor of numbers, one a class, got "
            f"{type(counts).__name__}: {error}."
        ) from error
    if given.is_complex():
        raise TypeError(f"{owner}: `counts` must be real, got {given.dtype}.")
    n = given.to("cpu", torch.float64)
    if n.ndim != 1 or not len(n):
        raise ValueError(f"{owner}: `counts` must be one number a class, [C], got shape {list(n.shape)}.")
    if bad := (~n.isfinite() | (n < 0)).nonzero().flatten().tolist():
        raise ValueError(f"{owner}: `counts` must be finite and at least 0, got {n[bad[0]]} at {bad[0]}.")
    without = (n == 0).nonzero().flatten().tolist()
    if without and empty == "error":
        more = f" and {len(without) - 10} more" if len(without) > 10 else ""
        raise ValueError(
            f"{owner}: `counts` must be at least 1, but there are no images of classes "
            f"{', '.join(map(str, without[:10]))}{more}. Drop these classes, or choose what they count as "
            "with `empty`: 'one' image, or 'zero', weight 0, where that is offered."
        )
    return n.clamp(min=1) if empty == "one" else n


def effective_number_weights(
    counts: Counts, beta: float = 0.9999, empty: Empty = "error", normalize: bool = True
) -> Tensor:
    r"""Inverse effective number of samples: :math:`w_c = 1 / E_c, E_c = (1 - \beta^{N_c}) / (1 - \beta)`.

    Args:
        counts: training images :math:`N_c` of each class, over the whole training set.
        beta: in [0, 1); 0 weights all classes alike, towards 1 the weights go to :math:`1 / N_c`.
        empty: what becomes of classes without images: ``"error"``; ``"zero"``: weight 0, the others as if the
            class was not there; ``"one"``: weighted as if there was one image.
        normalize: scale the weights to mean 1 over the classes that have images (code), else leave
            :math:`1 / E_c` (paper). A weighted mean is the same for both.

    Returns:
        float64 [C] on the CPU; E is taken in float64 by expm1, since 1 - 0.9999^N in float32 keeps three
        digits.

    Raises:
        ValueError: ``beta`` outside [0, 1), counts that are negative or not finite, an empty class.

    Source:
        DeiT-LT (Rangwani et al., CVPR 2024), the DIST loss after the DRW epoch; Cui et al., CVPR 2019.

    Example:
        >>> effective_number_weights([100, 10, 1])
        tensor([0.0272, 0.2704, 2.7025], dtype=torch.float64)
    """
    if not 0 <= beta < 1:
        raise ValueError(f"effective_number_weights: `beta` must be at least 0 and below 1, got {beta!r}.")
    n = checked_counts(counts, "effective_number_weights", empty)
    there = n > 0
    log_beta = torch.log1p(torch.tensor(beta - 1, dtype=torch.float64))
    weights = torch.zeros_like(n)
    weights[there] = (1 - beta) / -torch.expm1(n[there] * log_beta)
    if normalize and there.any():
        weights *= there.sum() / weights.sum()
    return weights


class DeferredReweighting:
    """Class weights that a loss uses from an epoch on (DRW). Epochs count from 0.

    :attr:`reweights` tells whether they are in use: ``epoch >= drw_epoch``. It is kept, not worked out from
    the epoch at each call, for ``torch.compile`` would compile anew for each epoch that it reads.
    """

    reweights: bool

    def __init__(self, drw_epoch: int | None) -> None:
        self.drw_epoch = drw_epoch
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Tell the epoch, from 0, at its start and after a resume; the phase follows from it alone."""
        if epoch < 0:
            raise ValueError(f"{type(self).__name__}: `epoch` must be at least 0, got {epoch}.")
        self.epoch = epoch
        self.reweights = self.drw_epoch is not None and epoch >= self.drw_epoch


def check_drw_epoch(drw_epoch: int | None, owner: str) -> None:
    """Raise ValueError unless ``drw_epoch`` is None or a whole number of at least 0."""
    if drw_epoch is not None and (type(drw_epoch) is not int or drw_epoch < 0):
        raise ValueError(
            f"{owner}: `drw_epoch` must be a whole number of at least 0, or None for never, "
            f"got {drw_epoch!r}."
        )
