from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import Result

from pyvitfast.train.loop import Loop
from tests.train.conftest import TINY_PRUNE, metrics, start

Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a pruning run that nothing disturbed."""
    from typer.testing import CliRunner

    from pyvitfast.cli import app

    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "run"
    result = CliRunner().invoke(app, ["prune", *TINY_PRUNE, "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return out


def assert_same(found: Path, expected: Path) -> None:
    assert metrics(found) == metrics(expected)
    for name in ("model.safetensors", "dense.safetensors"):
        a, b = load_file(found / name), load_file(expected / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name


def stop_after(monkeypatch: pytest.MonkeyPatch, calls: int, signum: int) -> None:
    """Let the loop see a signal the ``calls``-th time it looks, that is in the middle of an epoch."""
    seen = iter(range(1, 10**6))
    monkeypatch.setattr(Loop, "_stop_signal", lambda self, updates: signum * (next(seen) == calls))


# 14 looks an epoch: in epoch 1, at its end, in epoch 2, in the pruning epochs (26 updates), in finetuning.
@pytest.mark.parametrize("calls", [5, 14, 20, 31, 45, 60])
def test_a_stopped_run_goes_on_to_the_same_bits(
    cli: Cli, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, calls, signal.SIGINT)
        result = cli("prune", *TINY_PRUNE, "--out", out)
    assert result.exit_code == 130, result.output
    assert f"Go on with: pyvitfast prune --resume --out {out}" in result.stderr
    assert len(metrics(out)) < len(metrics(whole))
    torch.rand(3)  # what happens in between must not matter
    result = cli("prune", "--resume", "--out", out)
    assert result.exit_code == 0, result.output
    assert "Going on from" in result.output
    assert_same(out, whole)


def test_mixup_and_drop_path_resume_to_the_same_bits(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [
        "--epochs",
        "2",
        "--batch-size",
        "100",
        "--device",
        "cpu",
        "--mixup",
        "0.8",
        "--cutmix",
        "1",
        "--set",
        "drop_path=0.3",
    ]
    assert cli("train", *options, "--out", tmp_path / "whole").exit_code == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 19, signal.SIGTERM)
        assert cli("train", *options, "--out", tmp_path / "run").exit_code == 143
    assert cli("train", "--resume", "--out", tmp_path / "run").exit_code == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def wait_for_checkpoint(folder: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not list((folder / "checkpoints").glob("[0-9]*")):
        assert time.monotonic() < end, "no checkpoint appeared"
        time.sleep(0.02)


def test_a_run_killed_twice_goes_on_to_the_same_bits(cli: Cli, whole: Path, tmp_path: Path) -> None:
    out, kills = tmp_path / "run", 0
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    delays = random.Random(seed)
    for options in (TINY_PRUNE, ["--resume"]):
        process = start("prune", *options, "--out", out)
        wait_for_checkpoint(out)
        before = len(metrics(out))
        while len(metrics(out)) <= before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(delays.uniform(0, 0.5))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        process.communicate()
    assert kills >= 1, "the runs ended before they could be killed"
    assert cli("prune", "--resume", "--out", out).exit_code == 0
    assert_same(out, whole)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_say_how_to_go_on(tmp_path: Path, signum: signal.Signals, code: int) -> None:
    out = tmp_path / "run"
    process = start("train", "--epochs", 200, "--out", out, "--device", "cpu")
    wait_for_checkpoint(out)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert (
        stderr.strip() == f"Stopped; a checkpoint is saved. Go on with: pyvitfast train --resume --out {out}"
    )


def test_finished_run_resumes_to_itself(cli: Cli, whole: Path) -> None:
    before = metrics(whole)
    assert cli("prune", "--resume", "--out", whole).exit_code == 0
    assert metrics(whole) == before


def test_two_checkpoints_are_kept_and_a_damaged_one_is_passed_over(
    cli: Cli, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 20, signal.SIGINT)
        cli("prune", *TINY_PRUNE, "--out", out)
    folders = sorted((out / "checkpoints").iterdir())
    assert len(folders) == 2
    state = folders[1] / "state.pt"
    state.write_bytes(state.read_bytes()[:5000])
    (out / "checkpoints" / ".000099").mkdir()  # what a kill while writing leaves
    assert cli("prune", "--resume", "--out", out).exit_code == 0
    assert_same(out, whole)
    for folder in (out / "checkpoints").glob("[0-9]*"):
        model = folder / "model.safetensors"
        model.write_bytes(model.read_bytes()[:-100])
    assert "no checkpoint can be read" in refused("prune", "--resume", "--out", out)


@pytest.mark.parametrize("content", [b"", b"text", bytes(100)])
def test_a_checkpoint_that_became_something_else_is_named(
    content: bytes, whole: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints").glob("*/state.pt"):
        file.write_bytes(content)
    assert "no checkpoint can be read" in refused("prune", "--resume", "--out", tmp_path / "run")


def test_checkpoints_hold_no_pickled_code(whole: Path) -> None:
    for folder in (whole / "checkpoints").glob("[0-9]*"):
        torch.load(folder / "state.pt", weights_only=True)
        assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "state.pt"]


def test_resume_from_nothing(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "there is no run in" in refused("train", "--resume", "--out", tmp_path)


def test_resume_with_other_settings_names_them(refused: Callable[..., str], whole: Path) -> None:
    line = refused("prune", "--resume", "--out", whole, "--lr", 0.5, "--set", "mixup=0.1")
    assert "lr (0.002 then, 0.5 now)" in line
    assert "mixup (0.0 then, 0.1 now)" in line
    assert "epochs" not in line
    assert "was started by `pyvitfast prune`, not train" in refused("train", "--resume", "--out", whole)


def test_resume_of_a_run_killed_before_its_first_checkpoint(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--epochs", 1, "--batch-size", 100, "--device", "cpu"]
    assert cli("train", *options, "--out", out).exit_code == 0
    expected = metrics(out)
    for folder in (out / "checkpoints").iterdir():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    (out / "metrics.jsonl").write_text("")
    assert cli("train", "--resume", "--out", out).exit_code == 0
    assert metrics(out) == expected


def test_every_line_of_the_metrics_is_json(whole: Path) -> None:
    events = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    kinds = [e["event"] for e in events]
    assert kinds[0] == "start"
    assert kinds[-1] == "result"
    assert {"epoch", "dense", "prune", "compact"} <= set(kinds)
