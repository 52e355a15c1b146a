"""Mixup and CutMix whose labels stay pairs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor


class MixedLabels(NamedTuple):
    """Labels of a mixed batch: ``lam`` of the image is of class ``labels``, the rest of ``partners``.

    Args:
        labels: int64 [B].
        partners: int64 [B].
        lam: share of ``labels``, one number for the batch [] or one an image [B].
    """

    labels: Tensor
    partners: Tensor
    lam: Tensor

    def probabilities(self, classes: int, smoothing: float = 0.0) -> Tensor:
        """The target as float32 [B, C], for losses that take no pairs: smoothed once, after mixing."""
        lam = self.lam.reshape(-1, 1)
        one, other = (F.one_hot(part, classes) for part in (self.labels, self.partners))
        return smoothing / classes + (1 - smoothing) * (lam * one + (1 - lam) * other)


class PairedMixup(Mixup):  # type: ignore[misc]
    """timm's ``Mixup`` in ``batch`` mode, giving :class:`MixedLabels` in place of dense targets [B, C].

    Image i is mixed with image B-1-i. Arguments are timm's. The same random numbers of NumPy's global
    generator give the same pixels; lam is that of the pasted area where CutMix meets the border.
    ``label_smoothing`` and ``num_classes`` stand in no target here: smoothing is the loss's.

    Raises:
        ValueError: another mode than ``"batch"``, or a batch of odd size.

    Example:
        >>> mix = PairedMixup(mixup_alpha=0.8, cutmix_alpha=1.0)
        >>> images, mixed = mix(images, labels)
        >>> loss(student(images), mixed, teacher(images))
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.mode != "batch":
            raise ValueError(
                f"PairedMixup: `mode` must be 'batch', got {self.mode!r}. timm's Mixup has others."
            )

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, MixedLabels]:
        """Mix a batch in place.

        Args:
            images: [B, C, H, W] with even B, overwritten.
            labels: int64 [B].

        Returns:
            ``images``, and whose they are; lam is float32 [] on their device.
        """
        if len(images) % 2:
            raise ValueError(
                f"PairedMixup: the batch must have an even number of images, got {len(images)}: image i is "
                "mixed with image B-1-i, and the middle one has no partner. Choose an even batch size and "
                "drop the last batch where it is shorter."
            )
        # A fill needs no copy from the host, so the device is not waited for.
        lam = torch.full((), self._mix_batch(images), device=images.device)
        return images, MixedLabels(labels, labels.flip(0), lam)
