"""``pyvitfast sparsify --tokens``: a small run on digits, its report, resume, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import pyvitfast as vf
from pyvitfast.cli import app
from pyvitfast.models.stvit import STViT
from pyvitfast.train.settings import Settings
from tests.train.conftest import metrics, stopping_after

TINY = ["--tokens", "2", "--epochs", "2", "--finetune-epochs", "2", "--batch-size", "100", "--device", "cpu"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Output folder and terminal output of a run that nothing disturbed."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("tokens") / "run"
    result = CliRunner().invoke(app, ["sparsify", *TINY, "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_events_and_report(whole: tuple[Path, str]) -> None:
    out, printed = whole
    events = metrics(out)
    kinds = [e["event"] for e in events]
    assert kinds == ["epoch", "epoch", "dense", "tokens", "epoch", "epoch", "result"]
    found = events[3]
    assert (found["image_tokens"], found["semantic_tokens"], found["base"]) == (16, 4, 1)
    assert "4 semantic tokens in the others" in printed
    assert "What the semantic tokens attend to" in (out / "report.html").read_text()
    assert (out / "report-tokens.png").stat().st_size > 10_000


def test_the_model_is_whole_without_its_source(whole: tuple[Path, str]) -> None:
    model = vf.load(whole[0] / "model.safetensors")
    assert isinstance(model, STViT)
    maps = model.token_attention(torch.randn(3, 1, 8, 8))
    assert maps.shape == (3, 4, 4, 4)
    assert (maps.sum((2, 3)) < 1).all()  # the rest goes to the semantic tokens
    dense, few = (load_file(whole[0] / f"{name}.safetensors") for name in ("dense", "model"))
    assert dense["blocks.3.attn.qkv.weight"].shape == few["blocks.3.attn.qkv.weight"].shape


# 13 updates an epoch: in training, and in finetuning.
@pytest.mark.parametrize("batches", [20, 33])
def test_a_stopped_run_gives_the_same_weights(whole, tmp_path, cli, monkeypatch, batches) -> None:
    out = tmp_path / "stopped"
    with stopping_after(batches, monkeypatch):
        result = cli("sparsify", *TINY, "--out", out)
    assert result.exit_code == 130
    result = cli("sparsify", "--resume", "--out", out)
    assert result.exit_code == 0, result.output
    resumed = load_file(out / "model.safetensors")
    for name, tensor in load_file(whole[0] / "model.safetensors").items():
        assert torch.equal(resumed[name], tensor), name


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--tokens", "5"], "must not exceed the grid of patches"),
        (["--tokens", "2y3"], "--tokens must be a number such as 4"),
        (["--tokens", "0"], "--tokens must be a number such as 4"),
        (["--tokens", "2", "--tokens-base", "4"], "need 6 blocks"),
        (["--tokens", "2", "--tokens-pool", "mean"], "--tokens-pool must be one of"),
        (["--tokens", "2", "--model", "resnet18"], "cannot have semantic tokens"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(options, reason, refused, tmp_path) -> None:
    line = refused("sparsify", *options, "--out", tmp_path / "o")
    assert reason in line


def test_grids() -> None:
    assert Settings(model="x", tokens="4").token_grid() == (4, 4)
    assert Settings(model="x", tokens="2x3").token_grid() == (2, 3)
    assert Settings(model="x", tokens=4).token_grid() == (4, 4)  # type: ignore[arg-type]
