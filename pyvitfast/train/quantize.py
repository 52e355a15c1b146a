"""The job of ``pyvitfast quantize``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from pyvitfast.models.checkpoint import load
from pyvitfast.quantize import FOGZO, convert, report
from pyvitfast.train import model as models
from pyvitfast.train.data import Data
from pyvitfast.train.errors import UserError
from pyvitfast.train.folder import DENSE
from pyvitfast.train.loop import Stage, evaluate
from pyvitfast.train.run import Outcome, _Job, _job, _outcome, train_dense
from pyvitfast.train.settings import Settings


def quantize(
    settings: Settings,
    out: Path,
    console: Console,
    resume: bool = False,
    overwrite: bool = False,
    given: Mapping[str, Any] | None = None,
) -> Outcome:
    """Train unless the model comes from a file, finetune it with quantised weights, pack them.

    Arguments and errors are those of :func:`pyvitfast.train.run.train`.
    """
    with _job("quantize", settings, out, resume, overwrite, given or {}, console, _check) as job:
        s, loop, model = job.settings, job.loop, job.model
        if job.stage in (None, "train"):
            train_dense(job, "quantises a trained model")
            models.quantise(model, s)
            found, rounded = report(model), evaluate(model, job.data, s, job.accelerator)
            job.folder.log("quantized", **asdict(rounded), **found.to_dict())
            job.reporter.say(f"{found}\nrounded: top-1 {rounded.top1:.2f} %")
        compares = s.compare and s.estimator != "ste"
        if compares and job.arm != s.estimator:
            straight = model if job.arm == "ste" else _prepared(job)
            stage = Stage("finetune", s.finetune_lr, s.finetune_epochs, arm="ste")
            loop.run(stage, straight, state=job.take_state())
            model = _prepared(job)
        updates = loop.updates_per_epoch * s.finetune_epochs

        def measured(optimizer: Any, wrapped: nn.Module) -> FOGZO:
            return FOGZO(
                optimizer,
                wrapped,
                estimator=s.estimator,
                n=s.directions,
                omega=s.omega,
                total_steps=max(1, updates),
                start_frac=s.start_frac if s.estimator == "fogzo" else 0.0,
                clip_grad_norm=s.clip_grad,
                seed=s.seed,
            )

        loop.run(
            Stage("finetune", s.finetune_lr, s.finetune_epochs, arm=s.estimator if compares else ""),
            model,
            state=job.take_state(),
            measured=None if s.estimator == "ste" else measured,
        )
        try:
            low = convert(model)
        except ValueError as error:
            raise UserError(f"the trained model cannot be packed: {error}") from error
        accuracy = evaluate(low.to(job.accelerator.device), job.data, s, job.accelerator)
        return _outcome(job, low, accuracy, load(job.folder.path / DENSE))


def _check(model: nn.Module, settings: Settings, data: Data) -> None:
    models.check_quantization(model, settings)


def _prepared(job: _Job) -> nn.Module:
    """The dense model of the folder with quantised weights."""
    model = load(job.folder.path / DENSE)
    models.quantise(model, job.settings)
    return model
