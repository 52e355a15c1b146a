"""The CrossViT benchmarks on tiny shapes: all candidates compute the same, claims are read right."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import timm
import torch
from timm.models.vision_transformer import Block

from benchmarks.measure import error, flat, saved_bytes
from benchmarks.ops.linear_cross_attention import PEERS, Shape, build
from benchmarks.papers.crossvit import accuracy, models, stage
from benchmarks.papers.data import Images
from pyvitfast.models import ViTConfig, accelerate

PLAIN = tuple(PEERS)


@pytest.mark.parametrize("norm", [False, True], ids=["module", "with norm"])
@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_all_forms_of_the_op_agree(direction, norm):
    case = build("cpu", Shape("tiny", 7, 12, 3), 2, direction, norm=norm, peers=PLAIN)
    expected = [t.double() for t in flat(case.expected())]
    # Query, tokens and all weights but the key bias; or the result.
    assert len(expected) == (1 if direction == "forward" else 9 + 2 * norm)
    for run in (case.ours, *(peer.run for peer in case.peers.values())):
        assert error(flat(run()), expected) < case.tolerance


def test_bytes_and_operations_of_the_op_by_hand():
    case = build("cpu", Shape("tiny", 7, 12, 3), 2, peers=PLAIN)
    assert case.least_bytes == 4 * (2 * 7 * 12 + 4 * 12 * 12 + 4 * 12 + 2 * 12)
    assert case.flops == 2 * 2 * (2 * 7 * 12 * 3 + 4 * 12 * 12)


def test_saved_bytes_of_timms_module_by_hand():
    case = build("cpu", Shape("tiny", 7, 12, 3), 2, "both", peers=PLAIN)
    # The copies that the products make of keys and values; query, attention, and what the last layer reads.
    assert saved_bytes(case.forwards["eager"], case.given) == 4 * 2 * (2 * 7 * 12 + 12 + 3 * 7 + 12)


class TestStage:
    @pytest.mark.parametrize("direction", ["forward", "both"])
    def test_both_sides_agree_again_and_again(self, direction):
        with stage.empty_blocks():
            case = stage.build("crossvit_tiny_240", 2, direction)
            expected = case.expected()
            for run in (case.ours, case.ours, case.peers["eager"].run):
                case.before()
                assert error(flat(run()), expected) < case.tolerance

    def test_inference_stores_class_tokens_in_place(self):
        """As in a whole model, where a block has just made the tensor; an Identity would send ours round."""
        with stage.empty_blocks():
            case = stage.build("crossvit_tiny_240", 1, "forward")
            case.before()
            given = case.given[:2]
            before = [t.clone() for t in given]
            outs = case.ours()
            assert [o.data_ptr() for o in outs] == [t.data_ptr() for t in given]
            assert all(torch.equal(o[:, 1:], b[:, 1:]) for o, b in zip(outs, before))
            case.before()
            assert all(torch.equal(t, b) for t, b in zip(given, before))

    def test_blocks_are_whole_again_afterwards(self):
        forward = Block.forward
        with stage.empty_blocks():
            assert Block.forward is not forward
        assert Block.forward is forward

    def test_claims_are_about_batch_32(self):
        rows = [
            {"case": f"m batch {batch}", "direction": d, "ratio_eager": 6.0, "saved_ratio": 11.0}
            for batch in (1, 32)
            for d in ("forward", "both")
        ]
        assert [claim["held"] for claim in stage.claims(rows)] == [False, True, True]


class TestModels:
    @pytest.fixture
    def sides(self):
        torch.manual_seed(0)
        theirs = stage.perturb(timm.create_model("crossvit_tiny_240", num_classes=10)).eval()
        ours = copy.deepcopy(theirs)
        accelerate(ours)
        return {"timm": theirs, "ours": ours}

    def test_parts_of_the_time(self, sides):
        x = torch.randn(1, 3, 240, 240)
        with torch.inference_mode():
            expected = sides["timm"](x)
            for model in sides.values():
                parts = models.parts_of(model, x)
                assert set(parts) == set(models.PARTS)
                assert all(value > 0 for value in parts.values())
                assert parts["large blocks"] > parts["resize"]
                # The stopwatch is gone and changed nothing.
                torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
            shares = models.shares(sides, x, 1)
        assert all(sum(found.values()) == pytest.approx(1) for found in shares.values())

    def test_claims(self):
        rows = [{"model": "m", "batch": 1, "ratio": {"eager": 0.98}}, {"model": "m", "batch": 4, "ratio": {}}]
        claims = models.claims(rows)
        assert [(claim["held"], claim["measured"]) for claim in claims] == [(False, 0.98), (False, None)]


class TestAccuracy:
    @pytest.mark.parametrize("name", accuracy.TASKS)
    def test_deit_has_equal_macs(self, name):
        config = accuracy.TASKS[name].crossvit
        model = accuracy.deit(config)
        assert ViTConfig.from_model(model).macs() == pytest.approx(config.macs(), rel=0.03)
        assert model(torch.zeros(1, 1, *config.img_size)).shape == (1, 10)

    def test_no_deit_of_that_size(self):
        config = replace(accuracy.TASKS["digits"].crossvit, embed_dim=(4, 4))
        with pytest.raises(ValueError, match="off in MACs"):
            accuracy.deit(config)

    def test_logits_are_the_mean_of_the_heads(self):
        model = accuracy.TASKS["digits"].crossvit.build().eval()
        x = torch.randn(3, 1, 8, 8)
        heads = [accuracy.Branch(model, i)(x) for i in range(2)]
        torch.testing.assert_close(sum(heads) / 2, model(x))

    @pytest.mark.parametrize("arm", [accuracy.DEIT, *accuracy.FUSIONS])
    def test_each_arm_trains(self, arm):
        task = accuracy.TASKS["digits"]
        x, y = torch.randn(20, 1, 8, 8), torch.arange(20) % 10
        row = accuracy.train_arm(task, accuracy.arms(task.crossvit)[arm], Images(x, y, x, y), 1, 0)
        assert {"seed", "top1", "params", "macs", "macs_unfolded"} <= set(row)
        assert (arm == accuracy.DEIT) == ("small" not in row)

    def test_claims_are_paired_by_seed(self):
        def rows(*top1):
            return [{"top1": value, "small": value, "large": value} for value in top1]

        arms = {name: rows(80.0, 90.0) for name in (accuracy.DEIT, *accuracy.FUSIONS)}
        arms["cross_attention"] = rows(82.0, 91.0)
        found = accuracy.claims("digits", {"arms": arms})
        assert [claim["measured"] for claim in found] == [1.5] * 6 + [-1.5]
        assert [claim["held"] for claim in found] == [True] * 6 + [False]
        assert found[0]["spread"] == pytest.approx(0.5**0.5)


def test_command_line_refuses_nonsense():
    from benchmarks.papers.crossvit.__main__ import main

    for bad in (
        ["--seeds", "0"],
        ["--threads", "0"],
        ["--batch", "0"],
        ["--epochs", "0"],
        ["--part", "speed"],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(bad)
        assert stopped.value.code == 2
