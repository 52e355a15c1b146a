"""The job of ``pyvitfast sparsify``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from pyvitfast.models.checkpoint import load
from pyvitfast.prune import apply_masks
from pyvitfast.prune import sparsify as make_sparse
from pyvitfast.train.errors import UserError
from pyvitfast.train.folder import DENSE
from pyvitfast.train.loop import Stage, evaluate
from pyvitfast.train.run import Outcome, _job, _outcome, train_dense
from pyvitfast.train.settings import Settings


def sparsify(
    settings: Settings,
    out: Path,
    console: Console,
    resume: bool = False,
    overwrite: bool = False,
    given: Mapping[str, Any] | None = None,
) -> Outcome:
    """Train unless the model comes from a file, make it 2:4 sparse, finetune with the zeros kept.

    Arguments and errors are those of :func:`pyvitfast.train.run.train`.
    """
    with _job("sparsify", settings, out, resume, overwrite, given or {}, console) as job:
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
