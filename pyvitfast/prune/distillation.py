"""The training objective of NViT: labels, a CNN's hard labels, and the dense model's soft ones."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvitfast.models.modules import Logits

_STAGES = ("prune", "finetune")


@dataclass(frozen=True)
class DistillationConfig:
    r"""Weights and scales of :class:`DistillationLoss`.

    The paper writes :math:`\alpha L_\text{full} + L_\text{CNN}` and does not print :math:`\alpha` or the
    temperature; the released code has numbers of its own, in :meth:`preset`.

    Args:
        label_weight: of the cross-entropy with the labels.
        label_logits: what that term sees of a model with two heads: ``"class"`` the class head (eq. 8), or
            ``"mean"`` the mean of both (released code).
        cnn_weight: of the cross-entropy with the CNN's most likely class.
        kl_weight: alpha, of the divergence from the dense model; 0 turns it off.
        temperature: divides both models' logits in the divergence.
        kl_logits: ``"each"`` adds up the divergences of both heads (eq. 9), ``"mean_of_each"`` takes half of
            that, ``"mean"`` takes one divergence of the mean logits.
        kl_reduction: ``"per_sample"`` means over images; ``"per_element"`` also over classes, as
            ``torch.nn.KLDivLoss()`` does unasked, which is smaller by the number of classes.
        kl_times_t2: multiply the divergence by the squared temperature, so that its gradient keeps its size.

    Raises:
        ValueError: a value outside its range.

    Source:
        NViT (Yang et al., CVPR 2023), eq. 8-9.
    """

    label_weight: float = 1.0
    label_logits: Literal["class", "mean"] = "class"
    cnn_weight: float = 1.0
    kl_weight: float = 1.0
    temperature: float = 3.0
    kl_logits: Literal["each", "mean_of_each", "mean"] = "each"
    kl_reduction: Literal["per_sample", "per_element"] = "per_sample"
    kl_times_t2: bool = True

    def __post_init__(self) -> None:
        for name in ("label_weight", "cnn_weight", "kl_weight"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(
                    f"DistillationConfig: `{name}` must be finite and at least 0, got {value!r}."
                )
        if not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"DistillationConfig: `temperature` must be finite and above 0, got {self.temperature!r}."
            )
        for name, known in (
            ("label_logits", ("class", "mean")),
            ("kl_logits", ("each", "mean_of_each", "mean")),
            ("kl_reduction", ("per_sample", "per_element")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"DistillationConfig: `{name}` must be one of {', '.join(known)}, "
                    f"got {getattr(self, name)!r}."
                )

    @classmethod
    def preset(cls, name: str, stage: str = "prune", **changes: Any) -> DistillationConfig:
        """Named settings of a stage, ``"prune"`` or ``"finetune"``, with ``changes`` on top.

        ``"paper"``: eq. 8 and 9, with our alpha 1 and temperature 3 where the paper is silent.
        ``"nvit_repo"``: half the cross-entropy of the mean logits, half of the CNN term, and 1e5 times a
        divergence that is averaged over classes too, without the squared temperature: of the mean
        logits at temperature 3 while pruning, of half the sum over heads at 20 while finetuning. With 1000
        classes 1e5 is 100 times the divergence per image.

        Raises:
            ValueError: unknown name or stage.
        """
        if stage not in _STAGES:
            raise ValueError(f"DistillationConfig: `stage` must be prune or finetune, got {stage!r}.")
        if name == "paper":
            return cls(**changes)
        if name != "nvit_repo":
            raise ValueError(f"DistillationConfig: `preset` must be one of paper, nvit_repo, got {name!r}.")
        pruning = stage == "prune"
        repo = cls(
            label_weight=0.5,
            label_logits="mean",
            cnn_weight=0.5,
            kl_weight=1e5,
            temperature=3.0 if pruning else 20.0,
            kl_logits="mean" if pruning else "mean_of_each",
            kl_reduction="per_element",
            kl_times_t2=False,
        )
        return replace(repo, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON and YAML can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DistillationConfig:
        """The inverse of :meth:`to_dict`."""
        return cls(**data)


def _mean(logits: Logits) -> Tensor:
    return logits if isinstance(logits, Tensor) else (logits[0] + logits[1]) / 2


class DistillationLoss(nn.Module):
    r"""Cross-entropy with the labels, hard labels of a CNN, and divergence from the dense model.

    .. math::
        w_y\,\mathrm{CE}(z_\text{cls}, y) + w_c\,\mathrm{CE}(z_\text{dist}, \arg\max z_\text{CNN})
        + \alpha\,\mathrm{KL}\big(p_\text{dense} \,\|\, p\big)

    A model with one head has it in all three terms. Without a CNN, the label term of a model with two heads
    sees their mean, so that both are trained.

    Args:
        config: weights and scales.
        label_smoothing: of the label term, for integer labels.

    Source:
        NViT (Yang et al., CVPR 2023), eq. 8-9.

    Example:
        >>> loss = DistillationLoss(DistillationConfig())
        >>> with torch.no_grad():
        ...     soft = both_logits(dense, images)
        >>> loss(student(images), labels, dense=soft).backward()
    """

    def __init__(self, config: DistillationConfig | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.config = config or DistillationConfig()
        self.label_smoothing = label_smoothing

    def forward(
        self, output: Logits, target: Tensor, dense: Logits | None = None, cnn: Tensor | None = None
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            output: the student's logits [B, C], or those of class and distillation head.
            target: labels int64 [B], or probabilities [B, C] as mixup makes them.
            dense: the dense model's logits in the same form; None leaves its term out.
            cnn: the CNN's logits [B, C]; None leaves its term out.

        Raises:
            ValueError: a teacher with other classes, images or heads.
        """
        c = self.config
        classes, distilled = (output, output) if isinstance(output, Tensor) else output
        for name, teacher in (("dense", dense), ("cnn", cnn)):
            for part in (teacher,) if isinstance(teacher, Tensor) else teacher or ():
                if part.shape != classes.shape:
                    raise ValueError(
                        f"DistillationLoss: `{name}` must have the student's logits' shape "
                        f"{list(classes.shape)}, got {list(part.shape)}."
                    )
        seen = classes if cnn is not None and c.label_logits == "class" else _mean(output)
        smoothing = 0.0 if target.is_floating_point() else self.label_smoothing
        loss = c.label_weight * F.cross_entropy(seen, target, label_smoothing=smoothing)
        if cnn is not None:
            loss = loss + c.cnn_weight * F.cross_entropy(distilled, cnn.argmax(1))
        if dense is not None and c.kl_weight:
            loss = loss + c.kl_weight * self._divergence(output, dense)
        return loss

    def _divergence(self, output: Logits, dense: Logits) -> Tensor:
        c = self.config
        if c.kl_logits == "mean":
            pairs = [(_mean(output), _mean(dense))]
        elif isinstance(output, Tensor) and isinstance(dense, Tensor):
            pairs = [(output, dense)]
        elif isinstance(output, Tensor) or isinstance(dense, Tensor):
            raise ValueError(
                "DistillationLoss: `dense` must have as many heads as the student, got one of each kind. "
                "Take both with both_logits(), or set kl_logits='mean'."
            )
        else:
            pairs = list(zip(output, dense))
        total = torch.stack([self._one(student, teacher) for student, teacher in pairs]).sum()
        return total / len(pairs) if c.kl_logits == "mean_of_each" else total

    def _one(self, student: Tensor, teacher: Tensor) -> Tensor:
        c = self.config
        wide = torch.promote_types(student.dtype, torch.float32)
        divergence = F.kl_div(
            F.log_softmax(student.to(wide) / c.temperature, dim=-1),
            F.log_softmax(teacher.to(wide) / c.temperature, dim=-1),
            log_target=True,
            reduction="batchmean",
        )
        if c.kl_reduction == "per_element":
            divergence = divergence / student.shape[-1]
        return divergence * c.temperature**2 if c.kl_times_t2 else divergence
