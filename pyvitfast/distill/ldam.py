"""Margins that are wider for rare classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvitfast.distill.weights import (
    Counts,
    DeferredReweighting,
    Empty,
    check_drw_epoch,
    checked_counts,
    effective_number_weights,
)
from pyvitfast.models.cifar_resnet import CosineClassifier

__all__ = ["CosineClassifier", "LDAMLoss"]


class LDAMLoss(nn.Module, DeferredReweighting):
    r"""Cross-entropy of scaled cosines with a margin that falls with the fourth root of the class's size.

    .. math::
        \mathrm{CE}\big(s (\cos_{ic} - m_c [c = y_i]), y_i\big),\quad m_c = m_\max
        \frac{N_c^{-1/4}}{\max_k N_k^{-1/4}}

    From ``drw_epoch`` on rows are weighted by the inverse effective number of samples, as a weighted mean.

    Args:
        class_counts: training images :math:`N_c` of each class.
        max_margin: margin of the smallest class; 0.5 for CIFAR, 0.3 for ImageNet-LT and iNaturalist.
        scale: s.
        drw_epoch: first epoch, from 0, of deferred re-weighting; None: never.
        beta: of the effective number of samples.
        empty: classes without images, see :func:`effective_number_weights`; with ``"zero"`` they have no
            margin.

    Raises:
        ValueError: a value out of its range, or a class without images.

    Source:
        Cao et al., NeurIPS 2019; as the first kind of teacher of DeiT-LT, with SAM.
    """

    margins: Tensor
    class_weights: Tensor

    def __init__(
        self,
        class_counts: Counts,
        max_margin: float = 0.5,
        scale: float = 30.0,
        drw_epoch: int | None = None,
        beta: float = 0.9999,
        empty: Empty = "error",
    ) -> None:
        nn.Module.__init__(self)
        for name, value in (("max_margin", max_margin), ("scale", scale)):
            if not 0 <= value < float("inf") or (name == "scale" and value == 0):
                raise ValueError(f"LDAMLoss: `{name}` must be finite and positive, got {value!r}.")
        check_drw_epoch(drw_epoch, "LDAMLoss")
        DeferredReweighting.__init__(self, drw_epoch)
        self.scale = scale
        n = checked_counts(class_counts, "LDAMLoss", empty)
        roots = torch.where(n > 0, n.clamp(min=1) ** -0.25, 0.0)
        largest = roots.max().clamp(min=torch.finfo(roots.dtype).tiny)  # 0 where all classes are empty
        self.register_buffer("margins", roots * (max_margin / largest), persistent=False)
        weights = effective_number_weights(class_counts, beta, empty)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, cosines: Tensor, labels: Tensor) -> Tensor:
        """The loss, a scalar, float32 or wider.

        Args:
            cosines: [B, C] in [-1, 1], of a :class:`CosineClassifier`.
            labels: int64 [B].

        An empty batch, or one whose weights are all 0, has a loss of 0.

        Raises:
            ValueError: another number of columns than classes.
        """
        classes = len(self.margins)
        if cosines.ndim != 2 or cosines.shape[1] != classes:
            raise ValueError(
                f"LDAMLoss: `cosines` must be [B, {classes}], one column a class of `class_counts`, got "
                f"{list(cosines.shape)}."
            )
        wide = torch.promote_types(cosines.dtype, torch.float32)
        margins = self.margins.to(cosines.device, wide)
        logits = self.scale * (cosines.to(wide) - F.one_hot(labels, classes) * margins)
        if not self.reweights:
            return F.cross_entropy(logits, labels, reduction="sum") / max(1, len(labels))
        weight = self.class_weights.to(cosines.device, wide)
        total = weight[labels].sum()
        weighted = F.cross_entropy(logits, labels, weight=weight, reduction="sum")
        return weighted / torch.where(total == 0, torch.ones_like(total), total)
