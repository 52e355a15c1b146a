"""The loss of DeiT-LT: labels for the class token, a flat CNN's labels for the distillation token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pyvitfast.distill.config import DeiTLTConfig
from pyvitfast.distill.mixing import MixedLabels
from pyvitfast.distill.weights import Counts, DeferredReweighting, effective_number_weights
from pyvitfast.models.modules import kernel


class LossParts(NamedTuple):
    """The two losses of a call before alpha, detached.

    Args:
        cls_loss: of the class token with the labels, [].
        dist_loss: of the distillation token with the teacher's labels, [].
    """

    cls_loss: Tensor
    dist_loss: Tensor


class DeiTLTLoss(nn.Module, DeferredReweighting):
    r"""Cross-entropy of the CLS head with the labels and of the DIST head with a teacher's hard labels.

    .. math::
        (1 - \alpha) \frac1B \sum_i \mathrm{CE}(z^c_i, t_i) + \alpha
        \frac{\sum_i w_{y^t_i} \mathrm{CE}(z^d_i, y^t_i)}{\sum_i w_{y^t_i}}

    Before ``drw_epoch`` w is 1, and t the mixed and smoothed label. From then on w is the inverse effective
    number of training images of the teacher's class, and t the plain label, or as before with
    ``mixing_after_drw``. With ``drw_epoch=None`` this is the hard distillation of DeiT.

    The mean is a weighted one over the batch at hand: a batch of one has no weights, and micro-batches are
    not equal to their union. ``weight_norm="global"`` makes them so.

    Args:
        class_counts: training images of each class in the student's order, over the whole training set and
            equal on every process.
        alpha: share of the DIST loss.
        drw_epoch: first epoch of deferred re-weighting, from 0.
        config: all settings at once, in place of the others.
        settings: the other fields of :class:`DeiTLTConfig`.

    Raises:
        ValueError: a setting out of its range, or a class without images.
        TypeError: both ``config`` and single settings.

    Source:
        DeiT-LT (Rangwani et al., CVPR 2024), sections 3 and 4, and the released code, whose weighted mean is
        followed.

    Example:
        >>> loss = DeiTLTLoss(counts, drw_epoch=1100)
        >>> teacher = TeacherPipeline(resnet, size=32)
        >>> student.set_distilled_training(True)
        >>> loss.set_epoch(epoch)
        >>> target = labels
        >>> if loss.mixes:
        ...     images, target = mix(images, labels)
        >>> loss(student(images), target, teacher(images)).backward()
    """

    class_weights: Tensor

    def __init__(
        self,
        class_counts: Counts,
        alpha: float = 0.5,
        drw_epoch: int | None = None,
        *,
        config: DeiTLTConfig | None = None,
        **settings: Any,
    ) -> None:
        nn.Module.__init__(self)
        if config is None:
            config = DeiTLTConfig(alpha=alpha, drw_epoch=drw_epoch, **settings)
        elif settings or (alpha, drw_epoch) != (0.5, None):
            raise TypeError("DeiTLTLoss: give either `config` or single settings, got both.")
        DeferredReweighting.__init__(self, config.drw_epoch)
        self.config = config
        weights = effective_number_weights(class_counts, config.beta, config.empty)
        # Follows from the counts, so it is in no state dict.
        self.register_buffer("class_weights", weights, persistent=False)
        self.parts: LossParts | None = None

    @property
    def mixes(self) -> bool:
        """Whether batches of this epoch are to be mixed."""
        return self.config.mixing_after_drw or not self.reweights

    @property
    def smoothing(self) -> float:
        """Label smoothing of the CLS loss in this epoch: it goes where mixing goes."""
        return self.config.smoothing if self.mixes else 0.0

    def window_divisor(self, teacher_labels: Sequence[Tensor]) -> Tensor:
        """What ``weight_norm="global"`` divides each micro-batch of an optimizer update by.

        Args:
            teacher_labels: int64 [B] of each micro-batch of the update that this process has; all processes
                have equally many.

        Returns:
            float64 []: the mean of the micro-batches' sums of weights, also over processes. With it, the mean
            of micro-batch losses, which is what accumulation and DDP make, is the loss of one large batch.
        """
        sums = [self._weights(labels.device, torch.float64)[labels].sum() for labels in teacher_labels]
        mean = torch.stack(sums).mean()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(mean)
            mean = mean / dist.get_world_size()
        return mean

    def _weights(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        return self.class_weights.to(device, dtype)

    def forward(
        self,
        output: tuple[Tensor, Tensor],
        target: Tensor | MixedLabels,
        teacher: Tensor,
        divisor: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar: float32, or float64 for float64 logits.

        Args:
            output: logits of the CLS and the DIST head, [B, C] each. timm's distilled models give both in
                train mode after ``set_distilled_training(True)``.
            target: labels int64 [B], :class:`MixedLabels`, or probabilities [B, C] as timm's ``Mixup`` makes
                them, already smoothed; these take plain torch instead of the op.
            teacher: labels int64 [B] of the teacher for these very images, or its logits [B, C].
            divisor: of the weighted DIST loss with ``weight_norm="global"``, from :meth:`window_divisor`;
                None takes this batch, summed over processes.

        Raises:
            TypeError: ``output`` is not a pair.
            ValueError: mixed labels in an epoch without mixing, shapes that differ, or, on the CPU, a label
                out of range (RuntimeError beside probabilities).
        """
        if isinstance(output, Tensor) or len(output) != 2:
            raise TypeError(
                "DeiTLTLoss: `output` must be the logits of both heads, (cls, dist), got "
                f"{'one tensor' if isinstance(output, Tensor) else f'{len(output)} of them'}. Call "
                "model.set_distilled_training(True) and model.train() first, or take head_logits()."
            )
        cls, distilled = output
        classes = len(self.class_weights)
        if cls.ndim != 2 or cls.shape != distilled.shape or cls.shape[1] != classes:
            raise ValueError(
                f"DeiTLTLoss: `output` must be two tensors [B, {classes}], one column a class of "
                f"`class_counts`, got {list(cls.shape)} and {list(distilled.shape)}."
            )
        if isinstance(target, MixedLabels) and not self.mixes:
            raise ValueError(
                f"DeiTLTLoss: `target` must be plain labels from epoch {self.drw_epoch} on, got mixed ones. "
                "Mix only while loss.mixes is true, or set mixing_after_drw=True."
            )
        weights = None
        norm = self.config.weight_norm
        if self.reweights:
            weights = self._weights(cls.device, torch.promote_types(cls.dtype, torch.float32))
        if weights is None or norm == "batch":
            divisor = None
        elif norm == "classes":
            divisor = torch.full((), float(len(cls)), device=cls.device)
        elif divisor is None:
            divisor = self.window_divisor([_hard(teacher)])
        if isinstance(target, Tensor) and target.is_floating_point():
            return self._dense(cls, distilled, target, _hard(teacher), weights, divisor)
        partners = lam = None
        if isinstance(target, MixedLabels):
            target, partners, lam = target
        run = kernel("two_head_loss", cls.device)
        out = run(
            cls,
            distilled,
            target,
            teacher,
            weights=weights,
            partners=partners,
            lam=lam,
            divisor=divisor,
            alpha=self.config.alpha,
            smoothing=self.smoothing,
        )
        self.parts = LossParts(out.cls_loss.detach(), out.dist_loss.detach())
        loss: Tensor = out.loss
        return loss

    def _dense(
        self,
        cls: Tensor,
        distilled: Tensor,
        target: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        divisor: Tensor | None,
    ) -> Tensor:
        wide = torch.promote_types(cls.dtype, torch.float32)
        if target.shape != cls.shape:
            raise ValueError(
                f"DeiTLTLoss: `target` must be probabilities {list(cls.shape)}, got {list(target.shape)}."
            )
        batch = max(1, len(cls))
        cls_loss = -(target.to(wide) * F.log_softmax(cls.to(wide), 1)).sum() / batch
        rows = -F.log_softmax(distilled.to(wide), 1).gather(1, labels[:, None])[:, 0]
        if weights is None:
            dist_loss = rows.sum() / batch
        else:
            row_weights = weights[labels]
            total = row_weights.sum() if divisor is None else divisor.to(wide)
            weighted = (row_weights * rows).sum()
            dist_loss = weighted / torch.where(total == 0, torch.ones_like(total), total)
        self.parts = LossParts(cls_loss.detach(), dist_loss.detach())
        return (1 - self.config.alpha) * cls_loss + self.config.alpha * dist_loss


def _hard(teacher: Tensor) -> Tensor:
    return teacher.argmax(1) if teacher.is_floating_point() else teacher
