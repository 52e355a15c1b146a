"""The job of ``pyvitfast grow``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, distributed, nn
from torch.utils.flop_counter import FlopCounterMode

from pyvitfast import grow as growth
from pyvitfast.grow.models import keep_normalisation
from pyvitfast.models.checkpoint import load
from pyvitfast.models.summary import summary
from pyvitfast.train import model as models
from pyvitfast.train.data import Data
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
    with _job("grow", settings, out, resume, overwrite, given or {}, console, _check) as job:
        s, device = job.settings, job.accelerator.device
        arm = s.method if s.compare else ""
        stopped = job.stage
        if stopped in (None, "train"):
            train_dense(job, "grows a trained model")
        small = load(job.folder.path / DENSE)
        target = models.target_of(small, s)
        if keep_normalisation(small, target):
            job.reporter.say("Images stay normalised as for the source; the target's own mean or std differ.")
        macs = summary(target).macs
        loop = _for_target(job, target)
        begun = stopped == "finetune"
        if s.compare and stopped != "grow" and not (begun and job.arm != SCRATCH):
            model = job.model if begun else target
            stage = Stage("finetune", s.lr, s.finetune_epochs, arm=SCRATCH)
            loop.run(stage, model, state=job.take_state() if begun else None)
            begun = False
        if not begun:
            if state := job.take_state():  # of the operator's training, which is done anew
                loop.check_world(state)
            _grow(job, small, macs)
        model = job.model if begun else load(job.folder.path / GROWN)
        accuracy = loop.run(
            Stage("finetune", s.lr, s.finetune_epochs, arm=arm), model, state=job.take_state()
        )
        if s.compare:
            _tell_savings(job)
        return _outcome(job, model.to(device), accuracy, small)


def _check(model: nn.Module, settings: Settings, data: Data) -> None:
    models.check_growth(model, settings)


def _for_target(job: _Job, target: nn.Module) -> Loop:
    """The job's loop, with images as ``target`` takes them, which may be cropped otherwise."""
    job.data.fit_to(target, job.settings)
    old = job.loop
    # A new one: loader processes keep copies of the data.
    job.loop = Loop(job.settings, job.data, job.folder, job.accelerator, job.reporter, old.stop)
    job.loop.results = old.results
    return job.loop


class _Stream:
    """The run's training batches on its device, another epoch each time."""

    def __init__(self, loop: Loop) -> None:
        self.loop, self.epoch = loop, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self.loop.stream("grow", self.epoch)
        self.epoch += 1


def _grow(job: _Job, small: nn.Module, macs: float) -> None:
    s, loop, device = job.settings, job.loop, job.accelerator.device
    images = s.batch_size * s.grad_accum_steps
    costs = {"update": update_flops(macs, images)}

    def fit(operator: growth.GrowthOperator) -> None:
        operator.to(device)
        costs["operator"] = s.operator_steps * (costs["update"] + _operator_flops(operator))
        world = job.accelerator.num_processes
        if world > 1:
            # Each process sees its share of a batch; all take the step of the whole one.
            for parameter in operator.parameters():
                hooks: Any = parameter
                hooks.register_post_accumulate_grad_hook(lambda p: _average(p, world))
        operator.fit(
            _Stream(loop), loop.loss, s.operator_steps, lr=s.operator_lr, grad_accum=s.grad_accum_steps
        )

    learns = s.method in models.OPERATORS and s.operator_steps > 0
    if learns:
        loop.mark("grow", small)
    grown = models.grown(small.train(), s, fit if learns else None).cpu()
    job.folder.save_model(grown, GROWN)
    job.reporter.say(str(growth.report(grown)))
    job.accelerator.wait_for_everyone()
    grown = load(job.folder.path / GROWN)
    accuracy = evaluate(grown.to(device), job.data, s, job.accelerator)
    if job.origin != models.FILE:
        costs["source"] = s.epochs * loop.updates_per_epoch * update_flops(summary(small).macs, images)
    job.folder.log("grown", method=s.method, flops=costs, **asdict(accuracy))
    job.reporter.say(f"grown by {s.method}: top-1 {accuracy.top1:.2f} %")


def _average(parameter: Tensor, world: int) -> None:
    assert parameter.grad is not None
    distributed.all_reduce(parameter.grad)
    parameter.grad /= world


def _operator_flops(operator: growth.GrowthOperator) -> float:
    """Operations of an evaluation of the operator and its gradients."""
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
