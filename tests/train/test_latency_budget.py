"""A latency budget and teachers from the command line."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.models.deit import VisionTransformerDistilled
from typer.testing import Result

import pyvitfast as vf
from pyvitfast.prune import LatencyTable
from pyvitfast.train.teachers import Teachers
from tests.train.conftest import TINY_PRUNE, metrics, start

Cli = Callable[..., Result]
Refused = Callable[..., str]
LATENCY = [*TINY_PRUNE, "--budget", "latency", "--target", "0.6"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of the micro model that is the same on every machine."""
    import timm

    path = tmp_path_factory.mktemp("table") / "table.json"
    LatencyTable.from_macs(timm.create_model("vit_micro_patch2_8")).save(path)
    return path


@pytest.fixture
def distilled(tmp_path: Path) -> Path:
    """A model with a distillation head, for digits."""
    torch.manual_seed(0)
    model = VisionTransformerDistilled(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=48, depth=2, num_heads=4
    )
    vf.save(model, tmp_path / "distilled.safetensors")
    return tmp_path / "distilled.safetensors"


def test_a_given_table_is_the_budget(cli: Cli, tmp_path: Path, table: Path) -> None:
    result = cli("prune", *LATENCY, "--latency-table", table, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "Measuring" not in result.output
    shares = [e["budget"] for e in metrics(tmp_path / "run") if e["event"] == "prune"]
    assert shares[-1] <= 0.6 < shares[-2]
    known = LatencyTable.load(table)
    before, after = (
        known.query(vf.models.ViTConfig.from_model(vf.load(tmp_path / "run" / name)).dims)
        for name in ("dense.safetensors", "model.safetensors")
    )
    assert after / before == pytest.approx(shares[-1])
    assert "Latency, batch 256" in result.output


def test_a_killed_run_keeps_the_table_it_measured(tmp_path: Path, cli: Cli) -> None:
    """Times differ from run to run; masks must not, once the run has begun."""
    out = tmp_path / "run"
    options = [*LATENCY, "--latency-batch-size", "16", "--set", "finetune_epochs=2"]
    process = start("prune", *options, "--out", out)
    end = time.monotonic() + 120
    while not any(e["event"] == "prune" for e in (metrics(out) if (out / "metrics.jsonl").exists() else [])):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    measured = (out / "latency.json").read_bytes()
    assert json.loads(measured)["measured"]["batch_size"] == 16
    assert cli("prune", "--resume", "--out", out).exit_code == 0
    assert (out / "latency.json").read_bytes() == measured
    whole = tmp_path / "whole"
    assert cli("prune", *options, "--latency-table", out / "latency.json", "--out", whole).exit_code == 0
    assert metrics(out) == metrics(whole)
    a, b = (load_file(folder / "model.safetensors") for folder in (out, whole))
    assert all(torch.equal(a[key], b[key]) for key in b)


def test_divided_scores_and_eta_reach_the_pruner(cli: Cli, tmp_path: Path, table: Path) -> None:
    removed = {}
    for name, flags in {"plain": [], "divide": ["--cost-rule", "divide"], "eta": ["--eta", "1e6"]}.items():
        options = [*LATENCY, "--latency-table", table, *flags, "--set", "finetune_epochs=0"]
        assert cli("prune", *options, "--out", tmp_path / name).exit_code == 0
        removed[name] = [e["dims"] for e in metrics(tmp_path / name) if e["event"] == "prune"]
    assert removed["plain"] != removed["divide"]
    assert removed["eta"][0]["embed_dim"] < removed["plain"][0]["embed_dim"] == 48


def test_tables_that_do_not_fit(refused: Refused, tmp_path: Path, table: Path, distilled: Path) -> None:
    missing = refused("prune", *LATENCY, "--latency-table", tmp_path / "no.json", "--out", tmp_path / "a")
    assert "no.json: no such file" in missing
    other = ("--model", distilled, "--latency-table", table)
    assert "distilled False against True" in refused("prune", *LATENCY, *other, "--out", tmp_path / "b")
    (tmp_path / "cut.json").write_text(table.read_text()[:-100])
    cut = refused("prune", *LATENCY, "--latency-table", tmp_path / "cut.json", "--out", tmp_path / "c")
    assert "must be JSON" in cut
    low = ("--latency-table", table, "--target", "0.0001")
    assert "`target` must be at least" in refused("prune", *LATENCY, *low, "--out", tmp_path / "d")
    assert "--eta must be 0 with --cost-rule divide" in refused(
        "prune", *LATENCY, "--cost-rule", "divide", "--eta", "0.1", "--out", tmp_path / "e"
    )


class TestTeachers:
    def test_dense_model_is_used_from_the_first_removal_on(
        self, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []
        original = Teachers.soft

        def soft(self, images, dense):
            asked.append(dense)
            return original(self, images, dense)

        monkeypatch.setattr(Teachers, "soft", soft)
        assert cli("prune", *TINY_PRUNE, "--kl-weight", "1", "--out", tmp_path / "a").exit_code == 0
        assert asked[:2] == [False, False] and all(asked[2:]) and len(asked) > 13
        asked.clear()
        assert cli("prune", *TINY_PRUNE, "--kl-weight", "0", "--out", tmp_path / "b").exit_code == 0
        assert asked == []
        first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
        assert any(first[k].shape != second[k].shape or not torch.equal(first[k], second[k]) for k in first)

    @pytest.mark.parametrize("preset", ["paper", "nvit_repo"])
    def test_cnn_and_two_heads(self, cli: Cli, tmp_path: Path, distilled: Path, preset: str) -> None:
        """A CNN of our own making teaches a student with two heads; both heads move."""
        cnn = ["--model", "test_resnet", "--epochs", "1", "--batch-size", "100", "--device", "cpu"]
        assert cli("train", *cnn, "--out", tmp_path / "cnn").exit_code == 0
        assert vf.summary(vf.load(tmp_path / "cnn" / "model.safetensors")).input_size == (1, 8, 8)
        teacher = tmp_path / "cnn" / "model.safetensors"
        options = [*TINY_PRUNE, "--model", distilled, "--cnn-teacher", teacher, "--preset", preset]
        result = cli("prune", *options, "--out", tmp_path / "run")
        assert result.exit_code == 0, result.output
        before, after = (load_file(p) for p in (distilled, tmp_path / "run" / "model.safetensors"))
        for name in ("head.bias", "head_dist.bias"):
            assert not torch.equal(before[name], after[name])
        assert not vf.load(tmp_path / "run" / "model.safetensors").distilled_training

    def test_cnns_that_do_not_fit(self, refused: Refused, tmp_path: Path) -> None:
        import timm

        missing = refused("prune", *TINY_PRUNE, "--cnn-teacher", "resnet10", "--out", tmp_path / "a")
        assert "--cnn-teacher resnet10: no such timm model" in missing
        for name, changes, words in (
            ("classes", {"num_classes": 7, "in_chans": 1}, "tells 7 classes apart"),
            ("chans", {"num_classes": 10}, "cannot take 1x8x8"),
        ):
            file = tmp_path / f"{name}.safetensors"
            vf.save(timm.create_model("test_resnet", **changes), file)
            found = refused("prune", *TINY_PRUNE, "--cnn-teacher", file, "--out", tmp_path / name)
            assert f"--cnn-teacher {file}" in found and words in found
