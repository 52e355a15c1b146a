"""The models that pruning and finetuning learn from."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from pyvitfast.models.modules import Logits, both_logits
from pyvitfast.prune import DistillationConfig, DistillationLoss
from pyvitfast.train import model as models
from pyvitfast.train.data import Data, image_size, input_channels
from pyvitfast.train.errors import UserError
from pyvitfast.train.settings import Settings


@dataclass
class Teachers:
    """Teachers and the loss that joins them with the labels.

    Args:
        loss: the objective.
        dense: the model before pruning, frozen in eval mode, or None.
        cnn: a convolutional network, frozen in eval mode, or None.
    """

    loss: DistillationLoss
    dense: nn.Module | None
    cnn: nn.Module | None

    def attach(self, student: nn.Module, on: bool) -> None:
        """Let a student with two heads give the logits of both while it trains."""
        if isinstance(student, VisionTransformerDistilled):
            student.set_distilled_training(on)

    @torch.no_grad()
    def soft(self, images: Tensor, dense: bool) -> tuple[Logits | None, Tensor | None]:
        """Logits of the dense model, if ``dense`` is wanted, and of the CNN; None for those not there."""
        soft = both_logits(self.dense, images) if dense and self.dense is not None else None
        return soft, None if self.cnn is None else self.cnn(images)


def distillation(settings: Settings, stage: str) -> DistillationConfig:
    """The preset's objective for ``stage``, with the given weights on top."""
    given = {"kl_weight": settings.kl_weight, "temperature": settings.kl_temperature}
    return DistillationConfig.preset(
        settings.preset, stage, **{k: v for k, v in given.items() if v is not None}
    )


def make_teachers(
    settings: Settings, stage: str, dense: nn.Module, cnn: nn.Module | None, device: torch.device
) -> Teachers | None:
    """Teachers of ``stage``; None when there is nothing to learn from but labels."""
    config = distillation(settings, stage)
    if not config.kl_weight and cnn is None:
        return None
    soft = None
    if config.kl_weight:
        # A copy, because the report shows the dense model, which is not to be frozen for it.
        soft = copy.deepcopy(dense).to(device).eval().requires_grad_(False)
    hard = None if cnn is None else cnn.to(device).eval().requires_grad_(False)
    return Teachers(DistillationLoss(config, settings.smoothing), soft, hard)


def open_cnn(settings: Settings, data: Data, student: nn.Module) -> nn.Module | None:
    """The network of ``settings.cnn_teacher``, or None.

    Raises:
        UserError: it is not there, or does not fit data and student.
    """
    name = settings.cnn_teacher
    if name is None:
        return None
    teacher = models.trained(
        name,
        data,
        "--cnn-teacher",
        "Train one on it (pyvitfast train --model resnet18 --data ...) and give its model.safetensors.",
    )
    flag = f"--cnn-teacher {name}"
    chans, side = input_channels(student), image_size(student)
    try:
        with torch.no_grad():
            teacher.eval()(torch.zeros(1, chans, side, side))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{flag} sees the student's images and cannot take {chans}x{side}x{side}: {reason}"
        ) from error
    for key in ("mean", "std"):
        theirs, ours = (_cfg(m).get(key) for m in (teacher, student))
        if data.name != "digits" and theirs and ours and tuple(theirs) != tuple(ours):
            raise UserError(
                f"{flag} sees the student's images, which are normalised with {key} {tuple(ours)}; it was "
                f"trained with {tuple(theirs)}. Use a network with the same normalisation."
            )
    return teacher


def _cfg(model: nn.Module) -> Any:
    return getattr(model, "pretrained_cfg", None) or {}
