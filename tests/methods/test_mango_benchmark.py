from __future__ import annotations

import torch

from benchmarks.papers import mango


def test_every_arm_runs_and_is_a_function_of_its_seed():
    for method in mango.ARMS:
        one, other = (mango.arm(("width", "digits", method, 0, 0.01)) for _ in range(2))
        assert one == other
        assert (method.startswith("scratch")) == ("costs" not in one)
        assert one["curve"][-1][0] >= 6


def test_exact_growth_starts_where_the_source_ended():
    setting = mango.SETTINGS["width"]
    small = mango.source_of(setting, "digits", 1, 0.1)
    big = mango.grow(small, mango.network(setting.target, "digits", 1), method="fpi", noise=0.0)
    split = mango.images("digits", 1)
    with torch.no_grad():
        small.eval(), big.eval()
        torch.testing.assert_close(big(split.test_x), small(split.test_x), rtol=1e-4, atol=1e-4)


def test_claims():
    def row(arm, accuracy, saved):
        return {"part": "width", "arm": arm, "accuracy": accuracy, "saving": saved}

    rows = [
        row("scratch", [90.0, 92.0], []),
        row("fpi", [93.0, 93.0], [30.0, 40.0]),
        row("aki", [91.0, 92.0], [30.0, 10.0]),
        row("ligo", [95.0, 95.0], [30.0, None]),
        row("mango R=1", [95.0, 95.0], [25.0, 25.0]),
    ]
    held = [claim["held"] for claim in mango.claims(rows)]
    assert held == [True, True, False, False, True, False, True, True]
    assert mango.claims([]) == []


def test_each_image_is_moved_by_itself():
    x, y = next(mango.Batches("digits", 0))
    index = torch.randint(
        len(mango.images("digits", 0).train_y), (mango.BATCH,), generator=torch.Generator().manual_seed(0)
    )
    split = mango.images("digits", 0)
    assert torch.equal(y, split.train_y[index])
    padded = torch.nn.functional.pad(split.train_x[index], (1, 1, 1, 1))
    moves = set()
    for image, whole in zip(x, padded, strict=True):
        found = [
            (i, j) for i in range(3) for j in range(3) if torch.equal(image, whole[:, i : i + 8, j : j + 8])
        ]
        assert found
        moves.add(found[0])
    assert len(moves) == 9
