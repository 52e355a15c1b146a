from __future__ import annotations

import signal

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models.swin_transformer import SwinTransformer

import pyvitfast as vf
from pyvitfast.train.data import ImageSplit
from pyvitfast.train.loop import Loop
from pyvitfast.train.savings import Costs, Saving, operations_to, saving, update_flops
from tests.train.conftest import metrics, start, stopping_after

TINY = ("--epochs", 2, "--finetune-epochs", 2, "--batch-size", 100, "--device", "cpu", "--operator-steps", 3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Output folder and terminal output of a run that nothing disturbed."""
    from typer.testing import CliRunner

    from pyvitfast.cli import app

    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("grow") / "run"
    arguments = ["grow", *TINY, "--compare", "--rank", "2", "--out", out]
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_events_report_and_a_larger_model(whole):
    out, printed = whole
    events = metrics(out)
    kinds = [e["event"] for e in events]
    assert kinds == [*["epoch"] * 2, "dense", *["epoch"] * 2, "grown", *["epoch"] * 2, "saving", "result"]
    assert [e.get("arm") for e in events if e["event"] == "epoch"] == [None] * 2 + ["scratch"] * 2 + [
        "mango"
    ] * 2
    flops = events[5]["flops"]
    small, big = (vf.load(out / f"{name}.safetensors") for name in ("dense", "model"))
    assert flops["update"] == 6 * vf.summary(big).macs * 100
    assert flops["source"] == 2 * 13 * 6 * vf.summary(small).macs * 100
    assert 3 * flops["update"] < flops["operator"] < 6 * flops["update"]
    assert big.embed_dim == 2 * small.embed_dim
    page = (out / "report.html").read_text()
    for heading in ("Accuracy and loss by training operations", "Training operations saved"):
        assert heading in page
    assert "Sizes beside the source" in page
    assert "Training operations saved" in printed
    assert "vit_micro_patch2_8 to vit_micro_wide_patch2_8" in printed
    assert (out / "report-growth.png").is_file()
    assert "mango (width mango, depth stack" in printed


@pytest.fixture
def no_report(monkeypatch):
    """Reports measure latencies for seconds; runs that are about weights go without."""
    monkeypatch.setattr("pyvitfast.cli._report", lambda outcome: None)


# In the training of the source, of the target from scratch, and of the grown one.
@pytest.mark.parametrize("batches", [20, 30, 70])
def test_a_stopped_run_goes_on_to_the_same_bits(whole, no_report, tmp_path, cli, monkeypatch, batches):
    out = tmp_path / "run"
    with stopping_after(batches, monkeypatch):
        result = cli("grow", *TINY, "--compare", "--rank", 2, "--out", out)
    assert result.exit_code == 128 + signal.SIGINT, result.output
    result = cli("grow", "--resume", "--out", out)
    assert result.exit_code == 0, result.output
    mine, theirs = (load_file(path / "model.safetensors") for path in (out, whole[0]))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    keep = ("event", "train_loss", "top1")
    one, other = ([{k: e.get(k) for k in keep} for e in metrics(path)] for path in (out, whole[0]))
    assert one == other


@pytest.mark.parametrize("compare", [(), ("--compare",)])
def test_a_signal_ends_the_training_of_the_operator(whole, no_report, tmp_path, cli, monkeypatch, compare):
    options = ("--source", whole[0] / "dense.safetensors", *TINY, "--finetune-epochs", 1, *compare)
    assert cli("grow", *options, "--out", tmp_path / "whole").exit_code == 0
    stream = Loop.stream

    def interrupted(self, stage, epoch):
        for place, batch in enumerate(stream(self, stage, epoch)):
            if place == 1:
                signal.raise_signal(signal.SIGTERM)
            assert place < 2, "the signal was not heeded"
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "stream", interrupted)
        result = cli("grow", *options, "--out", tmp_path / "o")
    assert result.exit_code == 128 + signal.SIGTERM, result.output
    assert cli("grow", "--resume", "--out", tmp_path / "o").exit_code == 0
    assert metrics(tmp_path / "o") == metrics(tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("o", "whole"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert '"event": "start"' in (tmp_path / "o" / "metrics.jsonl").read_text()


def test_the_operator_is_not_trained_anew_by_another_number_of_processes(whole, tmp_path, cli, monkeypatch):
    def interrupted(self, stage, epoch):
        signal.raise_signal(signal.SIGTERM)
        yield from stream(self, stage, epoch)

    stream, out = Loop.stream, tmp_path / "o"
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "stream", interrupted)
        result = cli("grow", "--source", whole[0] / "dense.safetensors", *TINY, "--out", out)
    assert result.exit_code == 128 + signal.SIGTERM, result.output
    process = start("grow", "--resume", "--out", out, processes=2)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "--resume: the run used 1 process(es), now there are 2. Start as many." in stderr
    assert not (out / "grown.safetensors").exists()


def test_growth_in_steps(whole, no_report, tmp_path, cli):
    """The outcome of a run is the source of the next, whichever rule made it."""
    steps = (("average", 72, 6), ("fpi", 144, 12), ("mango", 288, 24))
    source, accuracies = whole[0] / "dense.safetensors", []
    for method, width, heads in steps:
        big = timm.create_model("vit_micro_patch2_8", embed_dim=width, num_heads=heads)
        vf.save(big, tmp_path / "target.safetensors")
        options = ("--method", method, "--grow-noise", 0, "--operator-steps", 0, "--finetune-epochs", 0)
        files = ("--source", source, "--target", tmp_path / "target.safetensors", "--out", tmp_path / method)
        result = cli("grow", *options, *files, "--device", "cpu")
        assert result.exit_code == 0, result.output
        source = tmp_path / method / "model.safetensors"
        accuracies += [e["top1"] for e in metrics(tmp_path / method) if e["event"] in ("dense", "grown")]
    assert len(accuracies) == 6
    assert max(accuracies) - min(accuracies) <= 0.3  # an image of 497


def test_swin_grows_by_a_trained_operator(tmp_path, cli):
    small = {"img_size": 16, "patch_size": 2, "window_size": 4, "in_chans": 1, "num_classes": 10}
    for name, width, heads in (("small", 8, (1, 2)), ("big", 16, (2, 4))):
        model = SwinTransformer(embed_dim=width, depths=(2, 2), num_heads=heads, **small)
        vf.save(model, tmp_path / f"{name}.safetensors")
    files = ("--source", tmp_path / "small.safetensors", "--target", tmp_path / "big.safetensors")
    for method in ("mango", "ligo"):
        out = tmp_path / method
        result = cli("grow", *files, *TINY, "--finetune-epochs", 1, "--method", method, "--out", out)
        assert result.exit_code == 0, result.output
        (grown,) = (e for e in metrics(out) if e["event"] == "grown")
        assert grown["flops"]["operator"] > 3 * grown["flops"]["update"]
        assert vf.load(out / "model.safetensors").num_features == 32


def test_all_see_images_as_the_source_had_them(image_folder, no_report, tmp_path, cli, monkeypatch):
    small = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1, num_classes=2)
    vf.save(small, tmp_path / "small.safetensors")
    seen, fit_to = [], ImageSplit.fit_to

    def recorded(self, *args, **kwargs):
        fit_to(self, *args, **kwargs)
        seen.append(tuple(self.transform.transforms[-1].mean.tolist()))

    monkeypatch.setattr(ImageSplit, "fit_to", recorded)
    target = ("--target", "vit_tiny_patch16_224", "--set", "img_size=32", "--set", "workers=0")
    options = ("--method", "fpi", "--data", image_folder, "--batch-size", 4, "--finetune-epochs", 1)
    source = ("--source", tmp_path / "small.safetensors", "--device", "cpu")
    result = cli("grow", *source, *target, *options, "--compare", "--out", tmp_path / "o")
    assert result.exit_code == 0, result.output
    assert len(seen) == 4
    for mean in seen:
        assert mean == pytest.approx(small.pretrained_cfg["mean"])
    assert "Images stay normalised as for the source" in result.output
    big = vf.load(tmp_path / "o" / "model.safetensors")
    assert big.pretrained_cfg["architecture"] == "vit_tiny_patch16_224"
    for key in ("mean", "std"):
        assert big.pretrained_cfg[key] == small.pretrained_cfg[key]


def test_more_layers_are_reported_and_drop_path_is_the_targets(whole, tmp_path, cli):
    vf.save(timm.create_model("vit_micro_patch2_8", depth=6), tmp_path / "deep.safetensors")
    source = ("--source", whole[0] / "dense.safetensors", "--finetune-epochs", 0, "--device", "cpu")
    options = ("--method", "stack", "--target", tmp_path / "deep.safetensors", "--out", tmp_path / "deep")
    result = cli("grow", *source, *options)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "deep" / "report-widths.png").is_file()
    options = ("--method", "fpi", "--set", "drop_path=0.3", "--out", tmp_path / "wide")
    assert cli("grow", *source, *options).exit_code == 0
    big = vf.load(tmp_path / "wide" / "model.safetensors")
    assert big.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)


def test_operator_sees_all_images_of_an_update(whole, no_report, tmp_path, cli, monkeypatch):
    seen = []
    stream = Loop.stream

    def counted(self, stage, epoch):
        for batch in stream(self, stage, epoch):
            seen.append(len(batch[0]))
            yield batch

    monkeypatch.setattr(Loop, "stream", counted)
    options = ("--grad-accum-steps", 2, "--batch-size", 100, "--operator-steps", 3, "--finetune-epochs", 0)
    source = ("--source", whole[0] / "dense.safetensors", "--device", "cpu")
    assert cli("grow", *source, *options, "--out", tmp_path / "o").exit_code == 0
    assert seen == [100] * 6
    (grown,) = (e for e in metrics(tmp_path / "o") if e["event"] == "grown")
    assert (
        grown["flops"]["update"] == 6 * 200 * vf.summary(vf.load(tmp_path / "o" / "model.safetensors")).macs
    )


def test_what_cannot_be_compared_is_refused(whole, refused, tmp_path):
    model = whole[0] / "model.safetensors"
    line = refused("grow", "--compare", "--target", model, "--out", tmp_path / "o")
    assert "--compare goes with a timm name for --target" in line
    line = refused("grow", "--compare", "--finetune-epochs", 0, "--out", tmp_path / "o")
    assert "--compare needs --finetune-epochs of at least 1" in line


def test_a_fixed_rule_without_noise_keeps_the_accuracy(whole, no_report, tmp_path, cli):
    out = tmp_path / "run"
    result = cli(
        "grow", "--source", whole[0] / "dense.safetensors", "--method", "fpi", "--grow-noise", 0,
        "--finetune-epochs", 0, "--device", "cpu", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    events = metrics(out)
    assert [e["event"] for e in events] == ["dense", "grown", "result"]
    assert events[0]["top1"] == events[1]["top1"] == events[2]["model"]["top1"]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--target", "vit_micro_patch3"), "--target vit_micro_patch3: no such timm model"),
        (
            ("--source", "vit_micro_wide_patch2_8", "--target", "vit_micro_patch2_8"),
            "dim of blocks must be no smaller",
        ),
        (("--target", "crossvit_tiny_240"), "--target crossvit_tiny_240"),
        (("--method", "magic"), "--method must be a known name, got 'magic'"),
        (("--method", "average", "--depth", "top"), "`depth` must be one of"),
        (("--rank", "0"), "--rank must be at least 1"),
        (("--method", "fpi", "--width", "aki"), "`width` must be left out"),
    ],
)
def test_wrong_pairs_and_flags_are_refused_before_training(flags, line, refused, tmp_path):
    assert line in refused("grow", *flags, "--out", tmp_path / "o")


class TestSaving:
    """By hand."""

    scratch = ((10, 50.0), (20, 60.0), (30, 70.0), (40, 70.0))

    def test_operator_and_small_model_are_charged(self):
        # Scratch is at its 70 after 30 updates of 2, the arm after 10, and 8 of the operator.
        found = saving(self.scratch, ((0, 40.0), (10, 71.0)), Costs(2.0, operator=8.0, source=16.0), last=2)
        assert found == Saving(70.0, (60 - 28) / 60, (60 - 44) / 60, scratch=60.0, spent=28.0)
        assert "saves 53 %" in str(found)

    def test_as_good_at_once(self):
        assert saving(self.scratch, ((0, 90.0),), Costs(2.0), last=1).excl_small == 1

    def test_never_as_good(self):
        found = saving(self.scratch, ((10, 69.0),), Costs(2.0), last=1)
        assert found.excl_small is found.incl_small is found.spent is None
        assert "did not reach" in str(found)

    def test_training_of_a_source_from_a_file_is_not_known(self):
        found = saving(self.scratch, ((10, 70.0),), Costs(2.0), last=1)
        assert found.excl_small == pytest.approx(2 / 3)
        assert found.incl_small is None
        assert "small model" not in str(found)

    def test_goal_is_no_higher_than_equal_accuracies(self):
        assert sum([0.1] * 3) / 3 > 0.1
        assert saving([(i, 0.1) for i in (1, 2, 3)], (), Costs(1.0), last=3).goal == 0.1

    def test_mean_of_the_last_evaluations(self):
        assert saving(self.scratch, (), Costs(1.0), last=3).goal == pytest.approx(200 / 3)
        with pytest.raises(ValueError, match="at least one evaluation"):
            saving((), (), Costs(1.0))

    def test_figures_of_the_ligo_paper(self):
        """BERT-Base: scratch at 389k steps, LiGO at 215k and 100 steps of its operator, 44.7 %."""
        found = saving(((389e3, 1.0),), ((215e3, 1.0),), Costs(1.5068e13, operator=100 * 1.5068e13), last=1)
        assert found.excl_small == pytest.approx(0.447, abs=0.001)

    def test_first_evaluation_counts(self):
        assert operations_to(self.scratch, 60.0) == 20
        assert operations_to(self.scratch, 71.0) is None

    @pytest.mark.parametrize(("size", "macs"), [("tiny", 1.254e9), ("small", 4.599e9), ("base", 17.564e9)])
    def test_multiply_adds_that_are_counted(self, size, macs):
        with torch.device("meta"):
            model = timm.create_model(f"deit_{size}_patch16_224")
        assert vf.summary(model).macs == pytest.approx(macs, abs=5e5)

    def test_an_update_is_a_forward_and_a_backward_pass(self):
        assert update_flops(1000, 8) == 6 * 1000 * 8
