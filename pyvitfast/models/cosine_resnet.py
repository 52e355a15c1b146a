"""timm's ResNet with a cosine classifier, registered with timm: what LDAM trains on larger images."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

from pyvitfast.models.cifar_resnet import CosineClassifier

default_cfgs = generate_default_cfgs(
    {
        "resnet50_cosine.untrained": {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "first_conv": "conv1",
            "classifier": "fc",
        }
    }
)


class CosineResNet(ResNet):  # type: ignore[misc]
    """timm's ``ResNet`` whose logits are cosines in [-1, 1]; arguments are timm's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fc = self._cosines()

    def _cosines(self) -> nn.Module:
        return CosineClassifier(self.num_features, self.num_classes) if self.num_classes else nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """Put a fresh cosine classifier in place; 0 classes for none."""
        super().reset_classifier(num_classes, global_pool)
        self.fc = self._cosines()


@register_model  # type: ignore[untyped-decorator]
def resnet50_cosine(pretrained: bool = False, **kwargs: Any) -> CosineResNet:
    """ResNet-50 with a cosine classifier: the LDAM teacher of DeiT-LT on ImageNet-LT and iNaturalist."""
    arguments = {"block": Bottleneck, "layers": (3, 4, 6, 3), **kwargs}
    model: CosineResNet = build_model_with_cfg(CosineResNet, "resnet50_cosine", pretrained, **arguments)
    return model
