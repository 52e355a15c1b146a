"""Loss of a class and a distillation head, in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TwoHeadLoss(NamedTuple):
    """Losses [] in float32, or float64 for float64 logits, and the teacher's labels.

    Args:
        loss: (1 - alpha) cls_loss + alpha dist_loss.
        cls_loss: of the class head.
        dist_loss: of the distillation head.
        teacher_labels: int64 [B].
    """

    loss: Tensor
    cls_loss: Tensor
    dist_loss: Tensor
    teacher_labels: Tensor


def two_head_loss(
    cls_logits: Tensor,
    dist_logits: Tensor,
    labels: Tensor,
    teacher: Tensor,
    weights: Tensor | None = None,
    partners: Tensor | None = None,
    lam: Tensor | None = None,
    divisor: Tensor | None = None,
    *,
    alpha: float = 0.5,
    smoothing: float = 0.0,
) -> TwoHeadLoss:
    """As :func:`pyvitfast.ops.two_head_loss`; autograd keeps dense targets and two softmaxes."""
    wide = torch.promote_types(cls_logits.dtype, torch.float32)
    chosen = teacher.argmax(1) if teacher.is_floating_point() else teacher
    log_p = cls_logits.to(wide).log_softmax(1)
    rows = -log_p.gather(1, labels[:, None]).squeeze(1)
    if partners is not None and lam is not None:
        share = lam.detach().to(wide)
        rows = share * rows - (1 - share) * log_p.gather(1, partners[:, None]).squeeze(1)
    rows = (1 - smoothing) * rows
    if smoothing > 0:
        rows = rows - smoothing * log_p.mean(1)
    cls_loss = rows.sum() / max(1, len(rows))
    # Not F.cross_entropy, which takes a label of -100 for one to be left out.
    errors = -dist_logits.to(wide).log_softmax(1).gather(1, chosen[:, None]).squeeze(1)
    each = torch.ones_like(errors) if weights is None else weights.detach().to(wide)[chosen]
    total = each.sum() if divisor is None else divisor.detach().to(wide).reshape(())
    # Both sides of the division are replaced: 0 / 0 would give a gradient of NaN also where it is not taken.
    nothing = total == 0
    weighted = torch.where(nothing, 0.0, (each * errors).sum())
    dist_loss = weighted / torch.where(nothing, 1.0, total)
    return TwoHeadLoss((1 - alpha) * cls_loss + alpha * dist_loss, cls_loss, dist_loss, chosen)
