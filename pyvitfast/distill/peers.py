"""What a user with rare classes takes instead, and the control without a teacher."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn

from pyvitfast.distill.mixing import MixedLabels
from pyvitfast.distill.weights import Counts, Empty, checked_counts, effective_number_weights


def _check_shares(owner: str, **shares: float) -> None:
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{owner}: `{name}` must be from 0 to 1, got {value!r}.")


def _cross_entropy(logits: Tensor, target: Tensor | MixedLabels, smoothing: float) -> Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    if isinstance(target, MixedLabels):
        target, smoothing = target.probabilities(logits.shape[1], smoothing).to(wide), 0.0
    elif target.is_floating_point():
        target, smoothing = target.to(wide), 0.0
    return F.cross_entropy(logits.to(wide), target, label_smoothing=smoothing)


class BalancedSoftmaxLoss(nn.Module):
    r"""Cross-entropy of :math:`z_c + \log \pi_c`, with the share :math:`\pi` of each class in training.

    The model learns logits for balanced classes; at inference nothing is added.

    Args:
        class_counts: training images of each class.
        smoothing: label smoothing of integer and paired labels.
        empty: a class without images is refused (``"error"``) or counted as one image (``"one"``).

    Raises:
        ValueError: bad counts, a class without images, or smoothing outside [0, 1].

    Source:
        Ren et al., Balanced Meta-Softmax for Long-Tailed Visual Recognition, NeurIPS 2020.
    """

    log_prior: Tensor

    def __init__(
        self, class_counts: Counts, smoothing: float = 0.0, empty: Literal["error", "one"] = "error"
    ) -> None:
        super().__init__()
        _check_shares("BalancedSoftmaxLoss", smoothing=smoothing)
        self.smoothing = smoothing
        n = checked_counts(class_counts, "BalancedSoftmaxLoss", empty, empties=("error", "one"))
        self.register_buffer("log_prior", (n / n.sum()).log(), persistent=False)

    def forward(self, logits: Tensor, target: Tensor | MixedLabels) -> Tensor:
        """The loss of logits [B, C], a scalar; labels int64 [B], pairs, or probabilities [B, C]."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        prior = self.log_prior.to(logits.device, wide)
        return _cross_entropy(logits.to(wide) + prior, target, self.smoothing)


class ClassWeightedBCE(nn.Module):
    """timm's binary cross-entropy with the weights of :func:`effective_number_weights` on its columns.

    Args:
        class_counts: training images of each class.
        beta: of the effective number of samples.
        smoothing: label smoothing of integer and paired labels.
        empty: classes without images, see :func:`effective_number_weights`.

    Raises:
        ValueError: bad counts, a class without images, or smoothing outside [0, 1).

    Source:
        Cui et al., CVPR 2019; ``timm.loss.BinaryCrossEntropy``, a mean over images and classes.
    """

    def __init__(
        self, class_counts: Counts, beta: float = 0.9999, smoothing: float = 0.0, empty: Empty = "error"
    ) -> None:
        super().__init__()
        if not 0 <= smoothing < 1:  # as timm, which asserts it
            raise ValueError(
                f"ClassWeightedBCE: `smoothing` must be at least 0 and below 1, got {smoothing!r}."
            )
        weights = effective_number_weights(class_counts, beta, empty).float()
        self.loss = BinaryCrossEntropy(smoothing=smoothing, weight=weights)

    def forward(self, logits: Tensor, target: Tensor | MixedLabels) -> Tensor:
        """The loss of logits [B, C], a scalar; labels int64 [B], pairs, or probabilities [B, C]."""
        if isinstance(target, MixedLabels):
            target = target.probabilities(logits.shape[1], self.loss.smoothing)
        found: Tensor = self.loss(logits.float(), target)
        return found


class TwoTokenLoss(nn.Module):
    """Both heads learn from the labels: the control without a teacher, where tokens do not specialise.

    Args:
        alpha: share of the DIST head.
        smoothing: label smoothing of integer and paired labels, for both heads.

    Raises:
        ValueError: alpha or smoothing outside [0, 1].

    Source:
        Distillation type ``none`` of DeiT-LT's released code.
    """

    def __init__(self, alpha: float = 0.5, smoothing: float = 0.1) -> None:
        super().__init__()
        _check_shares("TwoTokenLoss", alpha=alpha, smoothing=smoothing)
        self.alpha, self.smoothing = alpha, smoothing

    def forward(self, output: tuple[Tensor, Tensor], target: Tensor | MixedLabels) -> Tensor:
        """The loss of both heads' logits, [B, C] each; targets as :class:`BalancedSoftmaxLoss` takes them."""
        cls, distilled = (_cross_entropy(logits, target, self.smoothing) for logits in output)
        return (1 - self.alpha) * cls + self.alpha * distilled
