from __future__ import annotations

import signal

import pytest
import torch
from typer.testing import CliRunner

import pyvitfast as vf
from pyvitfast.cli import app
from pyvitfast.models.quantized import packed_layers
from tests.train.conftest import metrics, stopping_after

TINY = [
    "--epochs",
    "2",
    "--finetune-epochs",
    "2",
    "--batch-size",
    "100",
    "--device",
    "cpu",
    "--start-frac",
    "0.5",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Output folder and terminal output of a run that nothing disturbed."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("quantize") / "run"
    arguments = ["quantize", *TINY, "--weight-bits", "2", "--out", str(out)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_events_report_and_a_small_file(whole):
    out, printed = whole
    events = metrics(out)
    assert [e["event"] for e in events] == [
        "epoch",
        "epoch",
        "dense",
        "quantized",
        "epoch",
        "epoch",
        "result",
    ]
    found = events[3]
    assert len(found["layers"]) == 16
    assert sorted(found["skipped"]) == ["head", "patch_embed.proj"]
    assert found["bits_per_weight"] < 4
    measured = [e.get("measured") for e in events if e["event"] == "epoch"]
    assert measured[2] is None
    assert measured[3]["measured_steps"] == 13
    assert "2-bit weights (half_integer grid" in printed
    assert "Size on disk" in (out / "report.html").read_text()
    low = vf.load(out / "model.safetensors")
    assert len(packed_layers(low)) == 16
    sizes = [(out / f"{name}.safetensors").stat().st_size for name in ("dense", "model")]
    assert sizes[1] < sizes[0] / 4


def test_the_straight_through_arm_beside_it(whole, tmp_path, cli, monkeypatch):
    """Same start and batches: the first losses are equal, and the measured arm is as it is alone."""
    out = tmp_path / "run"
    dense = str(whole[0] / "dense.safetensors")
    options = ["--model", dense, *TINY, "--weight-bits", "2"]
    alone = tmp_path / "alone"
    assert cli("quantize", *options, "--out", alone).exit_code == 0
    assert cli("quantize", *options, "--compare", "--out", out).exit_code == 0
    epochs = [e for e in metrics(out) if e["event"] == "epoch"]
    assert [e["arm"] for e in epochs] == ["ste", "ste", "fogzo", "fogzo"]
    assert epochs[0]["train_loss"] == epochs[2]["train_loss"]
    assert epochs[1]["train_loss"] != epochs[3]["train_loss"]
    assert (alone / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()

    stopped = tmp_path / "stopped"
    with stopping_after(10, monkeypatch):
        assert cli("quantize", *options, "--compare", "--out", stopped).exit_code == 128 + signal.SIGINT
    assert cli("quantize", "--resume", "--out", stopped).exit_code == 0
    again = [e for e in metrics(stopped) if e["event"] == "epoch"]
    assert [e["train_loss"] for e in again] == [e["train_loss"] for e in epochs]


def test_a_stopped_run_goes_on_to_the_same_bits(whole, tmp_path, cli, monkeypatch):
    out = tmp_path / "run"
    with stopping_after(45, monkeypatch):  # inside the last epoch, where slopes are measured
        result = cli("quantize", *TINY, "--weight-bits", "2", "--out", out)
    assert result.exit_code == 128 + signal.SIGINT, result.output
    result = cli("quantize", "--resume", "--out", out)
    assert result.exit_code == 0, result.output
    mine, theirs = (vf.load(path / "model.safetensors").state_dict() for path in (out, whole[0]))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--weight-bits", "9"], "`weight_bits` must be a whole number from 1 to 8, got 9"),
        (["--granularity", "group"], "`group_size` must be at least 1"),
        (["--estimator", "magic"], "--estimator must be one of fogzo, ste, spsa, zo"),
        (["--grad-accum-steps", "2"], "--grad-accum-steps 2 goes with --estimator ste only"),
        (["--omega", "-1"], "--omega must be at least 0"),
    ],
)
def test_bad_flags_say_what_is_wrong(flags, line, refused, tmp_path):
    assert line in refused("quantize", *flags, "--out", tmp_path / "o")


def test_a_model_from_a_file_is_quantised_at_once(whole, tmp_path, cli):
    out = tmp_path / "run"
    dense = whole[0] / "dense.safetensors"
    result = cli(
        "quantize", "--model", dense, "--estimator", "ste", "--finetune-epochs", "0", "--weight-bits", "8",
        "--scale", "mse", "--device", "cpu", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    events = metrics(out)
    assert [e["event"] for e in events] == ["dense", "quantized", "result"]
    assert abs(events[0]["top1"] - events[2]["model"]["top1"]) < 2
