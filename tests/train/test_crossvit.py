"""CrossViT from the command line, and the recipe that is found by name."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from typer.testing import Result

import pyvitfast as vf
from pyvitfast.models import CrossViT, CrossViTConfig
from pyvitfast.train import Settings, UserError, open_data, resolve
from pyvitfast.train.data import EpochBatches, image_size, input_channels
from pyvitfast.train.loop import Loop
from pyvitfast.train.settings import recipe_names
from tests.train.conftest import metrics

Cli = Callable[..., Result]
MICRO = ["--model", "linear_crossvit_micro_8", "--data", "digits", "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """Output folder of two epochs, and what was printed."""
    from typer.testing import CliRunner

    from pyvitfast.cli import app

    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("trained") / "run"
    result = CliRunner().invoke(app, ["train", *MICRO, "--epochs", "2", "--out", str(out)])
    return out, result


def test_training_leaves_a_model_that_learnt_and_a_report(trained: tuple[Path, Result]) -> None:
    out, result = trained
    assert result.exit_code == 0, result.output
    assert {"model.safetensors", "report.html", "metrics.jsonl"} <= {p.name for p in out.iterdir()}
    model = vf.load(out / "model.safetensors")
    assert type(model) is CrossViT
    assert f"{vf.summary(model).macs:,}" in result.output
    # Ten classes: 10 % by chance.
    assert metrics(out)[-1]["model"]["top1"] > 30


def test_eval_repeats_the_accuracy(cli: Cli, trained: tuple[Path, Result], tmp_path: Path) -> None:
    out, _ = trained
    file = tmp_path / "a.json"
    assert cli("eval", "--model", out / "model.safetensors", "--device", "cpu", "--json", file).exit_code == 0
    assert json.loads(file.read_text())["top1"] == pytest.approx(metrics(out)[-1]["model"]["top1"])


def test_a_stopped_run_goes_on_to_the_same_bits(
    cli: Cli, trained: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = iter(range(1, 10**6))
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_stop_signal", lambda self, updates: signal.SIGTERM * (next(seen) == 35))
        assert cli("train", *MICRO, "--epochs", 2, "--out", tmp_path / "run").exit_code == 143
    assert cli("train", "--resume", "--out", tmp_path / "run").exit_code == 0
    a, b = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", trained[0]))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert metrics(tmp_path / "run") == metrics(trained[0])


def test_other_verbs(
    cli: Cli, refused: Callable[..., str], trained: tuple[Path, Result], tmp_path: Path
) -> None:
    file = trained[0] / "model.safetensors"
    for budget in ("macs", "latency"):
        message = refused("prune", "--model", file, "--budget", budget, "--out", tmp_path / "p")
        assert "CrossViT is not pruned yet" in message
    assert cli("export", "--model", file, "--out", tmp_path / "m.pt2").exit_code == 0
    assert (
        "linear layers"
        in cli(
            "sparsify", "--model", file, "--finetune-epochs", 0, "--device", "cpu", "--out", tmp_path / "s"
        ).output
    )
    assert "32, 64" in cli("summary", "--model", file).output


def test_image_size_and_channels_of_both_classes() -> None:
    for name in ("crossvit_9_240", "linear_crossvit_9_240"):
        model = timm.create_model(name, in_chans=1, depth=((1, 1, 0),))
        assert (image_size(model), input_channels(model)) == (240, 1)
        # Also where nothing but the modules tells: a model read from a file has no timm settings.
        bare = CrossViTConfig.from_model(model).build()
        assert (image_size(bare), input_channels(bare)) == (240, 1)
    model = timm.create_model("linear_crossvit_9_240", img_size=408, depth=((1, 1, 0),))
    assert image_size(model) == 408


def test_digits_are_enlarged_to_a_published_model() -> None:
    model = timm.create_model("linear_crossvit_9_240", in_chans=1, depth=((1, 1, 0),))
    data = open_data(Settings(model="linear_crossvit_9_240"))
    data.fit_to(model, Settings(model="linear_crossvit_9_240"))
    assert data.train[0, None][0].shape == (1, 240, 240)


class TestRecipe:
    def test_it_is_the_papers(self) -> None:
        found = resolve(Path("crossvit"), flags={"data": "some/folder"})
        expected = Settings(
            model="linear_crossvit_15_240",
            data="some/folder",
            epochs=300,
            batch_size=4096,
            lr=4e-3,
            weight_decay=0.05,
            warmup_epochs=30,
            warmup_lr=1e-6,
            min_lr=1e-5,
            smoothing=0.1,
            mixup=0.8,
            cutmix=1.0,
            drop_path=0.1,
            aa="rand-m9-mstd0.5-inc1",
            color_jitter=0.4,
            reprob=0.25,
        )
        assert found == expected
        # 5e-4 for each 512 images.
        assert found.lr == pytest.approx(5e-4 * found.batch_size / 512)
        assert found.aug_repeats == 1
        assert resolve(Path("crossvit"), ["aug_repeats=3"], {"data": "x"}).aug_repeats == 3

    def test_flags_and_a_file_of_that_name_win(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "sub").mkdir()
        (tmp_path / "crossvit").mkdir()
        assert resolve(Path("crossvit"), flags={"data": "x", "epochs": 3}).epochs == 3
        (tmp_path / "crossvit").rmdir()
        (tmp_path / "crossvit").write_text("epochs: 7\n")
        assert resolve(Path("crossvit")).epochs == 7

    def test_an_unknown_one_is_told_with_those_that_are(self) -> None:
        with pytest.raises(
            UserError,
            match=r"no recipe of that name \(crossvit, deit_lt_.*, stvit_swin\)\. Did you mean 'crossvit'",
        ):
            resolve(Path("crosvit"))
        with pytest.raises(UserError, match=r"--config sub/crossvit: no such file"):
            resolve(Path("sub/crossvit"))

    def test_all_can_be_read(self) -> None:
        sets = ("cifar10", "cifar100", "imagenet", "inat2018")
        lists = sorted(f"deit_lt_{name}{teacher}" for name in sets for teacher in ("", "_paco"))
        assert recipe_names() == ["crossvit", *lists, "stvit", "stvit_swin"]
        for name in recipe_names():
            settings = resolve(Path(name), flags={"data": "x"})
            assert timm.is_model(settings.model)

    def test_a_short_run_with_it(self, cli: Cli, tmp_path: Path) -> None:
        small = ["--epochs", 1, "--batch-size", 100, "--lr", 1e-3, "--warmup-epochs", 0]
        result = cli("train", "--config", "crossvit", *MICRO, *small, "--out", tmp_path / "run")
        assert result.exit_code == 0, result.output


class TestRepeatedAugmentation:
    @staticmethod
    def keys(repeats: int, world: int = 1, rank: int = 0) -> list[tuple[int, int | None]]:
        data = open_data(Settings(model="any"))
        batches = EpochBatches(data.train, 100, 1, rank, world, True, repeats)
        batches.seed = (1, 2)
        return [key for batch in batches for key in batch]

    def test_one_repeat_is_the_plain_order(self) -> None:
        keys = self.keys(1)
        assert len({i for i, _ in keys}) == len(keys) == 1300

    def test_an_epoch_keeps_its_length(self) -> None:
        keys = self.keys(3)
        assert len(keys) == len(set(keys)) == 1300
        counts = torch.bincount(torch.tensor([i for i, _ in keys]), minlength=1300)
        assert sorted(counts.unique().tolist()) == [0, 1, 3]
        assert int((counts == 3).sum()) == 433
        # Copies follow one another, and each has a seed of its own.
        assert keys[0][0] == keys[1][0] == keys[2][0] != keys[3][0]
        assert len({seed for _, seed in keys}) == 1300

    def test_processes_share_them(self) -> None:
        parts = [self.keys(3, 2, rank) for rank in range(2)]
        assert sorted(parts[0] + parts[1]) == sorted(self.keys(3))

    def test_it_must_be_positive(self) -> None:
        with pytest.raises(UserError, match="--aug-repeats must be at least 1, got 0"):
            Settings(model="any", aug_repeats=0)
