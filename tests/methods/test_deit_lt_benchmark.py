"""The DeiT-LT benchmark: the data of the digest, models of its sizes, gates read right."""

from __future__ import annotations

import pytest
import torch

from benchmarks.papers import deit_lt


def test_data_of_the_digest():
    split = deit_lt.long_tailed("digits", 0)
    sources = [120, 86, 61, 44, 31, 22, 16, 11, 8, 6]
    assert split.counts == [4 * n for n in sources]
    assert split.train_y.bincount().tolist() == split.counts
    assert split.train_x.shape == (1620, 3, 12, 12)
    assert split.test_y.bincount().tolist() == [200] * 10
    other = deit_lt.long_tailed("digits", 1)
    assert torch.equal(split.test_y, other.test_y)
    assert not torch.equal(split.train_x, other.train_x)


def test_no_image_is_in_both_splits(monkeypatch):
    monkeypatch.setattr(deit_lt, "placed", lambda images, source, generator: images)
    split = deit_lt.long_tailed.__wrapped__("digits", 0)
    train, test = (x.flatten(1).unique(dim=0) for x in (split.train_x, split.test_x))
    assert len(train) == 405
    assert len(test) == 500
    # Scikit-learn's digits hold no image twice.
    assert len(torch.cat([train, test]).unique(dim=0)) == 905


def test_models_of_the_digests_sizes():
    model = deit_lt.VisionTransformerDistilled(img_size=12, **deit_lt.SHAPE)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(89_000, rel=0.01)
    for kind in deit_lt.TEACHERS:
        cnn = deit_lt.network(kind)
        assert sum(p.numel() for p in cnn.parameters()) == pytest.approx(44_000, rel=0.01)
        assert cnn.forward_features(torch.zeros(1, 3, 12, 12)).shape == (1, 48, 3, 3)


@pytest.mark.parametrize("arm", ["ViT, balanced softmax", "DeiT-LT, LDAM + SAM"])
def test_an_epoch_of_a_student(arm):
    deit_lt.seeded(0)
    split = deit_lt.long_tailed("digits", 0)
    cnn = deit_lt.teacher("LDAM + SAM", split, 1) if "DeiT" in arm else None
    found = deit_lt.tested(deit_lt.student(arm, split, 1, cnn), split)
    assert set(found) == ({"cls"} if cnn is None else {"cls", "dist", "avg"})
    assert all(0 <= value <= 100 for value in found["cls"].values())


def test_gates_are_read_by_their_worst_seed():
    def row(arm, output, tail, overall=(50.0, 50.0)):
        return {
            "data": "digits",
            "role": "student",
            "arm": arm,
            "output": output,
            "tail": tail,
            "overall": overall,
        }

    rows = [
        row(deit_lt.OURS, "avg", [25.0, 15.0], [62.0, 57.0]),
        row(deit_lt.OURS, "dist", [45.0, 41.0]),
        row(deit_lt.PACO, "avg", [15.0, 15.0]),
        row(deit_lt.PACO, "dist", [39.0, 52.0]),
        row("no DRW", "avg", [4.0, 6.0]),
        row("no DRW", "dist", [10.0, 21.0]),
        row("DeiT", "avg", [0.0, 0.0]),
        row("ViT", "cls", [0.0, 1.0]),
    ]
    held = {claim["claim"]: (claim["measured"], claim["held"]) for claim in deit_lt.claims(rows)}
    assert held["digits: tail of DeiT-LT's average 10 points over no DRW, worst seed"] == (9.0, False)
    assert held["digits: tail of DeiT-LT's average 10 points over DeiT, worst seed"] == (15.0, True)
    assert held["digits: DIST tail of DeiT-LT, LDAM + SAM above 40, worst seed"] == (41.0, True)
    assert held["digits: DIST tail of DeiT-LT, PaCo + SAM above 40, worst seed"] == (39.0, False)
    over = "digits: tail of the average of DeiT-LT, PaCo + SAM 10 points over no DRW, worst seed"
    assert held[over] == (9.0, False)
    assert held["digits: DIST tail without DRW below 20, worst seed"] == (21.0, False)
    assert held["digits: DRW raises the average's overall accuracy by 8 points, worst seed"] == (7.0, False)
