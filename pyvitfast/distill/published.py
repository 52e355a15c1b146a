"""Weights of teachers that the authors' programs wrote, in the names of our networks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

# What PaCo keeps beside its query encoder and the classifier of that.
_CONTRAST = ("encoder_q.fc.", "encoder_k.", "linear_k.", "queue")
_NETWORK = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.", "fc.")


def convert_teacher_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a published teacher, under the names of ``resnet*_cifar`` and timm's ``resnet50``.

    Two layouts are known, each with or without ``module.`` before all names. PaCo: ``encoder_q.`` and, on its
    pooled features, ``linear.``; the head and the key encoder, which contrast, and the queue are left out.
    LDAM and cross-entropy: the network alone, its classifier ``linear.`` or ``fc.``. Without a bias that is a
    cosine classifier, with a column a class; ours has a row.

    Args:
        checkpoint: what ``torch.load(..., weights_only=True)`` gives: the state dict itself, or a mapping
            that holds it as ``state_dict`` or ``model``.

    Returns:
        For ``load_state_dict`` of ``timm.create_model("resnet32_cifar", num_classes=C)``, with
        ``cosine=True`` where there is no ``fc.bias``, or of ``resnet50`` or ``resnet50_cosine``. The network
        itself checks that no weight is missing. Of a PaCo teacher classes are numbered as in the original
        data; see ``class_map`` of :class:`TeacherPipeline`.

    Raises:
        TypeError: no mapping of names to tensors.
        ValueError: a layout that is not one of these; the message has the names.

    Source:
        Released code of DeiT-LT (Rangwani et al., CVPR 2024), of PaCo (Cui et al., ICCV 2021), and of LDAM
        with SAM (Rangwani et al., NeurIPS 2022).

    Example:
        >>> weights = convert_teacher_state_dict(torch.load("moco_ckpt.pth.tar", weights_only=True))
        >>> cnn = timm.create_model("resnet32_cifar", num_classes=100)
        >>> cnn.load_state_dict(weights)
    """
    if not isinstance(checkpoint, Mapping):
        raise TypeError(
            f"convert_teacher_state_dict: `checkpoint` must be a mapping, got {type(checkpoint).__name__}."
        )
    inner = (checkpoint[key] for key in ("state_dict", "model") if isinstance(checkpoint.get(key), Mapping))
    given: Mapping[str, Any] = next(inner, checkpoint)
    if not given or not all(isinstance(value, Tensor) for value in given.values()):
        raise TypeError(
            "convert_teacher_state_dict: `checkpoint` must hold tensors by name, itself or as `state_dict` "
            f"or `model`, got {_some(given)}."
        )
    if all(name.startswith("module.") for name in given):
        given = {name.removeprefix("module."): value for name, value in given.items()}
    if any(name.startswith("encoder_q.") for name in given):
        given = {
            name.removeprefix("encoder_q."): value
            for name, value in given.items()
            if not name.startswith(_CONTRAST)
        }
    found = {
        f"fc.{name.removeprefix('linear.')}" if name.startswith("linear.") else name: value
        for name, value in given.items()
    }
    unknown = [name for name in found if not name.startswith(_NETWORK)]
    missing = [name for name in ("conv1.weight", "bn1.weight", "fc.weight") if name not in found]
    if unknown or missing or len(found) != len(given):
        raise ValueError(
            "convert_teacher_state_dict: `checkpoint` must have the names of PaCo's code (encoder_q., "
            "linear.) or of a network (conv1., bn1., layer1., ..., linear. or fc.), got "
            f"{_some(unknown or given)}{f' and no {missing[0]}' if missing else ''}."
        )
    if found["fc.weight"].ndim != 2:
        raise ValueError(
            "convert_teacher_state_dict: the classifier must be one matrix, got shape "
            f"{list(found['fc.weight'].shape)}."
        )
    if "fc.bias" not in found:
        found["fc.weight"] = found["fc.weight"].t().contiguous()
    return found


def _some(names: Collection[str]) -> str:
    shown = ", ".join(map(str, list(names)[:5])) or "nothing"
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
