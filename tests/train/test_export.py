from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from typer.testing import Result

import pyvitfast as vf

Cli = Callable[..., Result]


def test_export_of_a_file(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    vf.save(timm.create_model("vit_micro_patch2_8"), tmp_path / "m.safetensors")
    facts = tmp_path / "e.json"
    arguments = ["--model", tmp_path / "m.safetensors", "--out", tmp_path / "m.onnx", "--batch-size", 2]
    result = cli("export", *arguments, "--json", facts)
    assert result.exit_code == 0, result.output
    assert "takes 2 1x8x8 images; onnxruntime differs from the model by at most" in result.stdout
    found = json.loads(facts.read_text())
    assert (found["batch_size"], found["size"]) == (2, (tmp_path / "m.onnx").stat().st_size)


def test_without_a_model_the_micro_one(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    assert cli("export").exit_code == 0
    assert (tmp_path / "out" / "vit_micro_patch2_8.onnx").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--model", "vit_micro_patch2_8", "--out", "m.pth"],
            "`path` must end in .onnx or .pt2, got 'm.pth'",
        ),
        (["--model", "nowhere.safetensors", "--out", "m.onnx"], "--model nowhere.safetensors: no such file"),
        (["--model", "vit_micro_patch2_9", "--out", "m.onnx"], "Did you mean 'vit_micro_patch2_8'"),
        (["--out", "no/folder/m.onnx"], "the folder of `path` must exist; make it first: mkdir -p no/folder"),
        (
            ["--model", "nvit_revit_tiny", "--pretrained", "--out", "m.onnx"],
            "No pretrained weights exist",
        ),
    ],
)
def test_user_errors(refused: Callable[..., str], arguments: list[str], words: str) -> None:
    assert words in refused("export", *arguments)
