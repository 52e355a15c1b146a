from __future__ import annotations

import json
import signal
from collections import Counter
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import Resize
from typer.testing import CliRunner

import pyvitfast as vf
from pyvitfast.cli import app
from pyvitfast.distill import PaCoConfig
from pyvitfast.train import Settings, UserError, open_data, resolve
from pyvitfast.train.data import EpochBatches, TensorSplit
from pyvitfast.train.distill import SharpnessAwareSteps, StudentObjective, make_teacher, teacher_settings
from pyvitfast.train.loop import Loop, Stage
from pyvitfast.train.model import check_heads
from tests.methods.test_distill_published import ldam_layout, paco_layout
from tests.train.conftest import metrics, stopping_after

# 9 updates an epoch, of the teacher and of the student.
TINY = ["--epochs", "4", "--drw-epoch", "2", "--teacher-epochs", "2", "--device", "cpu"]
# A queue that goes round within an epoch, and a key encoder that moves.
PACO = ["--teacher-loss", "paco", "--set", "paco_queue=70", "--set", "paco_momentum=0.9"]


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


@pytest.fixture(scope="module")
def contrasted(tmp_path_factory):
    """Output folder of a run with PaCo that nothing disturbed."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("paco") / "run"
    result = CliRunner().invoke(app, ["distill", *TINY, *PACO, "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return out


def test_paco_trains_the_teacher(contrasted, cli, tmp_path):
    """An ordinary classifier, as good by itself as its epochs say, whose logits are without the prior."""
    events = metrics(contrasted)
    assert [e["event"] for e in events] == ["epoch"] * 2 + ["teacher"] + ["epoch"] * 4 + ["heads", "result"]
    assert events[1]["measured"] == {"measured_steps": 18, "skipped": 0}
    assert events[1]["top1"] == events[2]["top1"]
    file = contrasted / "teacher.safetensors"
    teacher = vf.load(file)
    assert not teacher.training
    assert not teacher.cosine
    assert cli("eval", "--model", file, "--device", "cpu", "--json", tmp_path / "a.json").exit_code == 0
    assert json.loads((tmp_path / "a.json").read_text())["top1"] == events[2]["top1"]


@pytest.mark.parametrize("batches", [5, 13])
def test_a_stopped_run_of_paco_goes_on_to_the_same_bits(contrasted, tmp_path, cli, monkeypatch, batches):
    """In both epochs of the teacher, before and after the queue went round."""
    out = tmp_path / "run"
    with stopping_after(batches, monkeypatch):
        result = cli("distill", *TINY, *PACO, "--out", out)
    assert result.exit_code == 128 + signal.SIGINT, result.output
    checkpoint = torch.load(max((out / "checkpoints").glob("*/state.pt")), weights_only=True)
    assert checkpoint["stage"] == "teacher"
    assert int(checkpoint["objective"]["place"]) == 50 * batches % 70
    result = cli("distill", "--resume", "--out", out)
    assert result.exit_code == 0, result.output
    for name in ("teacher", "model"):
        mine, theirs = (vf.load(path / f"{name}.safetensors").state_dict() for path in (out, contrasted))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert metrics(out) == metrics(contrasted)


@pytest.mark.parametrize("state", ["queue_labels", "place", "key_encoder.conv1.weight"])
def test_all_of_pacos_state_matters(contrasted, tmp_path, cli, monkeypatch, state):
    """A run that goes on with a part of it lost ends elsewhere, so the test above can fail."""
    out = tmp_path / "run"
    with stopping_after(5, monkeypatch):
        cli("distill", *TINY, *PACO, "--epochs", 0, "--out", out)
    file = max((out / "checkpoints").glob("*/state.pt"))
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["objective"][state].zero_()
    torch.save(checkpoint, file)
    assert cli("distill", "--resume", "--out", out).exit_code == 0
    mine, theirs = (vf.load(path / "teacher.safetensors").state_dict() for path in (out, contrasted))
    assert any(not torch.equal(mine[key], theirs[key]) for key in mine)


def test_paco_on_image_files(tmp_path, image_folder, cli):
    """Views of colour images at the teacher's size, from loader processes of two different numbers."""
    flags = ["--data", image_folder, "--model", "deit_micro_distilled_patch2_8", "--batch-size", 4]
    flags += ["--teacher-loss", "paco", "--teacher-model", "resnet20_cifar", "--teacher-epochs", 2]
    flags += ["--epochs", 0, "--set", "teacher_batch_size=4", "--device", "cpu"]
    for workers in (0, 2):
        result = cli("distill", *flags, "--workers", workers, "--out", tmp_path / str(workers))
        assert result.exit_code == 0, result.output
    a, b = (vf.load(tmp_path / n / "teacher.safetensors").state_dict() for n in ("0", "2"))
    assert all(torch.equal(a[key], b[key]) for key in a)


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


def test_accumulated_batches_weighted_together_are_one_batch(whole, tmp_path, cli):
    """Two of 50 added up against one of 100, all weighted by class; not so with sums of their own."""
    teacher = ["--teacher", whole[0] / "teacher.safetensors", "--mixup", 0, "--cutmix", 0, "--drw-epoch", 0]

    def run(name, *flags):
        out = tmp_path / name
        assert cli("distill", *TINY, *teacher, *flags, "--epochs", 2, "--out", out).exit_code == 0
        losses = [e["train_loss"] for e in metrics(out) if e["event"] == "epoch"]
        return torch.tensor(losses), vf.load(out / "model.safetensors").state_dict()

    large = run("large", "--batch-size", 100, "--set", "weight_norm=global")
    parts = ["--batch-size", 50, "--grad-accum-steps", 2]
    together, alone = (run(norm, *parts, "--set", f"weight_norm={norm}") for norm in ("global", "batch"))

    def apart(a, b):
        return max(float((a[1][key] - b[1][key]).abs().max()) for key in a[1])

    torch.testing.assert_close(together[0], large[0], rtol=1e-5, atol=0)
    assert float((alone[0] - large[0]).abs().max()) > 3e-4
    assert apart(together, large) < 5e-5
    assert apart(alone, large) > 2e-3


def test_an_epoch_has_whole_updates_only(whole, tmp_path, cli, monkeypatch):
    """9 batches in updates of 4: the ninth is left out, and a run that is stopped loses no batch."""
    seen = []
    prepare = StudentObjective.prepare

    def counted(self, batches):
        seen.append(len(batches))
        return prepare(self, batches)

    monkeypatch.setattr(StudentObjective, "prepare", counted)
    flags = ["--teacher", whole[0] / "teacher.safetensors", "--grad-accum-steps", 4, "--epochs", 2]
    flags = [*TINY, *flags, "--drw-epoch", 1, "--set", "weight_norm=global"]
    assert cli("distill", *flags, "--out", tmp_path / "a").exit_code == 0
    assert seen == [1] * 8 + [4] * 2
    assert metrics(tmp_path / "a")[1]["updates"] == 4
    with stopping_after(10, monkeypatch):
        assert cli("distill", *flags, "--out", tmp_path / "b").exit_code == 128 + signal.SIGINT
    assert cli("distill", "--resume", "--out", tmp_path / "b").exit_code == 0
    assert seen[10:] == seen[:10]
    a, b = (vf.load(tmp_path / n / "model.safetensors").state_dict() for n in ("a", "b"))
    assert all(torch.equal(a[key], b[key]) for key in a)


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
        (["--set", "remode=magic"], "--remode must be one of const, rand, pixel"),
        (["--set", "crop_pct=0"], "--crop-pct must be above 0"),
        (["--teacher", "nothing.safetensors"], "--teacher nothing.safetensors: no such file"),
        (["--teacher-model", "resnet18"], "has no cosine classifier"),
        (["--teacher-model", "resnet50_cosine", "--teacher-loss", "ce"], "which only ldam trains, not ce"),
        (["--teacher-loss", "paco", "--teacher-model", "resnet50_cosine"], "only ldam trains, not paco"),
        (["--teacher-loss", "paco", "--teacher-model", "deit_micro_distilled_patch2_8"], "trained by paco"),
        (["--teacher-loss", "paco", "--set", "paco_temperature=0"], "--paco-temperature must be finite and"),
        (["--set", "paco_queue=-1"], "--paco-queue must be a whole number of at least 0, got -1"),
        (["--set", "teacher_views=svhn"], "--teacher-views must be one of cifar, imagenet, got 'svhn'"),
        (["--set", "teacher_warmup_epochs=-1"], "--teacher-warmup-epochs must be at least 0"),
        (["--set", "teacher_decay_rate=0"], "--teacher-decay-rate must be above 0 and at most 1"),
        (["--set", "teacher_sched=magic"], "--teacher-sched must be one of"),
        (["--set", "sam_rho_steps={-1: 0.1}"], "--sam-rho-steps must be radii of at least 0"),
        (["--set", "teacher_batch_size=2000"], "teacher_batch_size=2000 is more than the"),
        (["--teacher-loss", "magic"], "--teacher-loss must be one of ldam, paco, ce, balanced_softmax"),
        (["--batch-size", "33"], "an even number of images"),
        (["--class-map", "nothing.json"], "--class-map nothing.json: no such file"),
        (["--drw-epoch", "-1"], "--drw-epoch must be at least 0"),
        (["--distill-alpha", "2"], "--distill-alpha must be between 0 and 1"),
        (["--imbalance-type", "cliff"], "--imbalance-type must be one of exp, step"),
    ],
)
def test_bad_flags_say_what_is_wrong(flags, line, refused, tmp_path):
    assert line in refused("distill", *flags, "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_two_heads_on_one_feature_are_no_experts():
    settings = Settings(model="levit_128s")
    with pytest.raises(UserError, match="--model levit_128s has no distillation token and head"):
        check_heads(timm.create_model("levit_128s", num_classes=10), settings)


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
    assert not (tmp_path / "o").exists()  # or the mended command would have to overwrite it


@pytest.mark.parametrize(
    ("given", "line"),
    [({"num_classes": 4, "in_chans": 1}, "tells 4 classes apart"), ({"in_chans": 3}, "with 3 channels")],
)
def test_teachers_that_do_not_fit(given, line, refused, tmp_path):
    vf.save(timm.create_model("resnet20_cifar", **given), tmp_path / "t.safetensors")
    printed = refused("distill", "--teacher", tmp_path / "t.safetensors", "--out", tmp_path / "o")
    assert line in printed
    assert not (tmp_path / "o").exists()


class TestPublishedTeachers:
    """``--teacher`` with checkpoints as the authors' programs write them."""

    @pytest.fixture
    def flags(self, tmp_path, image_folder):
        """Of a student of colour images."""
        student = timm.create_model("deit_micro_distilled_patch2_8", in_chans=3, num_classes=2)
        vf.save(student, tmp_path / "student.safetensors")
        flags = ["--data", image_folder, "--model", tmp_path / "student.safetensors", "--batch-size", 4]
        return [*flags, "--epochs", 0, "--set", "workers=0", "--device", "cpu"]

    def test_paco(self, tmp_path, flags, cli):
        cnn = timm.create_model("resnet32_cifar", num_classes=2)
        torch.save(paco_layout(cnn), tmp_path / "moco_ckpt.pth.tar")
        result = cli("distill", *flags, "--teacher", tmp_path / "moco_ckpt.pth.tar", "--out", tmp_path / "o")
        assert result.exit_code == 0, result.output
        mine, theirs = vf.load(tmp_path / "o" / "teacher.safetensors").state_dict(), cnn.state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)

    @pytest.mark.parametrize(
        ("name", "arguments", "more", "line"),
        [
            ("resnet20_cifar", {}, [], "does not fit --teacher-model resnet32_cifar: Error(s) in loading"),
            (
                "resnet32_cifar",
                {"cosine": True},
                ["--teacher-model", "resnet50"],
                "has a cosine classifier: name",
            ),
            ("resnet32_cifar", {"num_classes": 5}, [], "tells 5 classes apart"),
        ],
    )
    def test_of_another_network(self, tmp_path, flags, refused, name, arguments, more, line):
        cnn = timm.create_model(name, **{"num_classes": 2, **arguments})
        torch.save(ldam_layout(cnn, "linear"), tmp_path / "t.pth")
        flags = [*flags, "--teacher", tmp_path / "t.pth", *more]
        assert line in refused("distill", *flags, "--out", tmp_path / "o")
        assert not (tmp_path / "o").exists()

    @pytest.mark.parametrize(
        ("content", "line"),
        [
            (Path, "is no file of tensors and plain data"),
            ({"encoder.weight": torch.zeros(1)}, "must have the names of PaCo's code"),
            (None, "t.pth: No such file or directory"),
            (b"text", "is no file of tensors and plain data"),
        ],
    )
    def test_other_files(self, tmp_path, refused, content, line):
        if isinstance(content, bytes):
            (tmp_path / "t.pth").write_bytes(content)
        elif content is not None:
            torch.save(content, tmp_path / "t.pth")
        assert line in refused("distill", "--teacher", tmp_path / "t.pth", "--out", tmp_path / "o")
        assert not (tmp_path / "o").exists()


def test_a_teacher_that_gives_no_numbers_is_named(tmp_path, refused):
    cnn = timm.create_model("resnet20_cifar", in_chans=1)
    torch.nn.init.constant_(cnn.fc.bias, torch.nan)
    vf.save(cnn, tmp_path / "t.safetensors")
    printed = refused("distill", *TINY, "--teacher", tmp_path / "t.safetensors", "--out", tmp_path / "o")
    assert "must give finite logits, got NaN or infinity in rows" in printed


def test_a_class_without_images_is_refused(tmp_path, image_folder, refused):
    lines = [
        f"{p.relative_to(image_folder)} {2 * (p.parent.name == 'dog')}" for p in image_folder.rglob("*.*")
    ]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    lists = [f"--set={name}={tmp_path / 'list.txt'}" for name in ("train_list", "test_list")]
    model = ["--model", "deit_micro_distilled_patch2_8", "--batch-size", 4, "--set", "workers=0"]
    printed = refused("distill", "--data", image_folder, *lists, *model, "--out", tmp_path / "o")
    assert "there are no images of classes 1" in printed
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("recipe", "lr", "warmup", "first", "second", "factor"),
    [("deit_lt_cifar10", 0.1, 5, 160, 180, 0.01), ("deit_lt_cifar100_paco", 0.05, 10, 320, 360, 0.1)],
)
def test_schedules_of_the_published_teachers(recipe, lr, warmup, first, second, factor):
    """A linear warm-up, LDAM's x0.01 after 160 and x0.0001 after 180, PaCo's x0.1 and x0.01."""
    settings = teacher_settings(resolve(Path(recipe)))
    group = {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr}
    optimizer = torch.optim.SGD([group])
    updates = 8
    loop = SimpleNamespace(settings=settings, updates_per_epoch=updates)
    scheduler = Loop.schedule(loop, optimizer, Stage("teacher", settings.lr, settings.epochs))

    def rate(update):
        scheduler.step_update(update)
        return optimizer.param_groups[0]["lr"]

    assert rate(0) == pytest.approx(1e-6)
    assert rate(warmup * updates // 2) == pytest.approx(lr / 2, rel=1e-4)
    assert rate(warmup * updates) == rate(first * updates - 1) == lr
    assert rate(first * updates) == rate(second * updates - 1) == pytest.approx(factor * lr)
    assert rate(second * updates) == pytest.approx(factor**2 * lr)


def test_radii_of_the_published_teacher():
    settings = resolve(Path("deit_lt_imagenet"))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    steps = SharpnessAwareSteps(optimizer, settings.sam_rho, torch.Tensor.backward, settings.sam_rho_steps)
    found = {}
    for epoch in (0, 5, 6, 60, 61, 89):
        steps.set_epoch(epoch)
        found[epoch] = steps.rho
    assert found == {0: 0.05, 5: 0.05, 6: 0.1, 60: 0.1, 61: 0.5, 89: 0.5}


@pytest.mark.parametrize(
    ("name", "epochs", "drw_epoch", "images", "lr"),
    [
        ("cifar10", 1200, 1100, 1024, 2.5e-4),
        ("cifar100", 1200, 1100, 1024, 2.5e-4),
        ("imagenet", 1400, 1200, 2048, 5e-4),
        ("inat2018", 1000, 900, 2048, 5e-4),
    ],
)
def test_recipes_are_the_published_ones(name, epochs, drw_epoch, images, lr):
    found = resolve(Path(f"deit_lt_{name}"))
    assert (found.epochs, found.drw_epoch, found.lr) == (epochs, drw_epoch, lr)
    assert found.batch_size * found.grad_accum_steps == images
    assert found.mixing_after_drw == (name in ("imagenet", "inat2018"))
    assert (found.reprob, found.remode, found.crop_pct) == (0.25, "pixel", 224 / 256)
    assert (found.mixup, found.cutmix, found.smoothing, found.aug_repeats) == (0.8, 1.0, 0.1, 3)
    large = name in ("imagenet", "inat2018")
    assert (found.teacher_epochs, found.teacher_drw_epoch) == ((90, 60) if large else (200, 160))
    assert found.teacher_margin == (0.3 if large else 0.5)
    assert timm.is_model(found.model)
    assert timm.is_model(found.teacher_model)
    student = {f.name for f in fields(found) if not f.name.startswith(("teacher_", "paco_", "sam_"))}
    paco = resolve(Path(f"deit_lt_{name}_paco"))
    assert {key: getattr(paco, key) for key in student} == {key: getattr(found, key) for key in student}
    assert paco.teacher_size == found.teacher_size
    assert (paco.teacher_loss, paco.teacher_epochs, paco.teacher_batch_size) == ("paco", 400, 128)
    large_config = PaCoConfig(alpha=0.05, temperature=0.2, queue=8192, dim=128)
    assert paco.paco() == (large_config if large else PaCoConfig())
    assert (paco.teacher_lr, paco.teacher_weight_decay) == {
        "cifar10": (0.05, 5e-4), "cifar100": (0.05, 5e-4), "imagenet": (0.02, 5e-4), "inat2018": (0.02, 1e-4)
    }[name]  # fmt: skip
    assert paco.sam_rho == {"cifar10": 0.1, "cifar100": 0.2}.get(name, 0.05)
    assert paco.sam_rho_steps is None
    assert paco.teacher_views == ("imagenet" if large else "cifar")
    assert paco.teacher_model == ("resnet50" if large else "resnet32_cifar")


def test_an_epoch_of_the_published_recipe():
    """Digest section 6: 12,288 samples of CIFAR-10-LT, 4096 images three times each."""
    settings = resolve(Path("deit_lt_cifar10"))
    split = TensorSplit(torch.zeros(12406, 1, 1, 1), [0] * 12406)
    batches = EpochBatches(
        split, settings.batch_size, settings.grad_accum_steps, 0, 1, True, settings.aug_repeats
    )
    times = Counter(index for batch in batches for index, _ in batch)
    assert sum(times.values()) == 12288
    assert len(times) == 4096
    assert set(times.values()) == {3}


def test_cosine_of_the_published_large_teachers_has_no_warm_up():
    for name in ("imagenet", "inat2018"):
        settings = teacher_settings(resolve(Path(f"deit_lt_{name}")))
        assert (settings.sched, settings.warmup_epochs) == ("cosine", 0)
        assert settings.crop_pct is None  # the network's own, not the student's


@pytest.mark.parametrize("mode", ["pixel", "const"])
def test_erasing_and_the_crop_for_tests_are_timms(image_folder, mode):
    settings = Settings(
        model="vit_tiny_patch16_224",
        data=str(image_folder),
        reprob=1.0,
        remode=mode,
        crop_pct=0.875,
        workers=0,
    )
    data = open_data(settings)
    data.fit_to(timm.create_model(settings.model, num_classes=data.num_classes), settings)
    (erasing,) = (t for t in data.train.transform.transforms if isinstance(t, RandomErasing))
    assert (erasing.rand_color, erasing.per_pixel) == (False, mode == "pixel")
    (resize,) = (t for t in data.test.transform.transforms if isinstance(t, Resize))
    assert resize.size == 256


def test_a_student_whose_blocks_cannot_be_looked_at_gets_its_report(whole, tmp_path, cli):
    """Semantic tokens: no rank and no distance of each block, but all of the rest."""
    sparse = vf.tokens.to_stvit(vf.load(whole[0] / "model.safetensors"), tokens=(2, 2), base=1)
    vf.save(sparse, tmp_path / "student.safetensors")
    teacher = ["--teacher", whole[0] / "teacher.safetensors"]
    flags = ["--model", tmp_path / "student.safetensors", "--epochs", 1, "--device", "cpu", *teacher]
    out = tmp_path / "run"
    result = cli("distill", *flags, "--out", out)
    assert result.exit_code == 0, result.output
    found = metrics(out)[-2]
    assert (found["rank"], found["attention_distance"]) == ({}, [])
    assert set(found["accuracy"]) == {"cls", "dist", "avg"}
    assert (out / "report-heads.png").exists()
    assert type(vf.load(out / "model.safetensors")) is type(sparse)
