from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import pyvitfast as vf
from pyvitfast.cli import app
from pyvitfast.prune import magnitude_mask
from pyvitfast.train.loop import Loop
from tests.train.conftest import metrics

Cli = Callable[..., Result]
TINY = ["--epochs", "2", "--finetune-epochs", "2", "--batch-size", "100", "--device", "cpu"]
SPARSE = [f"blocks.{i}.{n}.weight" for i in range(4) for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Output folder and terminal output of a run that nothing disturbed."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("sparse") / "run"
    result = CliRunner().invoke(app, ["sparsify", *TINY, "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return out, result.output


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def test_zeros_are_the_dense_models_smallest_and_outlast_finetuning(whole: tuple[Path, str]) -> None:
    dense, sparse = (weights(whole[0] / f"{name}.safetensors") for name in ("dense", "model"))
    for name, before in dense.items():
        after = sparse[name]
        if name in SPARSE:
            assert torch.equal(after != 0, magnitude_mask(before)), name
            assert (after[after != 0] != before[after != 0]).float().mean() > 0.99  # finetuned
        else:
            assert (after != 0).float().mean() > 0.9 or "bias" in name, name


def test_events_and_report(whole: tuple[Path, str]) -> None:
    out, printed = whole
    events = metrics(out)
    kinds = [e["event"] for e in events]
    assert kinds == ["epoch", "epoch", "dense", "sparse", "epoch", "epoch", "result"]
    assert [e["stage"] for e in events if e["event"] == "epoch"] == ["train"] * 2 + ["finetune"] * 2
    found = events[3]
    assert [f"{name}.weight" for name in found["matched"]] == SPARSE
    assert (found["kept"], found["params_before"], found["params_after"]) == (0.5, 114_778, 59_482)
    assert list(found["skipped"]) == ["head"]
    assert "2:4 sparsity in 16 linear layers: 55,296 of 110,592 weights kept" in printed
    for text in (printed, (out / "report.html").read_text()):
        assert "Parameters not 0" in text
        assert "59,482" in text
    assert "1.93x less" in printed
    assert "unchanged" in printed
    model = vf.load(out / "model.safetensors")
    assert sum(int(p.count_nonzero()) for p in model.parameters()) == 59_482


# 14 looks an epoch: in training, and in finetuning.
@pytest.mark.parametrize("calls", [20, 33])
def test_a_stopped_run_goes_on_to_the_same_bits(
    cli: Cli, whole: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        seen = iter(range(1, 10**6))
        patch.setattr(Loop, "_stop_signal", lambda self, updates: signal.SIGINT * (next(seen) == calls))
        result = cli("sparsify", *TINY, "--out", out)
    assert result.exit_code == 130, result.output
    assert f"Go on with: pyvitfast sparsify --resume --out {out}" in result.stderr
    result = cli("sparsify", "--resume", "--out", out)
    assert result.exit_code == 0, result.output
    assert metrics(out) == metrics(whole[0])
    for name in ("model.safetensors", "dense.safetensors"):
        a, b = weights(out / name), weights(whole[0] / name)
        assert all(torch.equal(a[key], b[key]) for key in b), name


def test_a_file_is_made_sparse_at_once(cli: Cli, whole: tuple[Path, str], tmp_path: Path) -> None:
    dense, out = whole[0] / "dense.safetensors", tmp_path / "o"
    options = ["--finetune-epochs", 0, "--batch-size", 100, "--device", "cpu"]
    result = cli("sparsify", "--model", dense, *options, "--out", out)
    assert result.exit_code == 0, result.output
    assert [e["event"] for e in metrics(out)] == ["dense", "sparse", "result"]
    before, after = weights(dense), weights(out / "model.safetensors")
    for name in SPARSE:
        assert torch.equal(after[name], before[name] * magnitude_mask(before[name]))
    sparse = next(e for e in metrics(out) if e["event"] == "sparse")
    assert metrics(out)[-1]["model"]["top1"] == sparse["top1"]
    assert json.loads((whole[0] / "metrics.jsonl").read_text().splitlines()[4])["top1"] == sparse["top1"]


def test_models_that_do_not_fit_stop_before_training(refused: Callable[..., str], tmp_path: Path) -> None:
    line = refused("sparsify", "--model", "resnet18", "--set", "img_size=null", "--out", tmp_path / "o")
    assert "--model resnet18 cannot be made sparse: sparsify: `model` must have an nn.Linear" in line
    assert not (tmp_path / "o").exists()


def test_a_file_with_nan_is_refused(
    refused: Callable[..., str], whole: tuple[Path, str], tmp_path: Path
) -> None:
    model = vf.load(whole[0] / "dense.safetensors")
    model.blocks[0].mlp.fc1.weight.data[0, 0] = float("nan")  # type: ignore[index,union-attr]
    vf.save(model, tmp_path / "nan.safetensors")
    line = refused("sparsify", "--model", tmp_path / "nan.safetensors", "--out", tmp_path / "o")
    assert "got NaN in blocks.0.mlp.fc1.weight" in line
