from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.train.conftest import TINY_PRUNE, metrics, start


def finish(*args: object, processes: int) -> None:
    process = start(*args, processes=processes)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert stdout.count("Report: ") == 1  # only the main process speaks


def widths(folder: Path) -> list[Any]:
    return [e["dims"] for e in metrics(folder) if e["event"] in ("prune", "compact")]


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Same global batch: same order, same removals, same weights up to the order of a sum.

    The mean of two half-batch means differs from the whole mean in the last bit; AdamW divides by the
    gradient's own size and passes that on. Observed on one CPU: largest difference of a weight 4e-5 in the
    dense and 9e-4 in the final model, of a loss 4e-7, accuracies equal.
    """
    for processes in (1, 2):
        finish("prune", *TINY_PRUNE, "--out", tmp_path / str(processes), processes=processes)
    one, two = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    assert [e["event"] for e in one] == [e["event"] for e in two]
    assert widths(tmp_path / "1") == widths(tmp_path / "2")
    for a, b in zip(one, two, strict=True):
        if a["event"] == "epoch":
            assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-5)
            assert b["top1"] == pytest.approx(a["top1"], abs=0.7)  # 3 of 497 images
    for file, atol in {"dense": 2e-4, "model": 5e-3}.items():
        a, b = (load_file(tmp_path / name / f"{file}.safetensors") for name in ("1", "2"))
        for key in a:
            torch.testing.assert_close(b[key], a[key], rtol=0, atol=atol)


def test_batches_that_cannot_be_shared_are_refused(tmp_path: Path) -> None:
    process = start("train", "--batch-size", 51, "--out", tmp_path / "o", "--device", "cpu", processes=2)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "--batch-size 51 must be a multiple of the 2 processes" in stderr


def test_two_processes_measure_the_slopes_of_one(tmp_path: Path) -> None:
    """A last bit that differs may move a weight to another level, so losses agree to two digits."""
    sizes = ("--epochs", 1, "--finetune-epochs", 2, "--batch-size", 100, "--start-frac", 0, "--device", "cpu")
    for processes in (1, 2):
        finish("quantize", *sizes, "--out", tmp_path / str(processes), processes=processes)
    one, two = ([e for e in metrics(tmp_path / n) if e["event"] == "epoch"] for n in ("1", "2"))
    assert [e.get("measured", {}).get("measured_steps") for e in one] == [None, 13, 26]
    for a, b in zip(one, two, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=0.02)
        if "measured" in a:
            for key in ("measured_steps", "skipped"):
                assert b["measured"][key] == a["measured"][key]
            assert b["measured"]["slope_ratio"] == pytest.approx(a["measured"]["slope_ratio"], abs=0.05)


def test_two_processes_distill_what_one_does(tmp_path: Path) -> None:
    """One divisor for all batches of an update, so that weights of classes are those of one process.

    Without mixing, which each process draws for itself; the teacher is that of the two.
    """
    flags = ["--epochs", 3, "--drw-epoch", 1, "--teacher-epochs", 1, "--batch-size", 50, "--mixup", 0]
    flags += ["--cutmix", 0, "--grad-accum-steps", 2, "--set", "weight_norm=global", "--device", "cpu"]
    finish("distill", *flags, "--out", tmp_path / "2", processes=2)
    teacher = tmp_path / "2" / "teacher.safetensors"
    finish("distill", *flags, "--teacher", teacher, "--out", tmp_path / "1", processes=1)
    two, one = ([e for e in metrics(tmp_path / n) if e.get("stage") == "student"] for n in ("2", "1"))
    for a, b in zip(one, two, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-5)
        assert b["heads"]["avg"]["overall"] == pytest.approx(a["heads"]["avg"]["overall"], abs=0.7)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("1", "2"))
    for key in a:
        torch.testing.assert_close(b[key], a[key], rtol=0, atol=5e-3)


def test_two_processes_train_the_operator_of_one(tmp_path: Path) -> None:
    """Each sees half of a batch; an operator that saw one half only would end elsewhere."""
    sizes = ("--epochs", 1, "--finetune-epochs", 0, "--batch-size", 100, "--operator-steps", 8)
    for processes in (1, 2):
        out = tmp_path / str(processes)
        finish("grow", *sizes, "--device", "cpu", "--out", out, processes=processes)
    a, b = (load_file(tmp_path / name / "grown.safetensors") for name in ("1", "2"))
    for key in a:
        torch.testing.assert_close(b[key], a[key], rtol=0, atol=1e-3)


def test_two_processes_contrast_with_the_keys_of_both(tmp_path: Path) -> None:
    """An epoch of 9 batches of 50 leaves as many keys in the queue, those of both halves of each batch."""
    flags = ["--teacher-loss", "paco", "--teacher-epochs", 1, "--epochs", 0, "--batch-size", 100]
    labels = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        finish("distill", *flags, "--device", "cpu", "--out", out, processes=processes)
        states = [torch.load(path, weights_only=True) for path in (out / "checkpoints").glob("*/state.pt")]
        (state,) = (s["objective"] for s in states if s["stage"] == "teacher")
        assert int(state["place"]) == 450
        assert state["queue_labels"][450:].eq(-1).all()
        torch.testing.assert_close(state["queue"][:450].norm(dim=1), torch.ones(450))
        labels.append(state["queue_labels"][:450].reshape(9, 50).sort(dim=1).values)
    assert torch.equal(*labels)
