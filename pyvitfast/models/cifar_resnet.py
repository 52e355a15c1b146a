"""The small residual networks for 32-pixel images, registered with timm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

_CFG = {
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2023, 0.1994, 0.2010),
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "first_conv": "conv1",
    "classifier": "fc",
}
_DEPTHS = {"resnet20_cifar": 3, "resnet32_cifar": 5, "resnet44_cifar": 7, "resnet56_cifar": 9}
default_cfgs = generate_default_cfgs({f"{name}.untrained": _CFG for name in _DEPTHS})


class CosineClassifier(nn.Module):
    """Cosines of features and class vectors, in [-1, 1]; no bias and no scale, which is the loss's.

    Args:
        in_features: width D of the features.
        classes: C.

    Source:
        The classifier of LDAM (Cao et al., NeurIPS 2019).
    """

    def __init__(self, in_features: int, classes: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, classes
        # Unit vectors: a step turns a vector by an angle that goes with one over its length.
        self.weight = nn.Parameter(F.normalize(torch.randn(classes, in_features)))

    def forward(self, features: Tensor) -> Tensor:
        """Cosines [B, C] of features [B, D]."""
        return F.linear(F.normalize(features), F.normalize(self.weight))

    def extra_repr(self) -> str:
        """Sizes."""
        return f"in_features={self.in_features}, classes={self.out_features}"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters: strided, with zeros for new channels."""

    def __init__(self, in_chans: int, chans: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, chans, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(chans)
        self.conv2 = nn.Conv2d(chans, chans, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(chans)
        self.stride, self.added = stride, chans - in_chans

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C', H / stride, W / stride], sides rounded up."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1 or self.added:
            before = self.added // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.added - before))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """ResNet with three stages, by default of 16, 32 and 64 channels, and shortcuts of type A.

    Args:
        depth: blocks in a stage.
        num_classes: classes; 0 gives features.
        in_chans: channels of the images.
        cosine: a :class:`CosineClassifier`, whose logits are cosines, in place of a linear one.
        drop_rate: dropout before the classifier.
        width: channels of the first stage; the next have twice and four times as many.

    Source:
        He et al., CVPR 2016, section 4.2. Convolutions are drawn as in He et al., ICCV 2015.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        in_chans: int = 3,
        cosine: bool = False,
        drop_rate: float = 0.0,
        width: int = 16,
    ) -> None:
        super().__init__()
        self.num_classes, self.cosine, self.drop_rate = num_classes, cosine, drop_rate
        self.num_features = self.head_hidden_size = 4 * width
        self.conv1 = nn.Conv2d(in_chans, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, depth, 1)
        self.layer2 = _stage(width, 2 * width, depth, 2)
        self.layer3 = _stage(2 * width, 4 * width, depth, 2)
        self.fc = self._classifier()
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def _classifier(self) -> nn.Module:
        if not self.num_classes:
            return nn.Identity()
        kind = CosineClassifier if self.cosine else nn.Linear
        return kind(self.num_features, self.num_classes)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a fresh classifier of the same kind in place; 0 classes for none.

        Raises:
            ValueError: another pooling than ``"avg"``.
        """
        if global_pool not in (None, "avg"):
            raise ValueError(
                f"CifarResNet.reset_classifier: `global_pool` must be 'avg' or None, got {global_pool!r}."
            )
        self.num_classes = num_classes
        self.fc = self._classifier().to(self.conv1.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] to the last stage's map [B, 4 width, H / 4, W / 4]."""
        x = F.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.layer3(self.layer2(self.layer1(x)))
        return out

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool a map to features [B, 4 width], and classify them unless ``pre_logits``."""
        x = F.dropout(x.mean((2, 3)), self.drop_rate, self.training)
        if pre_logits:
            return x
        out: Tensor = self.fc(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, in_chans, H, W], sides of at least 8 pixels."""
        return self.forward_head(self.forward_features(x))


def _stage(in_chans: int, chans: int, depth: int, stride: int) -> nn.Sequential:
    blocks = [BasicBlock(in_chans, chans, stride)]
    blocks += [BasicBlock(chans, chans, 1) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)


def _create(name: str, pretrained: bool, given: dict[str, Any]) -> CifarResNet:
    model: CifarResNet = build_model_with_cfg(
        CifarResNet, name, pretrained, **{"depth": _DEPTHS[name], **given}
    )
    return model


@register_model  # type: ignore[untyped-decorator]
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20 for CIFAR: 0.27 M parameters."""
    return _create("resnet20_cifar", pretrained, kwargs)


@register_model  # type: ignore[untyped-decorator]
def resnet32_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32 for CIFAR: 0.46 M parameters. The CIFAR teacher of DeiT-LT."""
    return _create("resnet32_cifar", pretrained, kwargs)


@register_model  # type: ignore[untyped-decorator]
def resnet44_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-44 for CIFAR: 0.66 M parameters."""
    return _create("resnet44_cifar", pretrained, kwargs)


@register_model  # type: ignore[untyped-decorator]
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-56 for CIFAR: 0.85 M parameters."""
    return _create("resnet56_cifar", pretrained, kwargs)
