"""Semantic tokens of each frame of a clip."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pyvitfast.models.stvit import SemanticTokensMixin
from pyvitfast.models.stvit_swin import STViTSwin


class PerFrame(nn.Module):
    """A model with semantic tokens on clips: tokens are made for each frame, features averaged over frames.

    Args:
        model: an STViT, STViT-Swin or STViT-R-Swin; it becomes the submodule ``model``.

    Raises:
        TypeError: another model.

    Source:
        STViT (Chang et al., CVPR 2023), section 4.4: windows of two dimensions, frame by frame. Nothing else
        is specified; there is no attention across frames here, and the mean over frames is ours.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not isinstance(model, SemanticTokensMixin | STViTSwin):
            raise TypeError(
                f"PerFrame: `model` must be an STViT, STViT-Swin or STViT-R-Swin, got {type(model).__name__}."
            )
        self.model = model

    def forward_features(self, x: Tensor) -> Tensor:
        """Clips [B, T, C, H, W] to the features of the model, [B, T, ...].

        Raises:
            ValueError: not five dimensions, or no frame.
        """
        if x.ndim != 5 or x.shape[1] < 1:
            raise ValueError(
                f"PerFrame: clips must have shape [B, T, C, H, W] with T at least 1, got {list(x.shape)}."
            )
        model: Any = self.model
        features: Tensor = model.forward_features(x.flatten(0, 1))
        return features.view(*x.shape[:2], *features.shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        """Clips [B, T, C, H, W] to logits [B, classes]: a mean over frames, before the classifier."""
        model: Any = self.model
        features = self.forward_features(x)
        pooled: Tensor = model.forward_head(features.flatten(0, 1), pre_logits=True)
        logits: Tensor = model.get_classifier()(pooled.view(*x.shape[:2], -1).mean(dim=1))
        return logits
