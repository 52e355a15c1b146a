"""The STViT benchmarks: token merging by hand, equal MACs, claims read right."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from benchmarks.papers import stvit, tome
from pyvitfast.models.summary import summary

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 3, "num_heads": 2, "num_classes": 5}


def test_the_most_similar_pair_becomes_its_weighted_mean():
    # Tokens 0, 2 look for partners among 1, 3; 2 and 3 point the same way.
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [5.0, 5.0]]])
    size = torch.tensor([[[1.0], [1.0], [3.0], [1.0]]])
    merged, sizes = tome.merge(x, x, size, 1, 0)
    torch.testing.assert_close(merged, torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.75, 2.75]]]))
    assert sizes.flatten().tolist() == [1, 1, 4]


def test_a_class_token_is_never_merged():
    x = torch.ones(1, 5, 3)
    merged, sizes = tome.merge(x, x, torch.ones(1, 5, 1), 5, 1)
    assert merged.shape == (1, 3, 3)
    assert sizes[0, 0] == 1
    assert sizes.sum() == 5


def test_merging_nothing_is_the_plain_model():
    torch.manual_seed(0)
    model = VisionTransformer(**SMALL).double().eval()
    x = torch.randn(2, 3, 16, 16).double()
    expected = model(x)
    model.__class__ = tome.MergingViT
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    assert tome.macs(model, 0) == summary(VisionTransformer(**SMALL)).macs
    model.r = 2
    assert model.forward_features(x).shape[1] == 17 - 6


@pytest.mark.parametrize("part", ["near", "fashion"])
@pytest.mark.parametrize("arm", stvit.ARMS)
def test_arms_cost_the_same(part, arm):
    setting = stvit.SETTINGS[part]
    few = stvit.counted("avg", setting)
    if arm == "plain":
        assert stvit.counted(arm, setting) > 1.8 * few
    else:
        assert stvit.counted(arm, setting) == pytest.approx(few, rel=0.05)
    model = stvit.network(arm, setting, 0)
    assert model(torch.randn(2, 1, setting.side, setting.side)).shape == (2, 10)


def test_images_stay_on_the_canvas():
    setting = stvit.SETTINGS["far"]
    x = torch.zeros(50, 1, 16, 16)
    x[:, :, 8, 8] = 100.0
    canvas = stvit.rendered(x, setting, torch.Generator().manual_seed(0))
    assert canvas.shape == (50, 1, 32, 32)
    places = (canvas.flatten(1).argmax(1) // 32, canvas.flatten(1).argmax(1) % 32)
    for place in places:
        assert place.min() >= 16 - 6
        assert place.max() <= 16 + 6
        assert len(place.unique()) > 6


def test_claims():
    rows = [{"part": "near", "arm": arm, "accuracy": [50.0, 60.0]} for arm in stvit.ARMS]
    rows[list(stvit.ARMS).index("learned")]["accuracy"] = [60.0, 61.0]
    rows[list(stvit.ARMS).index("G only")]["accuracy"] = [56.0, 60.0]
    rows += [{"part": "speed", "arm": "semantic tokens", "batch": 1, "ratio": 1.9}]
    found = {c["claim"]: (c["measured"], c["held"]) for c in stvit.claims(rows)}
    assert found["near: learned at least as good as plain"] == (5.5, True)
    assert found["near: G alone is worst"] == (-3.0, False)
    assert found["semantic tokens at least twice as fast, batch 1"] == (1.9, False)
