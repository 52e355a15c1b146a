from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import yaml
from rich.console import Console
from typer.testing import Result

import pyvitfast as vf
from pyvitfast.train.errors import UserError
from pyvitfast.train.folder import RunFolder
from pyvitfast.train.progress import Reporter
from tests.train.conftest import ROOT, TINY_PRUNE, metrics

Cli = Callable[..., Result]
Refused = Callable[..., str]
TINY = ["--epochs", 1, "--batch-size", 100, "--device", "cpu"]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Output folder and terminal output of a pruning run, started as the user starts it."""
    out = tmp_path_factory.mktemp("pruned") / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pyvitfast", "prune", *TINY_PRUNE, "--target", "0.4", "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_prune_leaves_everything_it_promises(pruned: tuple[Path, str]) -> None:
    out, printed = pruned
    names = {p.name for p in out.iterdir()}
    assert {
        "model.safetensors",
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "report.png",
        "checkpoints",
    } <= names
    before, after = vf.load(out / "dense.safetensors"), vf.load(out / "model.safetensors")
    assert vf.summary(after).macs <= 0.4 * vf.summary(before).macs
    # Stopped at the first removal that reached the target.
    shares = [e["macs"] for e in metrics(out) if e["event"] == "prune"]
    assert shares[-1] <= 0.4 < shares[-2]
    assert shares[-1] == pytest.approx(vf.summary(after).macs / vf.summary(before).macs)
    assert f"{vf.summary(after).macs:,}" in printed
    assert "starts from random weights; it is trained for 2 epochs first" in printed
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["verb"], config["epochs"], config["target"]) == ("prune", 2, 0.4)


def test_output_that_is_not_a_terminal_has_plain_lines(pruned: tuple[Path, str]) -> None:
    _, printed = pruned
    assert "\x1b" not in printed
    assert "\r" not in printed
    assert "━" not in printed
    assert len(re.findall(r"^train \d/2: loss [\d.]+  top-1 [\d.]+ %  [\d.]+ s$", printed, re.M)) == 2


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    for terminal in (True, False):
        reporter = Reporter(Console(force_terminal=terminal, width=80))
        reporter.begin("train 1/2", 10, 3)
        reporter.advance()
        reporter.end()
        assert ("4/10" in capsys.readouterr().out) is terminal


def test_eval_of_the_pruned_file_repeats_the_reported_accuracy(
    cli: Cli, pruned: tuple[Path, str], tmp_path: Path
) -> None:
    out, _ = pruned
    file = tmp_path / "result.json"
    result = cli("eval", "--model", out / "model.safetensors", "--device", "cpu", "--json", file)
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    expected = metrics(out)[-1]["model"]
    assert found["top1"] == pytest.approx(expected["top1"])
    assert found["class_mean"] == pytest.approx(expected["class_mean"])
    assert found["images"] == 497
    assert f"top-1 {found['top1']:.2f} %, mean over classes {found['class_mean']:.2f} %" in result.stdout


def test_a_trained_file_is_pruned_at_once(cli: Cli, pruned: tuple[Path, str], tmp_path: Path) -> None:
    dense = pruned[0] / "dense.safetensors"
    options = ["--interval", 1, "--groups-per-step", 12, "--finetune-epochs", 0, "--batch-size", 100]
    result = cli("prune", "--model", dense, *options, "--device", "cpu", "--out", tmp_path / "o")
    assert result.exit_code == 0, result.output
    stages = {e["stage"] for e in metrics(tmp_path / "o") if e["event"] == "epoch"}
    assert stages == {"prune"}
    assert "random weights" not in result.output


def test_a_pruned_file_is_pruned_further(cli: Cli, pruned: tuple[Path, str], tmp_path: Path) -> None:
    once = pruned[0] / "model.safetensors"
    options = ["--interval", 1, "--groups-per-step", 4, "--finetune-epochs", 1, "--batch-size", 100]
    sizes = ["--set", "group_sizes={embed: 4, head: 1, qk: 2, v: 2, mlp: 8}", "--target", 0.8]
    result = cli("prune", "--model", once, *options, *sizes, "--device", "cpu", "--out", tmp_path / "o")
    assert result.exit_code == 0, result.output
    twice = vf.summary(vf.load(tmp_path / "o" / "model.safetensors"))
    assert twice.macs <= 0.8 * vf.summary(vf.load(once)).macs


def test_train_on_an_image_folder(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    options = ["--data", image_folder, "--model", "vit_tiny_patch16_224", "--set", "img_size=16"]
    more = ["--epochs", 1, "--batch-size", 8, "--workers", 0, "--device", "cpu", "--mixup", 0.2]
    result = cli("train", *options, *more, "--out", tmp_path / "o")
    assert result.exit_code == 0, result.output
    model = vf.load(tmp_path / "o" / "model.safetensors")
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 2)
    result = cli(
        "eval", "--data", image_folder, "--model", tmp_path / "o" / "model.safetensors", "--workers", 0
    )
    assert result.exit_code == 0, result.output


def test_yaml_set_and_flags_through_the_command(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("epochs: 3\nlr: 0.001\nseed: 5\n")
    assignments = ["--set", "epochs=2", "--set", "smoothing=0.0"]
    result = cli("train", "--config", tmp_path / "c.yaml", *assignments, *TINY, "--out", tmp_path / "o")
    assert result.exit_code == 0, result.output
    config = yaml.safe_load((tmp_path / "o" / "config.yaml").read_text())
    assert (config["epochs"], config["lr"], config["seed"], config["smoothing"]) == (1, 0.001, 5, 0.0)
    # The written configuration starts the same run again.
    again = cli("train", "--config", tmp_path / "o" / "config.yaml", "--out", tmp_path / "p")
    assert again.exit_code == 0, again.output
    assert metrics(tmp_path / "p") == metrics(tmp_path / "o")


def test_default_output_folder_names_verb_and_data(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("train", *TINY).exit_code == 0
    assert (tmp_path / "out" / "train-digits" / "model.safetensors").is_file()


def test_summary(cli: Cli, pruned: tuple[Path, str], tmp_path: Path) -> None:
    dense = cli("summary")
    assert "114,778" in dense.stdout
    assert "1,994,592" in dense.stdout
    file = pruned[0] / "model.safetensors"
    result = cli("summary", "--model", file, "--json", tmp_path / "s.json")
    facts = vf.summary(vf.load(file))
    assert f"{facts.params:,}" in result.stdout
    assert json.loads((tmp_path / "s.json").read_text())["macs"] == facts.macs
    assert len(json.loads((tmp_path / "s.json").read_text())["blocks"]) == 4


def test_info_is_yaml_with_versions_and_libraries(cli: Cli) -> None:
    facts = yaml.safe_load(cli("info").stdout)
    assert facts["torch"] == torch.__version__
    assert {"pyvitfast", "loaded", "ops"} <= set(facts)
    listed = yaml.safe_load(cli("info", "--settings").stdout)
    assert {"lr", "mixup", "target"} <= set(listed)


@pytest.mark.parametrize(
    "verb", ["train", "prune", "sparsify", "quantize", "eval", "summary", "export", "info"]
)
def test_help_of_each_verb(cli: Cli, verb: str) -> None:
    result = cli(verb, "--help")
    assert result.exit_code == 0
    assert "--debug" in result.output
    if verb in ("train", "prune", "sparsify", "quantize"):
        for flag in [
            "model",
            "data",
            "out",
            "epochs",
            "batch-size",
            "lr",
            "seed",
            "device",
            "resume",
            "config",
            "set",
        ]:
            assert f"--{flag}" in result.output, flag
    assert verb in cli("--help").output


def test_registered_with_timm() -> None:
    model = timm.create_model("vit_micro_patch2_8", num_classes=7)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 7)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "vit_tiny_patch16_22"], "no such timm model and no such file. Did you mean 'vit_tiny"),
        (["--model", "nowhere.safetensors"], "--model nowhere.safetensors: no such file"),
        (["--data", "digitz", "--model", "x"], "expected `digits`, an existing folder"),
        (["--data", "no/folder"], "--model is needed with --data no/folder"),
        (["--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["--device", "cpu", "--amp", "fp16"], "--amp fp16 needs a GPU"),
        (["--target", "1.5"], "--target must be a fraction between 0 and 1, both excluded"),
        (["--target", "0.0001"], "cannot be pruned"),
        (["--epochs", "-1"], "--epochs must be at least 0, got -1"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--batch-size", "5000"], "more than the 1300 training images"),
        (["--lr", "-1"], "--lr must be a positive number, got -1.0"),
        (["--set", "epoch=1"], "--set: unknown key 'epoch'. Did you mean 'epochs'"),
        (["--set", "epochs"], "must have the form key=value"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: no such file"),
        (["--model", "resnet18"], "cannot be pruned"),
        (["--set", "img_size=1"], "cannot take images of 1x1"),
        (["--preset", "papers"], "--preset must be one of paper, nvit_repo, got 'papers'"),
    ],
)  # fmt: skip
def test_user_errors_are_one_line(refused: Refused, tmp_path: Path, arguments: list[str], words: str) -> None:
    out = tmp_path / "o"
    assert words in refused("prune", *arguments, "--out", out)
    assert not out.exists(), "a run that cannot start leaves nothing behind"


def test_a_missing_gpu(refused: Refused, tmp_path: Path) -> None:
    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = f"cuda:{number}" if number else "cuda"
    assert f"--device {device}: there is no such GPU" in refused(
        "train", "--device", device, "--out", tmp_path / "o"
    )


def test_bad_yaml(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("lr: [1")
    assert "is not valid YAML" in refused("train", "--config", tmp_path / "c.yaml")


def test_damaged_model_files(refused: Refused, pruned: tuple[Path, str], tmp_path: Path) -> None:
    whole = (pruned[0] / "model.safetensors").read_bytes()
    changed = bytearray(whole)
    changed[-1000] ^= 1
    for name, content in {
        "cut": whole[:-500],
        "head": whole[:50],
        "bits": bytes(changed),
        "empty": b"",
    }.items():
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(content)
        line = refused("eval", "--model", file, "--device", "cpu")
        assert f"{name}.safetensors" in line
    (tmp_path / "old.pth").write_bytes(b"pickle")
    assert ".safetensors" in refused("eval", "--model", tmp_path / "old.pth", "--device", "cpu")


def test_models_that_do_not_fit_the_data(refused: Refused, image_folder: Path, tmp_path: Path) -> None:
    colour, seven = tmp_path / "colour.safetensors", tmp_path / "seven.safetensors"
    vf.save(timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=10), colour)
    vf.save(timm.create_model("vit_micro_patch2_8", num_classes=7), seven)
    assert "takes images with 3 channels, --data digits has 1" in refused("eval", "--model", colour)
    assert "tells 7 classes apart, --data digits has 10" in refused("eval", "--model", seven)
    assert "tells 7 classes apart" in refused("eval", "--model", seven, "--data", image_folder)
    assert "--pretrained goes with a timm name" in refused("eval", "--model", seven, "--pretrained")


def test_folder_that_is_not_empty(cli: Cli, refused: Refused, tmp_path: Path) -> None:
    out = tmp_path / "o"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "checkpoints").mkdir()
    line = refused("train", *TINY, "--out", out)
    assert "is not empty. Go on with its run with --resume, start over in it with --overwrite" in line
    assert cli("train", *TINY, "--out", out, "--overwrite").exit_code == 0
    assert (out / "notes.txt").read_text() == "mine"


def test_folder_that_cannot_be_written(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written: Not a directory" in refused("train", *TINY, "--out", tmp_path / "file" / "o")
    assert "cannot be written" in refused("train", *TINY, "--out", tmp_path / "file")

    def deny(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", deny)  # tests may run as root, whom no permission stops
    line = refused("train", *TINY, "--out", tmp_path / "o")
    assert "cannot be written: Permission denied. Name a folder you may write to" in line


def test_unreadable_image_stops_before_training(refused: Refused, image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "cat" / "0.jpg").write_text("no image")
    out = tmp_path / "o"
    line = refused("train", "--data", image_folder, "--model", "vit_tiny_patch16_224", "--out", out)
    assert "cat/0.jpg (not an image)" in line
    assert not out.exists()


def test_debug_shows_the_traceback(cli: Cli) -> None:
    with pytest.raises(UserError):
        cli("train", "--epochs", "-1", "--debug")


def test_overwrite_removes_only_what_a_run_writes(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "train")
    for name in ("report.html", "report-path.png", "report.txt", "metrics.jsonl", "mine.png"):
        (tmp_path / name).write_text("")
    folder._clear()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.png", "report.txt"]
