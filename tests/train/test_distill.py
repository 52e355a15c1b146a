from __future__ import annotations

import json
import signal

import pytest
import timm
import torch
from typer.testing import CliRunner

import pyvitfast as vf
from pyvitfast.cli import app
from pyvitfast.train import Settings, UserError, open_data, resolve
from pyvitfast.train.distill import make_teacher
from tests.train.conftest import metrics, stopping_after

# 9 updates an epoch, of the teacher and of the student.
TINY = ["--epochs", "4", "--drw-epoch", "2", "--teacher-epochs", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Output folder and terminal output of a run that nothing disturbed."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("distill") / "run"
    result = CliRunner().invoke(app, ["distill", *TINY, "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_events_files_and_report(whole):
    out, printed = whole
    events = metrics(out)
    assert [e["event"] for e in events] == ["epoch"] * 2 + ["teacher"] + ["epoch"] * 4 + ["heads", "result"]
    assert [e["stage"] for e in events if e["event"] == "epoch"] == ["teacher"] * 2 + ["student"] * 4
    assert events[1]["measured"] == {"measured_steps": 18, "skipped": 0}
    found = events[-2]
    assert found["counts"][0] >= 19 * found["counts"][-1]
    assert set(found["accuracy"]) == {"cls", "dist", "avg"}
    assert set(found["accuracy"]["avg"]) == {"overall", "head", "mid", "tail"}
    assert found["accuracy"] == events[-3]["heads"]
    assert found["accuracy"]["avg"]["overall"] == events[-1]["model"]["top1"]
    assert [len(found["rank"][token]) for token in ("cls", "dist")] == [4, 4]
    assert "Accuracy of each head" in printed
    page = (out / "report.html").read_text()
    assert "Rare classes and tokens" in page
    assert "DIST" in page
    teacher = vf.load(out / "teacher.safetensors")
    assert teacher.cosine
    assert not vf.load(out / "model.safetensors").distilled_training


@pytest.mark.parametrize(("batches", "stage"), [(5, "teacher"), (25, "student"), (45, "student")])
def test_a_stopped_run_goes_on_to_the_same_bits(whole, tmp_path, cli, monkeypatch, batches, stage):
    """Inside the teacher's training, the student's, and the epochs weighted by class."""
    out = tmp_path / "run"
    with stopping_after(batches, monkeypatch):
        result = cli("distill", *TINY, "--out", out)
    assert result.exit_code == 128 + signal.SIGINT, result.output
    checkpoint = torch.load(max((out / "checkpoints").glob("*/state.pt")), weights_only=False)
    assert checkpoint["stage"] == stage
    result = cli("distill", "--resume", "--out", out)
    assert result.exit_code == 0, result.output
    for name in ("teacher", "model"):
        mine, theirs = (vf.load(path / f"{name}.safetensors").state_dict() for path in (out, whole[0]))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert metrics(out)[-2]["accuracy"] == metrics(whole[0])[-2]["accuracy"]


def test_a_teacher_from_a_file_is_the_same_second_half(whole, tmp_path, cli):
    out = tmp_path / "run"
    teacher = whole[0] / "teacher.safetensors"
    assert cli("distill", *TINY, "--teacher", teacher, "--out", out).exit_code == 0
    assert [e["event"] for e in metrics(out)][:5] == ["epoch"] * 4 + ["heads"]
    mine, theirs = (vf.load(path / "model.safetensors").state_dict() for path in (out, whole[0]))
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_the_weights_and_the_map_matter(whole, tmp_path, cli):
    """Never weighted, a run differs from the DRW epoch on; with a map of the classes from the start."""
    teacher = ["--teacher", whole[0] / "teacher.safetensors"]
    assert cli("distill", *TINY, *teacher, "--drw-epoch", 9, "--out", tmp_path / "never").exit_code == 0
    (tmp_path / "map.json").write_text(json.dumps([1, 0, *range(2, 10)]))
    options = ["--class-map", tmp_path / "map.json", "--teacher-size", "8"]
    assert cli("distill", *TINY, *teacher, *options, "--out", tmp_path / "map").exit_code == 0

    def losses(path):
        return [e["train_loss"] for e in metrics(path) if e["event"] == "epoch" and e["stage"] == "student"]

    plain, never, mapped = losses(whole[0]), losses(tmp_path / "never"), losses(tmp_path / "map")
    assert plain[:2] == never[:2]
    assert plain[2] != never[2]
    assert plain[0] != mapped[0]


@pytest.mark.parametrize("loss", ["ce", "balanced_softmax"])
def test_other_teachers(tmp_path, cli, loss):
    out = tmp_path / "run"
    flags = ["--teacher-loss", loss, "--sam-rho", "0", "--epochs", "1", "--teacher-epochs", "1"]
    assert cli("distill", *flags, "--device", "cpu", "--out", out).exit_code == 0
    assert not vf.load(out / "teacher.safetensors").cosine


def test_steps_of_class_sizes():
    data = open_data(Settings(model="vit_micro_patch2_8", imbalance=10.0, imbalance_type="step"))
    counts = torch.bincount(torch.tensor(data.train.labels))
    assert (counts[:5] > 100).all()
    assert (counts[5:] == 14).all()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--model", "vit_micro_patch2_8"], "has no distillation token and head"),
        (["--teacher", "nothing.safetensors"], "--teacher nothing.safetensors: no such file"),
        (["--teacher-model", "resnet18"], "has no cosine classifier"),
        (["--teacher-loss", "magic"], "--teacher-loss must be one of ldam, ce, balanced_softmax"),
        (["--batch-size", "33"], "an even number of images"),
        (["--class-map", "nothing.json"], "--class-map nothing.json: no such file"),
        (["--drw-epoch", "-1"], "--drw-epoch must be at least 0"),
        (["--distill-alpha", "2"], "--distill-alpha must be between 0 and 1"),
        (["--imbalance-type", "cliff"], "--imbalance-type must be one of exp, step"),
        (["--set", "weight_norm=global", "--grad-accum-steps", "2"], "weight_norm=global needs"),
    ],
)
def test_bad_flags_say_what_is_wrong(flags, line, refused, tmp_path):
    assert line in refused("distill", *flags, "--out", tmp_path / "o")


def test_half_precision_does_not_go_with_sam():
    settings = resolve(flags={"amp": "fp16"}, verb="distill")
    with pytest.raises(UserError, match="--amp fp16 does not go with SAM"):
        make_teacher(settings, open_data(settings))


@pytest.mark.parametrize(
    ("text", "line"),
    [("{}", "must be a JSON list"), ("[0, 1", "must be a JSON list"), ("[0, 1]", "10"), ("[0, 0]", "10")],
)
def test_bad_class_maps(text, line, refused, tmp_path):
    (tmp_path / "map.json").write_text(text)
    printed = refused("distill", "--class-map", tmp_path / "map.json", "--out", tmp_path / "o")
    assert line in printed


@pytest.mark.parametrize(
    ("given", "line"),
    [({"num_classes": 4, "in_chans": 1}, "tells 4 classes apart"), ({"in_chans": 3}, "with 3 channels")],
)
def test_teachers_that_do_not_fit(given, line, refused, tmp_path):
    vf.save(timm.create_model("resnet20_cifar", **given), tmp_path / "t.safetensors")
    printed = refused("distill", "--teacher", tmp_path / "t.safetensors", "--out", tmp_path / "o")
    assert line in printed
