"""The job of ``pyvitfast sparsify``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from pyvitfast import tokens
from pyvitfast.models.checkpoint import load
from pyvitfast.prune import apply_masks
from pyvitfast.prune import sparsify as make_sparse
from pyvitfast.train import model as models
from pyvitfast.train.data import Data
from pyvitfast.train.errors import UserError
from pyvitfast.train.folder import DENSE
from pyvitfast.train.loop import Stage, evaluate
from pyvitfast.train.run import Outcome, _Job, _job, _outcome, train_dense
from pyvitfast.train.settings import Settings


def sparsify(
    settings: Settings,
    out: Path,
    console: Console,
    resume: bool = False,
    overwrite: bool = False,
    given: Mapping[str, Any] | None = None,
) -> Outcome:
    """Train unless the model comes from a file, make it sparse, finetune.

    With ``settings.tokens`` a few semantic tokens take the place of the image tokens, else weights become 2:4
    sparse and their zeros are kept. Arguments and errors are those of :func:`pyvitfast.train.run.train`.
    """
    with _job("sparsify", settings, out, resume, overwrite, given or {}, console, _check) as job:
        return _weights(job) if job.settings.tokens is None else _tokens(job)


def _check(model: nn.Module, settings: Settings, data: Data) -> None:
    if settings.tokens is None:
        models.check_sparsity(model, settings.model)
    else:
        models.with_tokens(model, settings)


def _tokens(job: _Job) -> Outcome:
    s, device = job.settings, job.accelerator.device
    if job.stage in (None, "train"):
        train_dense(job, "gives a trained model semantic tokens")
        model = models.with_tokens(load(job.folder.path / DENSE), s)
        found = tokens.report(model)
        accuracy = evaluate(model.to(device), job.data, s, job.accelerator)
        job.folder.log("tokens", **asdict(accuracy), **found.to_dict())
        job.reporter.say(f"{found}\nat once: top-1 {accuracy.top1:.2f} %")
    else:
        model = job.model
    accuracy = job.loop.run(
        Stage("finetune", s.finetune_lr, s.finetune_epochs), model, state=job.take_state()
    )
    return _outcome(job, model, accuracy, load(job.folder.path / DENSE))


def _weights(job: _Job) -> Outcome:
    s, loop, model, device = job.settings, job.loop, job.model, job.accelerator.device
    fresh = job.stage in (None, "train")
    if fresh:
        train_dense(job, "makes a trained model sparse")
    try:
        # From the dense file, so that a resumed run has the same masks.
        _, report = make_sparse(load(job.folder.path / DENSE))
    except ValueError as error:
        raise UserError(f"--model {s.model} cannot be made sparse: {error}") from error
    masks = {name: mask.to(device) for name, mask in report.masks.items()}
    if fresh:
        apply_masks(model, masks)
        cut = evaluate(model, job.data, s, job.accelerator)
        job.folder.log("sparse", **asdict(cut), **report.to_dict())
        job.reporter.say(f"{report}\nsparse: top-1 {cut.top1:.2f} %")
    accuracy = loop.run(
        Stage("finetune", s.finetune_lr, s.finetune_epochs),
        model,
        state=job.take_state(),
        after_update=lambda: apply_masks(model, masks),
    )
    return _outcome(job, model, accuracy, load(job.folder.path / DENSE))
