"""Whole jobs: train, evaluate, prune."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import gather_object
from rich.console import Console
from torch import Tensor, nn

from pyvitfast._version import __version__
from pyvitfast.models.checkpoint import load, write_atomically
from pyvitfast.prune import LatencyTable, NViTConfig, NViTPruner
from pyvitfast.train import model as models
from pyvitfast.train.data import Data, check_batch_size, open_data
from pyvitfast.train.errors import UserError
from pyvitfast.train.folder import DENSE, LATENCY, MODEL, RunFolder, Snapshot
from pyvitfast.train.loop import Accuracy, Loop, Stage, evaluate
from pyvitfast.train.progress import Reporter
from pyvitfast.train.settings import Settings
from pyvitfast.train.signals import StopRequest
from pyvitfast.train.teachers import make_teachers, open_cnn

# Refuses what cannot be done with a new model, before the folder is made.
Check = Callable[[nn.Module, Settings, Data], object]


@dataclass
class Outcome:
    """What a job leaves, for the report.

    Args:
        verb: the command.
        settings: of the run.
        folder: the output folder.
        model: the final model, on the CPU in eval mode.
        accuracy: its test accuracy.
        dense: the model before the method, or None.
        dense_accuracy: its test accuracy.
        events: everything in ``metrics.jsonl``.
        device: where the run was.
        samples: a few test images as the model takes them, [4, C, H, W].
        main: whether this is the main process, the one that reports.
    """

    verb: str
    settings: Settings
    folder: Path
    model: nn.Module
    accuracy: Accuracy
    dense: nn.Module | None
    dense_accuracy: Accuracy | None
    events: list[dict[str, Any]]
    device: str
    samples: Tensor
    main: bool


def accelerator_for(settings: Settings) -> Accelerator:
    """The accelerator for the device and precision in ``settings``.

    Raises:
        UserError: the device is unknown or not there, or cannot run the precision.
    """
    try:
        device = torch.device("cuda" if settings.device == "auto" else settings.device)
    except RuntimeError as error:
        raise UserError(f"--device must be auto, cpu, cuda or cuda:N, got {settings.device!r}.") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu, cuda or cuda:N, got {settings.device!r}.")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if settings.device != "auto" and device.type == "cuda" and (device.index or 0) >= there:
        why = f"torch {torch.__version__} sees {there} GPU(s)"
        raise UserError(
            f"--device {settings.device}: there is no such GPU ({why}). Use --device cpu or auto."
        )
    cpu = device.type == "cpu" or there == 0
    if cpu and settings.amp == "fp16":
        raise UserError("--amp fp16 needs a GPU; on the CPU use --amp bf16 or no.")
    # accelerate keeps the first device and precision of a process for ever; a second run may want others.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if not cpu and device.index is not None:
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    accelerator = Accelerator(
        cpu=cpu, mixed_precision=settings.amp, gradient_accumulation_steps=settings.grad_accum_steps
    )
    world = accelerator.num_processes
    if settings.batch_size % world:
        raise UserError(f"--batch-size {settings.batch_size} must be a multiple of the {world} processes.")
    return accelerator


def check_pairs(settings: Settings, world: int) -> None:
    """Raise UserError where mixup or cutmix would leave an image of a process's batch without a partner."""
    if (settings.mixup > 0 or settings.cutmix > 0) and settings.batch_size // world % 2:
        raise UserError(
            f"--batch-size {settings.batch_size} over {world} process(es) must give each an even number of "
            "images with mixup or cutmix."
        )


def _gather(names: list[str]) -> list[str]:
    joined: list[str] = gather_object(names)
    return joined


@dataclass
class _Job:
    """A job that is set up: folder made or found, data open, model built."""

    settings: Settings
    folder: RunFolder
    accelerator: Accelerator
    data: Data
    model: nn.Module
    origin: str
    snapshot: Snapshot | None
    loop: Loop
    reporter: Reporter

    @property
    def stage(self) -> str | None:
        """The stage of the checkpoint, or None at the start."""
        return self.snapshot.state["stage"] if self.snapshot else None

    @property
    def arm(self) -> str | None:
        """The arm of that stage."""
        return self.snapshot.state.get("arm") if self.snapshot else None

    def take_state(self) -> dict[str, Any] | None:
        """The checkpoint's state, for the first stage that runs only."""
        state = self.snapshot.state if self.snapshot else None
        self.snapshot = None
        return state


@contextmanager
def _job(
    verb: str,
    settings: Settings,
    out: Path,
    resume: bool,
    overwrite: bool,
    given: Mapping[str, Any],
    console: Console,
    check: Check | None = None,
) -> Iterator[_Job]:
    main = int(os.environ.get("RANK", "0")) == 0
    folder = RunFolder(out, verb, writes=main)
    reporter = Reporter(console if main else None)
    with StopRequest() as stop:
        try:
            snapshot: Snapshot | None = None
            if resume:
                settings, snapshot = folder.resume(given)
            accelerator = accelerator_for(settings)
            check_pairs(settings, accelerator.num_processes)
            data = open_data(settings, _gather)
            check_batch_size(data, settings)
            if snapshot is not None:
                model, origin = snapshot.model, snapshot.state["results"]["origin"]
            else:
                model, origin = models.for_data(settings, data)
                if check is not None:
                    check(model, settings, data)
            if not resume:
                folder.start(settings, overwrite)
                threads = torch.get_num_threads()
                versions = {"pyvitfast": __version__, "torch": torch.__version__, "timm": timm.__version__}
                folder.log("start", command=sys.argv, versions=versions, threads=threads, weights=origin)
            elif snapshot is not None:
                reporter.say(f"Going on from {snapshot.path}")
            data.fit_to(model, settings)
            loop = Loop(settings, data, folder, accelerator, reporter, stop)
            loop.results = snapshot.state["results"] if snapshot is not None else {"origin": origin}
            reporter.say(
                f"{settings.model} from {origin}, {data.name}: {len(data.train)} training and "
                f"{len(data.test)} test images, {data.num_classes} classes, on {accelerator.device}"
            )
            yield _Job(settings, folder, accelerator, data, model, origin, snapshot, loop, reporter)
            accelerator.wait_for_everyone()
        finally:
            folder.close()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def _outcome(job: _Job, model: nn.Module, accuracy: Accuracy, dense: nn.Module | None) -> Outcome:
    before = job.loop.results.get("dense")
    values = {"dense": before} if before else {}
    job.folder.save_model(model)
    job.folder.log("result", model=asdict(accuracy), **values)
    main = job.folder.writes
    return Outcome(
        verb=job.folder.verb,
        settings=job.settings,
        folder=job.folder.path,
        model=model.cpu().eval(),
        accuracy=accuracy,
        dense=dense,
        dense_accuracy=Accuracy(**before) if before else None,
        events=job.folder.events() if main else [],
        device=str(job.accelerator.device),
        samples=torch.stack([job.data.test[i, None][0] for i in range(min(4, len(job.data.test)))]),
        main=main,
    )


def train(
    settings: Settings,
    out: Path,
    console: Console,
    resume: bool = False,
    overwrite: bool = False,
    given: Mapping[str, Any] | None = None,
) -> Outcome:
    """Train a model.

    Args:
        settings: of the run; with ``resume`` those in the folder are taken.
        out: output folder.
        console: where progress goes.
        resume: go on with the run in ``out``.
        overwrite: start over in a folder that is not empty.
        given: settings named by the user again when resuming, compared with the folder's.

    Raises:
        UserError: settings, data, model or folder are not right.
        Interrupted: a signal stopped the run after its state was saved.
    """
    with _job("train", settings, out, resume, overwrite, given or {}, console) as job:
        s = job.settings
        if job.origin == models.RANDOM and job.snapshot is None:
            job.reporter.say(f"{s.model} starts from random weights (--pretrained loads timm's).")
        accuracy = job.loop.run(Stage("train", s.lr, s.epochs), job.model, state=job.take_state())
        return _outcome(job, job.model, accuracy, None)


def train_dense(job: _Job, does: str) -> None:
    """Train the job's model unless it comes from a file, and keep it and its accuracy as the dense one.

    ``does`` says what the verb does at once with a model from a file.
    """
    s, model = job.settings, job.model
    if job.origin == models.FILE:
        accuracy = evaluate(model.to(job.accelerator.device), job.data, s, job.accelerator)
    else:
        job.reporter.say(
            f"{s.model} starts from {job.origin}; it is trained for {s.epochs} epochs first "
            f"(--model FILE {does} at once)."
        )
        accuracy = job.loop.run(Stage("train", s.lr, s.epochs), model, state=job.take_state())
    job.loop.results["dense"] = asdict(accuracy)
    job.folder.save_model(model, DENSE)
    job.folder.log("dense", **asdict(accuracy))
    job.accelerator.wait_for_everyone()


def make_pruner(model: nn.Module, settings: Settings, latency: LatencyTable | None = None) -> NViTPruner:
    """The pruner of ``settings`` for ``model``.

    Without a table a latency budget is checked as one of MACs, which tells whether the model can be pruned
    at all.

    Raises:
        UserError: the model cannot be pruned or the target not be reached.
    """
    unknown = settings.budget == "latency" and latency is None
    changes: dict[str, Any] = {} if settings.eta is None else {"eta": settings.eta}
    try:
        config = NViTConfig.preset(
            settings.preset,
            target=0.999 if unknown else settings.target,
            budget="macs" if unknown else settings.budget,
            interval=settings.interval,
            groups_per_step=settings.groups_per_step,
            group_sizes=settings.group_sizes,
            cost_rule=settings.cost_rule,
            batch_size=settings.batch_size * settings.grad_accum_steps,
            **changes,
        )
        return NViTPruner(model, latency=latency, config=config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"--model {settings.model} cannot be pruned: {error}") from error


def _latency(job: _Job, model: nn.Module) -> LatencyTable | None:
    """The run's latency table: kept in the folder, so that a resumed run has the same one."""
    s, path = job.settings, job.folder.path / LATENCY
    if s.budget != "latency" and s.latency_table is None:
        return None
    try:
        if job.folder.writes and not path.is_file():
            if s.latency_table is not None:
                LatencyTable.load(s.latency_table).save(path)
            else:
                device = job.accelerator.device
                job.reporter.say(f"Measuring a latency table, batch {s.latency_batch_size} on {device}.")
                LatencyTable.measure(
                    model, device, s.latency_batch_size, progress=job.reporter.is_terminal
                ).save(path)
        job.accelerator.wait_for_everyone()
        return LatencyTable.load(path)
    except FileNotFoundError as error:
        raise UserError(f"--latency-table {s.latency_table}: no such file.") from error
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"the latency table of --model {s.model}: {error}") from error


def _check(model: nn.Module, settings: Settings, data: Data) -> None:
    make_pruner(model, settings)


def prune(
    settings: Settings,
    out: Path,
    console: Console,
    resume: bool = False,
    overwrite: bool = False,
    given: Mapping[str, Any] | None = None,
) -> Outcome:
    """Train unless the model comes from a file, prune while training, compact, finetune.

    Arguments and errors are those of :func:`train`.
    """
    with _job("prune", settings, out, resume, overwrite, given or {}, console, _check) as job:
        s, loop, model = job.settings, job.loop, job.model
        cnn = open_cnn(s, job.data, model)
        table = None
        if job.stage in (None, "train", "prune"):
            # All that may refuse comes before hours of training.
            table = _latency(job, model)
            make_pruner(model, s, table)
        if job.stage in (None, "train"):
            train_dense(job, "prunes a trained model")
        dense = load(job.folder.path / DENSE)
        noise = s.preset != "nvit_repo"
        if job.stage in (None, "prune"):
            pruner = make_pruner(model.to(job.accelerator.device), s, table)
            teachers = make_teachers(s, "prune", dense, cnn, job.accelerator.device)
            stage = Stage("prune", s.prune_lr, None, noise)
            loop.run(stage, model, pruner, job.take_state(), teachers)
            model = pruner.compact()
            cut = evaluate(model, job.data, s, job.accelerator)
            job.folder.log("compact", **asdict(cut), dims=pruner.dims.to_dict(), skipped=pruner.skipped)
            job.reporter.say(f"compacted after {len(pruner.history)} removals: top-1 {cut.top1:.2f} %")
        accuracy = loop.run(
            Stage("finetune", s.finetune_lr, s.finetune_epochs, noise),
            model,
            state=job.take_state(),
            teachers=make_teachers(s, "finetune", dense, cnn, job.accelerator.device),
        )
        return _outcome(job, model, accuracy, dense)


def evaluate_model(settings: Settings, console: Console, json_path: Path | None = None) -> dict[str, Any]:
    """Test accuracy of ``settings.model``; printed, and written to ``json_path`` if given.

    Raises:
        UserError: settings, data or model are not right, or the file cannot be written.
    """
    accelerator = accelerator_for(settings)
    data = open_data(settings, _gather)
    model, origin = models.for_data(settings, data)
    data.fit_to(model, settings)
    started = time.perf_counter()
    accuracy = evaluate(model.to(accelerator.device), data, settings, accelerator)
    result = {
        "model": settings.model,
        "weights": origin,
        "data": settings.data,
        "images": len(data.test),
        **asdict(accuracy),
        "seconds": round(time.perf_counter() - started, 3),
    }
    if accelerator.is_main_process:
        Reporter(console).say(
            f"{settings.model} ({origin}) on {len(data.test)} test images of {settings.data}: "
            f"top-1 {accuracy.top1:.2f} %, mean over classes {accuracy.class_mean:.2f} %"
        )
        if json_path is not None:
            try:
                write_atomically(json_path, json.dumps(result, indent=2).encode())
            except OSError as error:
                raise UserError(
                    f"--json {json_path} cannot be written: {error.strerror or error}."
                ) from error
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return result


__all__ = ["MODEL", "Outcome", "evaluate_model", "prune", "train"]
