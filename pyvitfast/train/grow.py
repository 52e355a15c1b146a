"""The job of ``pyvitfast grow``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pyvitfast import grow as growth
from pyvitfast.models.checkpoint import load
from pyvitfast.models.summary import summary
from pyvitfast.train import model as models
from pyvitfast.train.folder import DENSE, GROWN
from pyvitfast.train.loop import Loop, Stage, evaluate
from pyvitfast.train.run import Outcome, _Job, _job, _outcome, train_dense
from pyvitfast.train.savings import Costs, saving, update_flops
from pyvitfast.train.settings import Settings

SCRATCH = "scratch"


def grow(
    settings: Settings,
    out: Path,
    console: Console,
    resume: bool = False,
    overwrite: bool = False,
    given: Mapping[str, Any] | None = None,
) -> Outcome:
    """Train the source unless it comes from a file, grow it, train the target.

    Arguments and errors are those of :func:`pyvitfast.train.run.train`.
    """
    with _job("grow", settings, out, resume, overwrite, given or {}, console) as job:
        s, loop, device = job.settings, job.loop, job.accelerator.device
        arm = s.method if s.compare else ""
        if job.stage in (None, "train"):
            train_dense(job, "grows a trained model")
        small = load(job.folder.path / DENSE)
        begun = job.stage == "finetune"
        if s.compare and not (begun and job.arm != SCRATCH):
            model = job.model if begun else models.target_of(small, s)
            stage = Stage("finetune", s.lr, s.finetune_epochs, arm=SCRATCH)
            loop.run(stage, model, state=job.take_state() if begun else None)
            begun = False
        if not begun:
            _grow(job, small)
            job.take_state()
        model = job.model if begun else load(job.folder.path / GROWN)
        accuracy = loop.run(
            Stage("finetune", s.lr, s.finetune_epochs, arm=arm), model, state=job.take_state()
        )
        if s.compare:
            _tell_savings(job)
        return _outcome(job, model.to(device), accuracy, small)


class _Stream:
    """The run's training batches on its device, another epoch each time."""

    def __init__(self, loop: Loop) -> None:
        self.loop, self.epoch = loop, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self.loop.stream("grow", self.epoch)
        self.epoch += 1


def _grow(job: _Job, small: nn.Module) -> None:
    s, loop, device = job.settings, job.loop, job.accelerator.device
    images = s.batch_size * s.grad_accum_steps
    costs = {"update": update_flops(summary(models.target_of(small, s)).macs, images)}
    training: dict[str, Any] = {}
    if s.method in ("mango", "ligo") and s.operator_steps:
        training = {
            "loader": _Stream(loop),
            "loss_fn": loop.loss,
            "steps": s.operator_steps,
            "lr": s.operator_lr,
            "device": device,
        }
    if job.folder.writes:
        # One process grows: operators that learn from different shares would part.
        grown = models.grown(small.train(), s, **training).cpu()
        report = growth.report(grown)
        if training:
            costs["operator"] = s.operator_steps * (costs["update"] + _operator_flops(small, s))
        job.folder.save_model(grown, GROWN)
        job.reporter.say(str(report))
    job.accelerator.wait_for_everyone()
    grown = load(job.folder.path / GROWN)
    accuracy = evaluate(grown.to(device), job.data, s, job.accelerator)
    updates = max(1, len(loop.batches) // s.grad_accum_steps)
    if job.origin != models.FILE:
        costs["source"] = s.epochs * updates * update_flops(summary(small).macs, images)
    job.folder.log("grown", method=s.method, flops=costs, **asdict(accuracy))
    job.reporter.say(f"grown by {s.method}: top-1 {accuracy.top1:.2f} %")


def _operator_flops(small: nn.Module, s: Settings) -> float:
    """Operations of an evaluation of the operator and its gradients."""
    kinds: dict[str, Any] = {"mango": growth.MangoOperator, "ligo": growth.LiGOOperator}
    options = {"rank": s.rank} if s.method == "mango" else {}
    operator = kinds[s.method](small.cpu(), models.target_of(small, s), **options)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        operator.weights()
    return 3.0 * float(counter.get_total_flops())


def _tell_savings(job: _Job) -> None:
    if not job.folder.writes:
        return
    events = job.folder.events()
    (grown,) = (e for e in events if e["event"] == "grown")
    curves = {
        arm: [(e["updates"], e["top1"]) for e in events if e["event"] == "epoch" and e.get("arm") == arm]
        for arm in (SCRATCH, job.settings.method)
    }
    mine = [(0, grown["top1"]), *curves[job.settings.method]]
    # Of a short run five evaluations would be half of the curve.
    last = max(1, min(5, len(curves[SCRATCH]) // 5))
    found = saving(curves[SCRATCH], mine, Costs(**grown["flops"]), last)
    job.folder.log("saving", arm=job.settings.method, **found.to_dict())
    job.reporter.say(f"{job.settings.method} {found}")
