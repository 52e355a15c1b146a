"""The job of ``pyvitfast distill``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from rich.console import Console
from torch import Tensor, nn

from pyvitfast import distill as methods
from pyvitfast.models.checkpoint import load
from pyvitfast.train import model as models
from pyvitfast.train.data import (
    Data,
    EpochBatches,
    check_batch_size,
    image_size,
    input_channels,
    make_loader,
    open_data,
)
from pyvitfast.train.errors import UserError
from pyvitfast.train.folder import TEACHER
from pyvitfast.train.loop import Accuracy, Loop, Objective, Stage, evaluate
from pyvitfast.train.run import Outcome, _Job, _job, _outcome
from pyvitfast.train.settings import Settings

# Parts of the epochs, as published for CIFAR: 1100 of 1200, and 160 of 200.
STUDENT_DRW, TEACHER_DRW = 11 / 12, 4 / 5
HEADS = ("cls", "dist", "avg")
LOOKED_AT = 1024  # test images for ranks: more than there are channels


class TeacherObjective(Objective):
    """A teacher's loss on plain labels.

    Args:
        loss: of logits and labels; told the epoch if it wants to know.
        evaluate: its test accuracy.

    :attr:`steps` are those of SAM, where it takes them; they are told the epoch.
    """

    def __init__(self, loss: nn.Module, evaluate: Callable[[nn.Module], Accuracy]) -> None:
        self._loss, self._evaluate = loss, evaluate
        self.steps: SharpnessAwareSteps | None = None

    def begin(self, model: nn.Module, epoch: int) -> None:
        """Tell the loss and the steps the epoch."""
        if isinstance(self._loss, methods.LDAMLoss):
            self._loss.set_epoch(epoch)
        if self.steps is not None:
            self.steps.set_epoch(epoch)

    def loss(self, model: nn.Module, images: Tensor, target: Any) -> Tensor:
        """The loss of a batch."""
        found: Tensor = self._loss(model(images), target)
        return found

    def examine(self, model: nn.Module) -> tuple[Accuracy, dict[str, Any]]:
        """Test accuracy."""
        return self._evaluate(self.network(model)), {}


class PaCoObjective(TeacherObjective):
    """PaCo on two views of each image: its encoder is the teacher, all else is state of the training.

    Args:
        paco: what is trained, and its own loss.
        evaluate: test accuracy of the encoder.
    """

    def __init__(self, paco: methods.PaCo, evaluate: Callable[[nn.Module], Accuracy]) -> None:
        super().__init__(paco.loss, evaluate)

    def loss(self, model: nn.Module, images: Tensor, target: Any) -> Tensor:
        """The loss of a batch of views [B, 2, C, S, S]."""
        query, key = images.unbind(1)
        found: Tensor = model(query, key, target)
        return found

    def network(self, model: nn.Module) -> nn.Module:
        """The query encoder with its classifier."""
        paco: Any = model
        encoder: nn.Module = paco.encoder
        return encoder

    def state_dict(self, model: nn.Module) -> dict[str, Any]:
        """The key encoder, both projections, and the queue with its place."""
        return {k: v for k, v in model.state_dict().items() if not k.startswith("encoder.")}

    def load_state_dict(self, model: nn.Module, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        encoder = {f"encoder.{k}": v for k, v in self.network(model).state_dict().items()}
        model.load_state_dict({**encoder, **state_dict})


class StudentObjective(Objective):
    """DeiT-LT: labels for the CLS head, the teacher's for the DIST head, on the same images.

    Args:
        loss: of both heads.
        teacher: gives the labels.
        mixup: mixes a batch, or None.
        examine: accuracy of each head.
    """

    def __init__(
        self,
        loss: methods.DeiTLTLoss,
        teacher: methods.TeacherPipeline,
        mixup: methods.PairedMixup | None,
        examine: Callable[[nn.Module], tuple[Accuracy, dict[str, Any]]],
    ) -> None:
        self._loss, self._teacher, self._mixup, self._examine = loss, teacher, mixup, examine

    def begin(self, model: nn.Module, epoch: int) -> None:
        """The phase follows from the epoch alone."""
        student: Any = model
        student.set_distilled_training(True)
        self._loss.set_epoch(epoch)

    @property
    def whole_updates(self) -> bool:
        """Where weights are summed over an update, its labels of the teacher come before its first loss."""
        return self._loss.reweights and self._loss.config.weight_norm == "global"

    def prepare(self, batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Any]]:
        """Mixed, where this epoch mixes; with the target go the teacher's labels and the sum of weights."""
        mixed: list[tuple[Tensor, Any]] = list(batches)
        if self._mixup is not None and self._loss.mixes:
            mixed = [self._mixup(*batch) for batch in batches]
        try:
            labels = [self._teacher(images) for images, _ in mixed]
        except ValueError as error:
            raise UserError(str(error)) from error
        divisor = self._loss.window_divisor(labels) if self.whole_updates else None
        return [
            (images, (target, theirs, divisor))
            for (images, target), theirs in zip(mixed, labels, strict=True)
        ]

    def loss(self, model: nn.Module, images: Tensor, target: Any) -> Tensor:
        """The loss of a batch."""
        found: Tensor = self._loss(model(images), *target)
        return found

    def examine(self, model: nn.Module) -> tuple[Accuracy, dict[str, Any]]:
        """Accuracy of the mean of both heads, and of each."""
        return self._examine(model)


class SharpnessAwareSteps:
    """SAM as what takes the loop's steps: its closure is the loss alone.

    Args:
        optimizer: of the run.
        rho: radius.
        backward: accelerate's.
        changes: other radii by the epoch that they begin with.
    """

    def __init__(
        self,
        optimizer: Any,
        rho: float,
        backward: Callable[[Tensor], None],
        changes: Mapping[int, float] | None = None,
    ) -> None:
        self._sam, self._backward = methods.SAM(optimizer, rho), backward
        self._radii = {0: rho, **(changes or {})}
        self._steps = 0

    @property
    def rho(self) -> float:
        """The radius."""
        return self._sam.rho

    def set_epoch(self, epoch: int) -> None:
        """Take the radius of ``epoch``."""
        self._sam.rho = self._radii[max(e for e in self._radii if e <= epoch)]

    @property
    def stats(self) -> dict[str, Any]:
        """Steps taken and skipped."""
        return {"measured_steps": self._steps, "skipped": self._sam.skipped}

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """One step of two passes."""

        def passes() -> Tensor:
            self._sam.zero_grad()
            loss = closure()
            self._backward(loss)
            return loss

        self._steps += 1
        return self._sam.step(passes)

    def state_dict(self) -> dict[str, Any]:
        """Counts; the optimizer's state is kept by the loop."""
        return {"steps": self._steps, "skipped": self._sam.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._steps, self._sam.skipped = state_dict["steps"], state_dict["skipped"]


@torch.no_grad()
def correct_by_class(
    model: nn.Module, data: Data, settings: Settings, accelerator: Accelerator
) -> tuple[dict[str, Tensor], Tensor]:
    """Right answers of each head by class, and test images by class, int64 [C], over all processes."""
    batches = EpochBatches(
        data.test, settings.batch_size, 1, accelerator.process_index, accelerator.num_processes, shuffle=False
    )
    device, classes = accelerator.device, data.num_classes
    right = {head: torch.zeros(classes, dtype=torch.long, device=device) for head in HEADS}
    total = torch.zeros(classes, dtype=torch.long, device=device)
    training = model.training
    model.eval()
    for images, labels in make_loader(batches, settings.workers, device.type == "cuda"):
        labels = labels.to(device)
        with accelerator.autocast():
            logits = methods.head_logits(model, images.to(device, non_blocking=True))
        total += labels.bincount(minlength=classes)
        for head in HEADS:
            hits = getattr(logits, head).argmax(1) == labels
            right[head] += labels[hits].bincount(minlength=classes)
    model.train(training)
    return {head: accelerator.reduce(count, "sum") for head, count in right.items()}, accelerator.reduce(
        total, "sum"
    )


def by_group(right: Tensor, total: Tensor, groups: Mapping[str, list[int]]) -> dict[str, float]:
    """Accuracy in percent, over all images and as the mean over the classes of each group that are there."""
    found = {"overall": 100 * float(right.sum() / total.sum())}
    for name, members in groups.items():
        there = [c for c in members if total[c] > 0]
        if there:
            found[name] = 100 * float((right[there] / total[there]).mean())
    return found


def examiner(job: _Job, groups: Mapping[str, list[int]]) -> Callable[[nn.Module], Any]:
    """Accuracy of the mean of both heads, and of every head and group."""

    def examine(model: nn.Module) -> tuple[Accuracy, dict[str, Any]]:
        right, total = correct_by_class(model, job.data, job.settings, job.accelerator)
        heads = {head: by_group(count, total, groups) for head, count in right.items()}
        there = total > 0
        class_mean = 100 * float((right["avg"][there] / total[there]).mean())
        return Accuracy(heads["avg"]["overall"], class_mean), {"heads": heads}

    return examine


def class_map(settings: Settings, classes: int) -> list[int] | None:
    """The numbers in the file of ``settings.class_map``.

    Raises:
        UserError: no such file, not a JSON list, or not a permutation of the classes.
    """
    if settings.class_map is None:
        return None
    flag = f"--class-map {settings.class_map}"
    try:
        numbers = json.loads(Path(settings.class_map).read_text())
    except FileNotFoundError as error:
        raise UserError(f"{flag}: no such file.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} must be a JSON list of class numbers: {error}.") from error
    if not isinstance(numbers, list) or not all(type(n) is int for n in numbers):
        raise UserError(f"{flag} must be a JSON list of class numbers, such as [1, 0, 2].")
    try:
        methods.checked_class_map(numbers, classes)
    except ValueError as error:
        raise UserError(f"{flag}: {error}") from error
    return numbers


def images_by_class(data: Data) -> list[int]:
    """Training images of each class."""
    found: list[int] = torch.bincount(torch.tensor(data.train.labels), minlength=data.num_classes).tolist()
    return found


def student_loss(settings: Settings, counts: list[int]) -> methods.DeiTLTLoss:
    """The loss of ``settings``.

    Raises:
        UserError: classes without images.
    """
    s = settings
    start = round(STUDENT_DRW * s.epochs) if s.drw_epoch is None else s.drw_epoch
    if empty := [c for c, count in enumerate(counts) if not count]:
        raise UserError(
            f"--data {s.data}: there are no images of classes {', '.join(map(str, empty[:10]))}"
            f"{f' and {len(empty) - 10} more' if len(empty) > 10 else ''} to train on, so they have no "
            "weight. Add some, or leave these classes out of the test images too."
        )
    return methods.DeiTLTLoss(
        counts,
        s.distill_alpha,
        start,
        beta=s.drw_beta,
        smoothing=s.smoothing,
        weight_norm=s.weight_norm,
        mixing_after_drw=s.mixing_after_drw,
    )


def make_teacher(settings: Settings, data: Data) -> nn.Module:
    """A teacher to be trained.

    Raises:
        UserError: it cannot be made, or not be trained so.
    """
    s = settings
    arguments: dict[str, Any] = {"num_classes": data.num_classes}
    if data.in_chans is not None:
        arguments["in_chans"] = data.in_chans
    ldam = s.teacher_loss == "ldam"
    if ldam and s.teacher_model.endswith("_cifar"):
        arguments["cosine"] = True
    if s.amp == "fp16" and (s.sam_rho or s.sam_rho_steps):
        raise UserError(
            "--amp fp16 does not go with SAM: a step it skips would leave the scale of the loss as it is. "
            "Use --amp bf16, --sam-rho 0, or a trained one by --teacher FILE."
        )
    torch.manual_seed(s.seed)
    cnn = models.create(s.teacher_model, flag="--teacher-model", **arguments)
    if ldam != any(isinstance(module, methods.CosineClassifier) for module in cnn.modules()):
        how = (
            "has no cosine classifier, which ldam needs. Take resnet32_cifar, resnet50_cosine"
            if ldam
            else f"has a cosine classifier, which only ldam trains, not {s.teacher_loss}. Take resnet50"
        )
        raise UserError(
            f"--teacher-model {s.teacher_model} {how}, another --teacher-loss, or a trained one by --teacher "
            "FILE."
        )
    models.take_size_of(data, cnn)
    models.check_fit(cnn, s.teacher_model, data)
    return cnn


def make_paco(cnn: nn.Module, settings: Settings, counts: list[int]) -> methods.PaCo:
    """What trains ``cnn`` by ``paco``.

    Raises:
        UserError: it cannot be trained so.
    """
    try:
        return methods.PaCo(cnn, counts, settings.paco())
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        reason = str(error).rstrip(".")
        raise UserError(
            f"--teacher-model {settings.teacher_model} cannot be trained by paco: {reason}. Take "
            "resnet32_cifar, resnet50, another --teacher-loss, or a trained one by --teacher FILE."
        ) from error


def teacher_settings(settings: Settings) -> Settings:
    """What the teacher is trained with: SGD, weak augmentation or views, no mixing, one batch an update."""
    s = settings
    warmup = 5 if s.teacher_epochs >= 50 else 0
    return replace(
        s,
        model=s.teacher_model,
        img_size=None,
        epochs=s.teacher_epochs,
        batch_size=s.teacher_batch_size,
        grad_accum_steps=1,
        opt="momentum",
        lr=s.teacher_lr,
        weight_decay=s.teacher_weight_decay,
        sched=s.teacher_sched,
        decay_rate=s.teacher_decay_rate,
        warmup_epochs=warmup if s.teacher_warmup_epochs is None else s.teacher_warmup_epochs,
        min_lr=0.0,
        clip_grad=None,
        smoothing=0.0,
        mixup=0.0,
        cutmix=0.0,
        drop_path=0.0,
        aa=None,
        color_jitter=0.0,
        reprob=0.0,
        train_crop=s.teacher_crop,
        crop_pct=None,
        aug_repeats=1,
        check_images=False,
    )


def train_teacher(job: _Job, counts: list[int]) -> None:
    """Train the teacher and keep it in the folder."""
    s = teacher_settings(job.settings)
    data = open_data(s)
    contrasts = s.teacher_loss == "paco"
    cnn = job.model if job.stage == "teacher" else make_teacher(job.settings, data)
    data.fit_to(cnn, s, s.teacher_views if contrasts else None)
    drw = round(TEACHER_DRW * s.epochs) if s.teacher_drw_epoch is None else s.teacher_drw_epoch
    losses: dict[str, Callable[[], nn.Module]] = {
        "ldam": lambda: methods.LDAMLoss(counts, s.teacher_margin, drw_epoch=drw),
        "ce": nn.CrossEntropyLoss,
        "balanced_softmax": lambda: methods.BalancedSoftmaxLoss(counts),
    }
    accelerator = job.accelerator
    loop = Loop(s, data, job.folder, accelerator, job.reporter, job.loop.stop)
    loop.results = job.loop.results
    accelerator.gradient_accumulation_steps = 1

    def examine(model: nn.Module) -> Accuracy:
        return evaluate(model, data, s, accelerator)

    paco = make_paco(cnn, s, counts) if contrasts else None
    objective = (
        TeacherObjective(losses[s.teacher_loss](), examine) if paco is None else PaCoObjective(paco, examine)
    )

    def sharpness_aware(optimizer: Any, wrapped: nn.Module) -> SharpnessAwareSteps:
        objective.steps = SharpnessAwareSteps(optimizer, s.sam_rho, accelerator.backward, s.sam_rho_steps)
        return objective.steps

    accuracy = loop.run(
        Stage("teacher", s.lr, s.epochs),
        cnn if paco is None else paco,
        state=job.take_state(),
        after_update=None if paco is None else paco.advance,
        measured=sharpness_aware if s.sam_rho or s.sam_rho_steps else None,
        objective=objective,
    )
    accelerator.gradient_accumulation_steps = job.settings.grad_accum_steps
    job.folder.save_model(cnn if paco is None else paco.teacher(), TEACHER)
    job.folder.log("teacher", top1=accuracy.top1, class_mean=accuracy.class_mean)


def published_teacher(settings: Settings) -> nn.Module:
    """``settings.teacher_model`` with the weights that the authors' programs wrote to ``settings.teacher``.

    Raises:
        UserError: no such file, one that is more than tensors and plain data, or weights of another network.
    """
    flag = f"--teacher {settings.teacher}"
    try:
        checkpoint = torch.load(settings.teacher or "", weights_only=True, map_location="cpu")
    except OSError as error:
        raise UserError(f"{flag}: {error.strerror or error}.") from error
    except Exception as error:  # bytes that are no pickle make it raise anything
        raise UserError(
            f"{flag} is no file of tensors and plain data, and others are not opened, since they can run any "
            "code. Write its `state_dict` alone with torch.save where you trust it."
        ) from error
    try:
        weights = methods.convert_teacher_state_dict(checkpoint)
    except (ValueError, TypeError) as error:
        raise UserError(f"{flag} is no teacher that can be read: {error}") from error
    arguments: dict[str, Any] = {"num_classes": len(weights["fc.weight"])}
    if "fc.bias" not in weights and settings.teacher_model.endswith("_cifar"):
        arguments["cosine"] = True
    cnn = models.create(settings.teacher_model, flag="--teacher-model", **arguments)
    try:
        cnn.load_state_dict(weights)
    except RuntimeError as error:
        cosine = "fc.bias" not in weights
        raise UserError(
            f"{flag} does not fit --teacher-model {settings.teacher_model}: "
            f"{' '.join(str(error).split())[:300]}. It has a {'cosine' if cosine else 'linear'} classifier: "
            f"name {'resnet32_cifar or resnet50_cosine' if cosine else 'resnet32_cifar or resnet50'}."
        ) from error
    return cnn.eval()


def open_teacher(settings: Settings, data: Data, student: nn.Module) -> nn.Module:
    """The network of ``settings.teacher``.

    Raises:
        UserError: it is not there, or does not fit the data.
    """
    name, otherwise = settings.teacher or "", "Leave --teacher out to train one on this data."
    if models.is_file(name) and Path(name).suffix != ".safetensors":
        cnn = published_teacher(settings)
        models.check_classes(cnn, name, data, "--teacher", otherwise)
    else:
        cnn = models.trained(name, data, "--teacher", otherwise)
    chans, theirs = input_channels(student), input_channels(cnn)
    if chans != theirs:
        raise UserError(
            f"--teacher {name} takes images with {theirs} channels, but sees the student's, with {chans}."
        )
    return cnn


def _check(model: nn.Module, settings: Settings, data: Data) -> None:
    s = settings
    models.check_heads(model, s)
    student_loss(s, images_by_class(data))
    class_map(s, data.num_classes)
    if s.teacher is not None:
        open_teacher(s, data, model)
    else:
        check_batch_size(data, teacher_settings(s), "--set teacher_batch_size=")
        world = PartialState().num_processes
        if s.teacher_batch_size % world:
            raise UserError(
                f"--set teacher_batch_size={s.teacher_batch_size} must be a multiple of the {world} "
                "processes."
            )
        cnn = make_teacher(s, data)
        if s.teacher_loss == "paco":
            make_paco(cnn, s, images_by_class(data))


def distill(
    settings: Settings,
    out: Path,
    console: Console,
    resume: bool = False,
    overwrite: bool = False,
    given: Mapping[str, Any] | None = None,
) -> Outcome:
    """Train a teacher unless there is one, then a student with two heads that learns from it.

    Arguments and errors are those of :func:`pyvitfast.train.run.train`.
    """
    with _job("distill", settings, out, resume, overwrite, given or {}, console, _check) as job:
        s, data, accelerator = job.settings, job.data, job.accelerator
        student = models.for_data(s, data)[0] if job.stage == "teacher" else job.model
        counts = images_by_class(data)
        groups = methods.class_groups(counts)
        loss, numbers = student_loss(s, counts).to(accelerator.device), class_map(s, data.num_classes)
        if job.stage in (None, "teacher"):
            if s.teacher is None:
                train_teacher(job, counts)
            else:
                job.folder.save_model(open_teacher(s, data, student), TEACHER)
            accelerator.wait_for_everyone()
        cnn = load(job.folder.path / TEACHER).to(accelerator.device).eval().requires_grad_(False)
        data.fit_to(student, s)
        mixup = None
        if s.mixup > 0 or s.cutmix > 0:
            mixup = methods.PairedMixup(s.mixup, s.cutmix, None, s.mixup_prob, s.mixup_switch_prob)
        size = s.teacher_size or image_size(cnn)
        objective = StudentObjective(
            loss, methods.TeacherPipeline(cnn, size, class_map=numbers), mixup, examiner(job, groups)
        )
        accuracy = job.loop.run(
            Stage("student", s.lr, s.epochs), student, state=job.take_state(), objective=objective
        )
        plain: Any = student
        plain.set_distilled_training(False)
        log_heads(job, student, counts, groups)
        return _outcome(job, student, accuracy, None)


def log_heads(job: _Job, student: nn.Module, counts: list[int], groups: Mapping[str, list[int]]) -> None:
    """What the report draws: accuracy by head, group and class, ranks of both tokens, attention distances."""
    right, total = correct_by_class(student, job.data, job.settings, job.accelerator)
    if not job.folder.writes:
        return
    heads = {head: by_group(count, total, groups) for head, count in right.items()}
    job.folder.log(
        "heads",
        accuracy=heads,
        counts=counts,
        by_class={
            head: [100 * r / n if n else None for r, n in zip(count.tolist(), total.tolist(), strict=True)]
            for head, count in right.items()
        },
        **_looked_at(job, student),
    )
    for head, found in heads.items():
        parts = "  ".join(f"{name} {value:.2f} %" for name, value in found.items())
        job.reporter.say(f"{head.upper():4} {parts}")


def _looked_at(job: _Job, student: nn.Module) -> dict[str, Any]:
    """Ranks and distances, or the reason why there are none."""
    device, test = job.accelerator.device, job.data.test
    # Spread over the test images, which may come class by class.
    count = min(LOOKED_AT, len(test))
    places = [i * len(test) // count for i in range(count)]
    batches = [places[first : first + 64] for first in range(0, count, 64)]

    def images(batch: Sequence[int]) -> Tensor:
        return torch.stack([test[i, None][0] for i in batch]).to(device)

    try:
        ranks = methods.feature_rank(student, map(images, batches))
        distances = methods.attention_distance(student, images(places[:: max(1, count // 64)][:64]))
    except TypeError as error:
        return {"rank": {}, "attention_distance": [], "not_looked_at": str(error)}
    return {
        "rank": {"cls": ranks.cls, "dist": ranks.dist},
        "attention_distance": [[d for d in block if d == d] for block in distances.tolist()],
    }
