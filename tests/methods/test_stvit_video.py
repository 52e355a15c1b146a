"""Clips: every frame by itself, then a mean."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from pyvitfast.tokens import PerFrame


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("stvit_deit_tiny_16", {"img_size": 64, "patch_size": 8, "depth": 6, "base": 2}),
        ("stvit_swin_tiny", {"embed_dim": 8, "num_heads": (1, 1, 2, 2), "img_size": 64}),
        ("stvit_r_swin_tiny", {"embed_dim": 8, "num_heads": (1, 1, 2, 2), "img_size": 64}),
    ],
)
def test_a_clip_is_the_mean_of_its_frames(name, arguments):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **arguments).double().eval()
    clip = torch.randn(2, 3, 3, 64, 64).double()
    # The classifier is linear, so the mean of logits is the logits of the mean.
    expected = torch.stack([model(clip[:, t]) for t in range(3)], dim=1).mean(dim=1)
    torch.testing.assert_close(PerFrame(model)(clip), expected, rtol=0, atol=1e-12)
    still = clip[:, :1].expand(-1, 3, -1, -1, -1)
    torch.testing.assert_close(PerFrame(model)(still), model(clip[:, 0]), rtol=0, atol=1e-12)


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="STViT"):
        PerFrame(nn.Linear(2, 2))
    model = timm.create_model("stvit_deit_tiny_16", img_size=64, patch_size=8, depth=6, base=2)
    for clip in (torch.zeros(1, 3, 64, 64), torch.zeros(1, 0, 3, 64, 64)):
        with pytest.raises(ValueError, match=r"\[B, T, C, H, W\]"):
            PerFrame(model)(clip)
