"""The training loop: stages of epochs on accelerate, resumable at every optimizer update."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import timm.data
import timm.loss
import timm.optim
import timm.scheduler
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.layers import DropPath, PatchDropout
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from pyvitfast.prune import NViTPruner
from pyvitfast.train.data import Data, EpochBatches, make_loader
from pyvitfast.train.errors import Interrupted, UserError
from pyvitfast.train.folder import RunFolder
from pyvitfast.train.progress import Reporter
from pyvitfast.train.settings import Settings
from pyvitfast.train.signals import StopRequest
from pyvitfast.train.teachers import Teachers

# Of the epochs, where ``multistep`` steps: 160 and 180 of 200 (Cao et al., NeurIPS 2019).
MILESTONES = (0.8, 0.9)

STAGES = ("train", "prune", "finetune", "grow", "teacher", "student")


@dataclass(frozen=True)
class Stage:
    """A part of a run with an optimizer of its own.

    Args:
        name: one of :data:`STAGES`.
        lr: peak learning rate.
        epochs: number of epochs; None goes on until the pruner is done, at a constant learning rate.
        noise: let dropout and drop path act; with a pruner they act until its first removal in any case.
        arm: tells apart runs of one stage that are compared; they see the same batches.
    """

    name: str
    lr: float
    epochs: int | None
    noise: bool = True
    arm: str = ""

    @property
    def title(self) -> str:
        """Name and arm."""
        return f"{self.name} ({self.arm})" if self.arm else self.name


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on the test split, in percent: over all images, and the mean over classes."""

    top1: float
    class_mean: float


class Stepper(Protocol):
    """What takes an optimizer's steps from a closure that computes the loss alone."""

    @property
    def stats(self) -> dict[str, Any]:
        """Counts for the metrics of an epoch, ``measured_steps`` among them."""

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """One step; the closure may be called several times."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, the optimizer's state among it."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""


class Objective:
    """What a stage minimises and how it is judged, in place of the cross-entropy with labels."""

    def begin(self, model: nn.Module, epoch: int) -> None:
        """An epoch, from 0, begins; also after a resume in it."""

    @property
    def whole_updates(self) -> bool:
        """Whether :meth:`prepare` has to see all batches of an optimizer update at once in this epoch."""
        return False

    def prepare(self, batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Any]]:
        """Images as the model sees them and targets, of the images and labels of one or more batches."""
        return list(batches)

    def loss(self, model: nn.Module, images: Tensor, target: Any) -> Tensor:
        """The loss of a batch, a scalar, by ``model`` as processes share it."""
        raise NotImplementedError

    def examine(self, model: nn.Module) -> tuple[Accuracy, dict[str, Any]]:
        """Test accuracy, and more for the metrics of the epoch."""
        raise NotImplementedError

    def network(self, model: nn.Module) -> nn.Module:
        """What of ``model`` a checkpoint keeps as a model file."""
        return model

    def state_dict(self, model: nn.Module) -> dict[str, Any]:
        """What a resumed run needs besides."""
        return {}

    def load_state_dict(self, model: nn.Module, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""


def seed_process(*entropy: int) -> None:
    """Seed python, numpy and torch from ``entropy``."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The state of all random number generators, as plain data and tensors."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """The inverse of :func:`random_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, settings: Settings, accelerator: Accelerator) -> Accuracy:
    """Accuracy of ``model`` on the test split, shared out over the processes."""
    rank, world = accelerator.process_index, accelerator.num_processes
    batches = EpochBatches(data.test, settings.batch_size, 1, rank, world, shuffle=False)
    kinds = {"top1": "micro", "class_mean": "macro"}
    metrics = {
        key: MulticlassAccuracy(data.num_classes, average=average).to(accelerator.device)
        for key, average in kinds.items()
    }
    training = model.training
    model.eval()
    for images, labels in make_loader(batches, settings.workers, accelerator.device.type == "cuda"):
        with accelerator.autocast():
            logits = model(images.to(accelerator.device, non_blocking=True))
        for metric in metrics.values():
            metric.update(logits, labels.to(accelerator.device))
    model.train(training)
    return Accuracy(**{key: 100 * float(metric.compute()) for key, metric in metrics.items()})


class Loop:
    """Runs stages; writes metrics and checkpoints.

    Args:
        settings: of the run.
        data: the splits, already fitted to the model.
        folder: where metrics and checkpoints go.
        accelerator: device, precision and processes.
        reporter: what is printed.
        stop: the wish of a signal to stop.
    """

    def __init__(
        self,
        settings: Settings,
        data: Data,
        folder: RunFolder,
        accelerator: Accelerator,
        reporter: Reporter,
        stop: StopRequest,
    ) -> None:
        self.settings, self.data, self.folder = settings, data, folder
        self.accelerator, self.reporter, self.stop = accelerator, reporter, stop
        rank, world = accelerator.process_index, accelerator.num_processes
        group = settings.grad_accum_steps
        self.batches = EpochBatches(
            data.train, settings.batch_size, group, rank, world, True, settings.aug_repeats
        )
        self.loader = make_loader(self.batches, settings.workers, accelerator.device.type == "cuda")
        self.results: dict[str, Any] = {}
        self._mixup: timm.data.Mixup | None = None
        if settings.mixup > 0 or settings.cutmix > 0:
            self._mixup = timm.data.Mixup(
                mixup_alpha=settings.mixup,
                cutmix_alpha=settings.cutmix,
                prob=settings.mixup_prob,
                switch_prob=settings.mixup_switch_prob,
                label_smoothing=settings.smoothing,
                num_classes=data.num_classes,
            )
            self._loss: nn.Module = timm.loss.SoftTargetCrossEntropy()
        else:
            self._loss = nn.CrossEntropyLoss(label_smoothing=settings.smoothing)

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer updates in an epoch, 1 at least."""
        return max(1, len(self.batches) // self.settings.grad_accum_steps)

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        """The training loss of a batch."""
        found: Tensor = self._loss(output, labels)
        return found

    def stream(self, stage: str, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches of an epoch on the device, as a stage sees them, for what trains itself.

        Raises:
            Interrupted: a signal came; a resumed run begins at the checkpoint of :meth:`mark`.
        """
        entropy = (self.settings.seed, STAGES.index(stage), epoch)
        self.batches.seed, self.batches.start = entropy, 0
        seed_process(*entropy, self.accelerator.process_index)
        for place, (images, labels) in enumerate(self.loader):
            if signum := self._stop_signal(place):
                self._leave(signum)
            yield self._on_device(images, labels)

    def mark(self, stage: str, model: nn.Module) -> None:
        """Write a checkpoint at the start of a stage that a resumed run does anew."""
        if self.folder.writes:
            world = self.accelerator.num_processes
            state = {"stage": stage, "arm": "", "world": world, "results": self.results}
            self.folder.checkpoint(model, state)

    def _on_device(self, images: Tensor, labels: Tensor, mix: bool = True) -> tuple[Tensor, Tensor]:
        device = self.accelerator.device
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        if mix and self._mixup is not None:
            images, labels = self._mixup(images, labels)
        return images, labels

    def _batches(self, objective: Objective | None) -> Iterator[tuple[Tensor, Any]]:
        """Images and targets of the training batches that are left of an epoch."""
        if objective is None:
            for images, labels in self.loader:
                yield self._on_device(images, labels)
            return
        loader = iter(self.loader)
        size = self.settings.grad_accum_steps if objective.whole_updates else 1
        while batches := [self._on_device(x, y, False) for x, y in itertools.islice(loader, size)]:
            with self.accelerator.autocast():
                prepared = objective.prepare(batches)
            yield from prepared

    def schedule(self, optimizer: Any, stage: Stage) -> Any:
        """timm's schedule over the updates of ``stage``, or None for a constant learning rate."""
        s = self.settings
        if not stage.epochs or s.sched == "none":
            return None
        updates = self.updates_per_epoch
        scheduler, _ = timm.scheduler.create_scheduler_v2(
            optimizer,
            sched=s.sched,
            num_epochs=stage.epochs,
            decay_epochs=max(1, stage.epochs // 3),
            # Half an update later, for timm steps an update early.
            decay_milestones=[round(part * stage.epochs) + 0.5 / updates for part in MILESTONES],
            decay_rate=s.decay_rate or (0.01 if s.sched == "multistep" else 0.1),
            warmup_epochs=min(s.warmup_epochs, stage.epochs - 1),
            warmup_lr=s.warmup_lr,
            min_lr=s.min_lr,
            step_on_epochs=False,
            updates_per_epoch=updates,
        )
        return scheduler

    def run(
        self,
        stage: Stage,
        model: nn.Module,
        pruner: NViTPruner | None = None,
        state: dict[str, Any] | None = None,
        teachers: Teachers | None = None,
        after_update: Callable[[], None] | None = None,
        measured: Callable[[Any, nn.Module], Stepper] | None = None,
        objective: Objective | None = None,
    ) -> Accuracy:
        """Train ``model`` through ``stage``.

        Args:
            stage: what to do.
            model: on the CPU or the run's device; trained in place.
            pruner: steps the optimizer and ends the stage.
            state: of a checkpoint inside this stage, to go on from.
            teachers: whom to learn from besides the labels; with a pruner, from the dense model only once
                something is removed.
            after_update: called after each optimizer update.
            measured: makes, of the optimizer and the model as processes share it, what takes the steps.
            objective: in place of labels and teachers.

        Returns:
            Test accuracy at the end of the stage.

        Raises:
            Interrupted: a signal came; the state was saved.
            UserError: the loss is not finite.
        """
        s, accelerator = self.settings, self.accelerator
        optimizer = timm.optim.create_optimizer_v2(model, opt=s.opt, lr=stage.lr, weight_decay=s.weight_decay)
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        scheduler = self.schedule(optimizer, stage)
        progress = _Progress()
        steps = measured(optimizer, wrapped) if measured is not None else None
        if state is not None:
            optimizer.load_state_dict(state["optimizer"])
            if steps is not None:
                steps.load_state_dict({**state["measured"], "optimizer": state["optimizer"]})
            if pruner is not None:
                pruner.load_state_dict(state["pruner"])
            if accelerator.scaler is not None and state["scaler"]:
                accelerator.scaler.load_state_dict(state["scaler"])
            if objective is not None:
                objective.load_state_dict(model, state["objective"])
            progress = _Progress(**state["progress"])
            self.check_world(state)
        if teachers is not None:
            teachers.attach(model, True)
        running = _Running(
            stage, wrapped, model, optimizer, scheduler, pruner, teachers, progress, after_update, steps,
            objective,
        )  # fmt: skip
        if state is None:
            self._save(running)
        accuracy: Accuracy | None = None
        for epoch in itertools.count(progress.epoch):
            if epoch == stage.epochs or (pruner is not None and pruner.done):
                break
            accuracy = self._epoch(running, epoch, state)
            state = None
        if teachers is not None:
            teachers.attach(model, False)
        accuracy = accuracy or self._examine(running)[0]
        # Takes accelerate's autocast wrapper off the model's forward, so the next stage can put its own on.
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        accelerator.free_memory()
        return accuracy

    def _epoch(self, running: _Running, epoch: int, state: dict[str, Any] | None) -> Accuracy:
        s, accelerator, progress, stage = self.settings, self.accelerator, running.progress, running.stage
        entropy = (s.seed, STAGES.index(stage.name), epoch)
        self.batches.seed, self.batches.start = entropy, progress.batch
        started = time.perf_counter()
        loss_sum = torch.tensor(progress.loss_sum, dtype=torch.float64, device=accelerator.device)
        title = f"{stage.title} {epoch + 1}" + (f"/{stage.epochs}" if stage.epochs else "")
        self.reporter.begin(title, len(self.batches), progress.batch)
        if state is not None and progress.batch:
            set_random_state(state["random"][accelerator.process_index])
        else:
            seed_process(*entropy, accelerator.process_index)
        running.train()
        if running.objective is not None:
            running.objective.begin(running.model, epoch)
        try:
            for loss in self._steps(running):
                loss_sum += loss
                progress.batch += 1
                self.reporter.advance()
                if accelerator.sync_gradients:
                    if running.pruner is not None and running.pruner.done:
                        break
                    if signum := self._stop_signal(progress.updates):
                        progress.loss_sum = self._mine_to_all(loss_sum)
                        self._interrupt(running, signum)
        finally:
            self.reporter.end()
        mean_loss = float(accelerator.reduce(loss_sum, "sum")) / max(
            1, progress.batch * accelerator.num_processes
        )
        if not math.isfinite(mean_loss):
            raise UserError(
                f"the loss became {mean_loss} in {stage.name} epoch {epoch + 1}. Lower the learning rate "
                f"(now {stage.lr:g}), set --set clip_grad=1, or use --amp bf16 in place of fp16."
            )
        accuracy, more = self._examine(running)
        self._report_epoch(running, epoch, title, mean_loss, accuracy, time.perf_counter() - started, more)
        running.progress.next_epoch(epoch + 1)
        self._save(running)
        if signum := self._stop_signal(0):
            self._leave(signum)
        return accuracy

    def _examine(self, running: _Running) -> tuple[Accuracy, dict[str, Any]]:
        if running.objective is not None:
            return running.objective.examine(running.model)
        return evaluate(running.model, self.data, self.settings, self.accelerator), {}

    def _steps(self, running: _Running) -> Iterator[Tensor]:
        accelerator, optimizer, pruner = self.accelerator, running.optimizer, running.pruner
        for images, labels in self._batches(running.objective):
            with accelerator.accumulate(running.wrapped):
                if running.scheduler is not None:
                    running.scheduler.step_update(running.progress.updates)
                if running.measured is not None:
                    loss = self._measure(running.measured, running, images, labels)
                else:
                    loss = self._objective(running, images, labels)
                    accelerator.backward(loss)
                if accelerator.sync_gradients:
                    if running.measured is None:
                        self._update(running)
                    if running.after_update is not None:
                        running.after_update()
                    running.progress.updates += 1
                    if pruner is None or not pruner.done:
                        optimizer.zero_grad()
            yield loss.detach()

    def _measure(self, steps: Stepper, running: _Running, images: Tensor, labels: Any) -> Tensor:
        return steps.step(lambda: self._objective(running, images, labels).float())

    def _objective(self, running: _Running, images: Tensor, labels: Any) -> Tensor:
        if running.objective is not None:
            with self.accelerator.autocast():
                return running.objective.loss(running.wrapped, images, labels)
        output, teachers = running.wrapped(images), running.teachers
        if teachers is None:
            return self.loss(output, labels)
        with self.accelerator.autocast():
            dense, cnn = teachers.soft(images, dense=running.pruned)
        found: Tensor = teachers.loss(output, labels, dense=dense, cnn=cnn)
        return found

    def _update(self, running: _Running) -> None:
        pruner, optimizer, clip = running.pruner, running.optimizer, self.settings.clip_grad
        if pruner is None:
            if clip is not None:
                self.accelerator.clip_grad_norm_(running.wrapped.parameters(), clip)
            optimizer.step()
            return
        self.accelerator.unscale_gradients()
        if pruner.config.score_after_update:
            if clip is not None:
                self.accelerator.clip_grad_norm_(running.wrapped.parameters(), clip)
            report = pruner.step(optimizer)
        else:
            # Scores want the gradients as they are, so clipping comes after the pruner has seen them.
            report = pruner.step(optimizer, update=False)
            if clip is not None:
                self.accelerator.clip_grad_norm_(running.wrapped.parameters(), clip)
            optimizer.step()
        if report is not None:
            running.train()
            shares = {key: report[key] for key in ("budget", "macs", "params")}
            self.folder.log("prune", updates=running.progress.updates + 1, **shares, dims=report["dims"])

    def _report_epoch(
        self,
        running: _Running,
        epoch: int,
        title: str,
        loss: float,
        accuracy: Accuracy,
        seconds: float,
        more: dict[str, Any],
    ) -> None:
        values: dict[str, Any] = {
            "stage": running.stage.name,
            **({"arm": running.stage.arm} if running.stage.arm else {}),
            "epoch": epoch + 1,
            "updates": running.progress.updates,
            "lr": running.optimizer.param_groups[0]["lr"],
            "train_loss": loss,
            "top1": accuracy.top1,
            "class_mean": accuracy.class_mean,
            **more,
        }
        left = ""
        if running.pruner is not None:
            history = running.pruner.history
            latest = history[-1] if history else {"macs": 1.0, "params": 1.0, "budget": 1.0}
            values |= {"macs": latest["macs"], "params": latest["params"]}
            left = f"  MACs {100 * latest['macs']:.1f} %  params {100 * latest['params']:.1f} %"
            if self.settings.budget == "latency":
                values["latency"] = latest["budget"]
                left += f"  latency {100 * latest['budget']:.1f} %"
        if running.measured is not None and running.measured.stats["measured_steps"]:
            values |= {"measured": running.measured.stats}
        self.folder.log("epoch", **values, seconds=round(seconds, 3))
        self.reporter.say(f"{title}: loss {loss:.4f}  top-1 {accuracy.top1:.2f} %{left}  {seconds:.1f} s")

    def _stop_signal(self, updates: int) -> int:
        world = self.accelerator.num_processes
        if world == 1:
            return self.stop.signum
        # All processes must stop at the same update; asking the others costs a synchronisation.
        if updates % 10:
            return 0
        mine = torch.tensor([self.stop.signum], device=self.accelerator.device)
        return int(self.accelerator.gather(mine).max())

    def _mine_to_all(self, loss_sum: Tensor) -> float:
        """The mean over processes, from which each goes on after a resume."""
        return float(self.accelerator.reduce(loss_sum, "mean"))

    def _interrupt(self, running: _Running, signum: int) -> None:
        self._save(running)
        self._leave(signum)

    def _leave(self, signum: int) -> None:
        command = f"pyvitfast {self.folder.verb} --resume --out {self.folder.path}"
        raise Interrupted(signum, f"Stopped; a checkpoint is saved. Go on with: {command}")

    def check_world(self, state: dict[str, Any]) -> None:
        """Raise UserError unless as many processes wrote the checkpoint's ``state``."""
        if state["world"] != self.accelerator.num_processes:
            raise UserError(
                f"--resume: the run used {state['world']} process(es), now there are "
                f"{self.accelerator.num_processes}. Start as many."
            )

    def _save(self, running: _Running) -> None:
        scaler, objective = self.accelerator.scaler, running.objective
        randoms = gather_object([random_state()])
        if not self.folder.writes:
            return
        state = {
            "stage": running.stage.name,
            "arm": running.stage.arm,
            "progress": vars(running.progress),
            "optimizer": running.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "pruner": running.pruner.state_dict() if running.pruner is not None else None,
            "measured": _without_optimizer(running.measured),
            "objective": objective.state_dict(running.model) if objective is not None else None,
            "random": randoms,
            "world": self.accelerator.num_processes,
            "results": self.results,
        }
        network = running.model if objective is None else objective.network(running.model)
        self.folder.checkpoint(network, state)


def _without_optimizer(measured: Stepper | None) -> dict[str, Any] | None:
    """Its state but the optimizer's, which is saved anyway."""
    if measured is None:
        return None
    return {key: value for key, value in measured.state_dict().items() if key != "optimizer"}


@dataclass
class _Progress:
    """How far a stage is: epochs done, and batches and loss of the epoch in progress."""

    epoch: int = 0
    batch: int = 0
    updates: int = 0
    loss_sum: float = 0.0

    def next_epoch(self, epoch: int) -> None:
        self.epoch, self.batch, self.loss_sum = epoch, 0, 0.0


@dataclass
class _Running:
    """What belongs together while a stage runs."""

    stage: Stage
    wrapped: nn.Module
    model: nn.Module
    optimizer: Any
    scheduler: Any
    pruner: NViTPruner | None
    teachers: Teachers | None
    progress: _Progress
    after_update: Callable[[], None] | None = None
    measured: Stepper | None = None
    objective: Objective | None = None

    @property
    def pruned(self) -> bool:
        """Whether the student differs from the dense model already."""
        return self.pruner is None or bool(self.pruner.history)

    def train(self) -> None:
        """Training mode; noise only where the stage wants it."""
        self.wrapped.train()
        if not self.stage.noise and self.pruned:
            for module in self.model.modules():
                if isinstance(module, nn.Dropout | DropPath | PatchDropout):
                    module.eval()
