"""The ``pyvitfast`` command: a verb is a function here, and the work is in train, report and the methods."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from pyvitfast.train.errors import Interrupted, UserError

app = typer.Typer(
    help="Make Vision Transformers small, fast and cheap to train. With no arguments a verb does its whole "
    "job on the built-in digits data and a micro ViT.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)

Model = Annotated[str | None, typer.Option(help="timm model name, or a .safetensors file of ours.")]
Pretrained = Annotated[bool | None, typer.Option("--pretrained/--no-pretrained", help="Load timm's weights.")]
DataSpec = Annotated[
    str | None, typer.Option(help="digits, a folder of class folders, torch/NAME or hfds/NAME.")
]
Imbalance = Annotated[
    float | None, typer.Option(help="Keep an exponential long tail, largest class RHO times the smallest.")
]
Out = Annotated[Path | None, typer.Option(help="Output folder.  [default: out/VERB-DATA]")]
Epochs = Annotated[int | None, typer.Option(help="Epochs of training (prune, sparsify: of the dense model).")]
BatchSize = Annotated[int | None, typer.Option(help="Images in a step, over all processes.")]
GradAccum = Annotated[int | None, typer.Option(help="Steps added up for one optimizer update.")]
Opt = Annotated[str | None, typer.Option(help="timm optimizer.")]
Lr = Annotated[float | None, typer.Option(help="Peak learning rate.")]
WeightDecay = Annotated[float | None, typer.Option(help="Weight decay.")]
Sched = Annotated[str | None, typer.Option(help="cosine, tanh, step, multistep, poly or none.")]
WarmupEpochs = Annotated[int | None, typer.Option(help="Epochs of linear warm-up.")]
ClipGrad = Annotated[float | None, typer.Option(help="Largest norm of the gradient.")]
Smoothing = Annotated[float | None, typer.Option(help="Label smoothing.")]
Mixup = Annotated[float | None, typer.Option(help="Mixup alpha.")]
Cutmix = Annotated[float | None, typer.Option(help="Cutmix alpha.")]
Amp = Annotated[str | None, typer.Option(help="Mixed precision: no, bf16 or fp16.")]
Workers = Annotated[int | None, typer.Option(help="Loader processes of each rank.")]
Seed = Annotated[int | None, typer.Option(help="Seed of weights, order and augmentation.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Target = Annotated[float | None, typer.Option(help="Fraction of the budget that is left after pruning.")]
Budget = Annotated[str | None, typer.Option(help="What the target counts: macs, params or latency.")]
LatencyFile = Annotated[
    str | None, typer.Option(metavar="FILE.json", help="Latency table to use.  [default: measure one]")
]
LatencyBatch = Annotated[int | None, typer.Option(help="Images in a forward pass of that measurement.")]
Eta = Annotated[float | None, typer.Option(help="Weight of the saved cost, subtracted from scores.")]
CostRule = Annotated[str | None, typer.Option(help="subtract the saved cost, or divide by it.")]
KlWeight = Annotated[float | None, typer.Option(help="Weight of the divergence from the dense model.")]
KlTemperature = Annotated[float | None, typer.Option(help="Temperature of that divergence.")]
CnnTeacher = Annotated[str | None, typer.Option(help="Network whose most likely class is learnt too.")]
Interval = Annotated[int | None, typer.Option(help="Optimizer updates between two removals.")]
GroupsPerStep = Annotated[int | None, typer.Option(help="Groups in a removal.")]
Preset = Annotated[str | None, typer.Option(help="paper or nvit_repo.")]
PruneLr = Annotated[float | None, typer.Option(help="Constant learning rate while pruning.")]
FinetuneEpochs = Annotated[int | None, typer.Option(help="Epochs after compaction or sparsification.")]
FinetuneLr = Annotated[float | None, typer.Option(help="Peak learning rate in them.")]
WeightBits = Annotated[int | None, typer.Option(help="Bits of a weight, 1 to 8.")]
ActivationBits = Annotated[int | None, typer.Option(help="Bits of the inputs of these layers.")]
Granularity = Annotated[str | None, typer.Option(help="What shares a scale: tensor, channel or group.")]
GroupSize = Annotated[int | None, typer.Option(help="Columns in a group.")]
Grid = Annotated[str | None, typer.Option(help="integer, half_integer or sign.  [default: by the bits]")]
Scale = Annotated[str | None, typer.Option(help="Rule for the scales: lsq, absmax, mse or fixed.")]
Estimator = Annotated[str | None, typer.Option(help="Gradients: fogzo, ste, spsa or zo.")]
Directions = Annotated[int | None, typer.Option(help="Measured at each step, two forward passes each.")]
Omega = Annotated[float | None, typer.Option(help="Energy of the noise in a direction.")]
StartFrac = Annotated[float | None, typer.Option(help="Part of the steps taken straight-through first.")]
Tokens = Annotated[
    str | None,
    typer.Option(metavar="N|HxW", help="Semantic tokens instead of 2:4 weights: side, or rows x columns."),
]
TokensBase = Annotated[int | None, typer.Option(help="Blocks before them.  [default: a third]")]
TokensPool = Annotated[
    str | None, typer.Option(help="Where they start: learned, avg, max, overlap or multiscale.")
]
Teacher = Annotated[
    str | None,
    typer.Option(help="Trained CNN: timm name, a file of ours or the authors'.  [default: train one]"),
]
TeacherModel = Annotated[str | None, typer.Option(help="timm name of the CNN to train.")]
TeacherLoss = Annotated[str | None, typer.Option(help="ldam, paco, ce or balanced_softmax.")]
TeacherEpochs = Annotated[int | None, typer.Option(help="Epochs of the CNN.")]
TeacherLr = Annotated[float | None, typer.Option(help="Peak learning rate of the CNN.")]
TeacherSize = Annotated[int | None, typer.Option(help="Side of the CNN's images.  [default: its own]")]
SamRho = Annotated[float | None, typer.Option(help="Radius of SAM in the CNN's training; 0 is off.")]
ClassMap = Annotated[
    str | None, typer.Option(metavar="FILE.json", help="The student's number of each of the CNN's classes.")
]
DistillAlpha = Annotated[float | None, typer.Option(help="Share of the DIST head's loss.")]
DrwEpoch = Annotated[
    int | None,
    typer.Option(help="First epoch, from 0, weighted by class; --epochs is never.  [default: 11/12 of them]"),
]
ImbalanceType = Annotated[str | None, typer.Option(help="exp or step.")]
Compare = Annotated[
    bool | None,
    typer.Option("--compare/--no-compare", help="Finetune straight-through beside it, for the report."),
]
Source = Annotated[
    str | None, typer.Option("--source", "--model", help="The small model: timm name, or a file of ours.")
]
GrowTo = Annotated[
    str | None, typer.Option("--target", help="The large model: timm name, or a file of ours.")
]
Method = Annotated[
    str | None,
    typer.Option(help="mango or ligo, which learn; fpi, net2net, aki, average; stack, interleave, identity."),
]
Rank = Annotated[int | None, typer.Option(help="Of Mango's bonds.")]
OperatorSteps = Annotated[int | None, typer.Option(help="Training steps of the operator.")]
OperatorLr = Annotated[float | None, typer.Option(help="Learning rate in them.  [default: by the width]")]
GrowNoise = Annotated[float | None, typer.Option(help="Relative noise on new units; 0 is exact.")]
GrowWidth = Annotated[
    str | None, typer.Option("--width", help="Width rule of a depth method: fpi, net2net, aki or average.")
]
GrowDepth = Annotated[
    str | None, typer.Option("--depth", help="Depth rule: stack, stack_top, interleave or identity.")
]
FromScratch = Annotated[
    bool | None,
    typer.Option("--compare/--no-compare", help="Train the target from scratch beside it, for the report."),
]
TargetEpochs = Annotated[int | None, typer.Option(help="Epochs of the target's training.")]
Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.yaml", help="Settings as lines of `key: value`, or a recipe such as crossvit."
    ),
]
Assign = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting; wins over --config.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start over in an --out that is not empty.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

# Parameters of the verbs that say how to run, not what; all others are settings.
_NOT_SETTINGS = {"out", "config", "assign", "resume", "overwrite", "json_path", "debug"}


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Make ``function`` a verb whose user errors are one line and exit code 2.

    A signal ends a run with 128 + its number, as a shell would report it.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        if kwargs.get("debug"):
            function(*args, **kwargs)
            return
        try:
            function(*args, **kwargs)
        except (UserError, OSError) as error:
            rank = os.environ.get("RANK", "0")
            where = "" if rank == "0" else f"[rank {rank}] "
            errors.print(f"{where}error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2) from error
        except Interrupted as stopped:
            errors.print(str(stopped), markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(128 + stopped.signum) from stopped
        except KeyboardInterrupt as error:
            raise typer.Exit(130) from error

    return app.command()(wrapper)


def _flags(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in parameters.items() if k not in _NOT_SETTINGS and v is not None}


def _run(name: str, job: Callable[..., Any], parameters: Mapping[str, Any]) -> None:
    """Resolve settings, run ``job``, report."""
    from pyvitfast.train import settings as st

    flags, resume = _flags(parameters), parameters["resume"]
    config, assign = parameters["config"], parameters["assign"] or []
    settings = st.resolve(config, assign, flags, name)
    out = parameters["out"] or Path("out") / f"{name}-{settings.data.replace('/', '-').strip('-.')}"
    given: dict[str, Any] = {}
    if resume:
        given = (st.read_yaml(config) if config else {}) | st.parse_assignments(assign) | flags
    outcome = job(settings, out, console, resume=resume, overwrite=parameters["overwrite"], given=given)
    if outcome.main:
        _report(outcome)


def _report(outcome: Any) -> None:
    from pyvitfast.report import Subject, write_report
    from pyvitfast.train.folder import DENSE, MODEL

    folder = outcome.folder
    after = Subject(outcome.model, folder / MODEL, **asdict(outcome.accuracy))
    before = None
    if outcome.dense is not None:
        before = Subject(outcome.dense, folder / DENSE, **asdict(outcome.dense_accuracy))
    settings = outcome.settings
    grows = f" to {settings.grow_to}" if outcome.verb == "grow" else ""
    title = f"pyvitfast {outcome.verb}: {settings.model}{grows} on {settings.data}"
    batches = {1, 32} | ({settings.latency_batch_size} if settings.budget == "latency" else set())
    page = write_report(
        folder,
        title,
        after,
        before,
        outcome.events,
        settings.to_dict(),
        outcome.device,
        console,
        sorted(batches),
        outcome.samples,
    )
    console.print(f"Model: {folder / MODEL}\nReport: {page}", highlight=False, soft_wrap=True)


@verb
def train(
    model: Model = None,
    data: DataSpec = None,
    out: Out = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Lr = None,
    opt: Opt = None,
    weight_decay: WeightDecay = None,
    sched: Sched = None,
    warmup_epochs: WarmupEpochs = None,
    clip_grad: ClipGrad = None,
    grad_accum_steps: GradAccum = None,
    smoothing: Smoothing = None,
    mixup: Mixup = None,
    cutmix: Cutmix = None,
    imbalance: Imbalance = None,
    pretrained: Pretrained = None,
    amp: Amp = None,
    workers: Workers = None,
    seed: Seed = None,
    device: Device = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    config: Config = None,
    assign: Assign = None,
    debug: Debug = False,
) -> None:
    """Train a Vision Transformer."""
    parameters = dict(locals())
    from pyvitfast.train import train as job

    _run("train", job, parameters)


@verb
def prune(
    model: Model = None,
    data: DataSpec = None,
    out: Out = None,
    target: Target = None,
    budget: Budget = None,
    latency_table: LatencyFile = None,
    latency_batch_size: LatencyBatch = None,
    eta: Eta = None,
    cost_rule: CostRule = None,
    interval: Interval = None,
    groups_per_step: GroupsPerStep = None,
    preset: Preset = None,
    epochs: Epochs = None,
    prune_lr: PruneLr = None,
    finetune_epochs: FinetuneEpochs = None,
    finetune_lr: FinetuneLr = None,
    kl_weight: KlWeight = None,
    kl_temperature: KlTemperature = None,
    cnn_teacher: CnnTeacher = None,
    batch_size: BatchSize = None,
    lr: Lr = None,
    opt: Opt = None,
    weight_decay: WeightDecay = None,
    clip_grad: ClipGrad = None,
    grad_accum_steps: GradAccum = None,
    smoothing: Smoothing = None,
    mixup: Mixup = None,
    cutmix: Cutmix = None,
    imbalance: Imbalance = None,
    pretrained: Pretrained = None,
    amp: Amp = None,
    workers: Workers = None,
    seed: Seed = None,
    device: Device = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    config: Config = None,
    assign: Assign = None,
    debug: Debug = False,
) -> None:
    """Make a Vision Transformer smaller: NViT pruning while it trains, then compaction and finetuning.

    A model from a file is pruned at once; a timm name is trained first.
    """
    parameters = dict(locals())
    from pyvitfast.train import prune as job

    _run("prune", job, parameters)


@verb
def sparsify(
    model: Model = None,
    data: DataSpec = None,
    out: Out = None,
    tokens: Tokens = None,
    tokens_base: TokensBase = None,
    tokens_pool: TokensPool = None,
    epochs: Epochs = None,
    finetune_epochs: FinetuneEpochs = None,
    finetune_lr: FinetuneLr = None,
    batch_size: BatchSize = None,
    lr: Lr = None,
    opt: Opt = None,
    weight_decay: WeightDecay = None,
    clip_grad: ClipGrad = None,
    grad_accum_steps: GradAccum = None,
    smoothing: Smoothing = None,
    mixup: Mixup = None,
    cutmix: Cutmix = None,
    imbalance: Imbalance = None,
    pretrained: Pretrained = None,
    amp: Amp = None,
    workers: Workers = None,
    seed: Seed = None,
    device: Device = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    config: Config = None,
    assign: Assign = None,
    debug: Debug = False,
) -> None:
    """Keep the 2 largest of every 4 weights, or with --tokens a few semantic tokens; then finetune.

    2:4 weights keep their zeros. With --tokens the later blocks see that grid of tokens only (STViT).

    A model from a file is made sparse at once; a timm name is trained first.
    """
    parameters = dict(locals())
    from pyvitfast.train import sparsify as job

    _run("sparsify", job, parameters)


@verb
def quantize(
    model: Model = None,
    data: DataSpec = None,
    out: Out = None,
    weight_bits: WeightBits = None,
    activation_bits: ActivationBits = None,
    granularity: Granularity = None,
    group_size: GroupSize = None,
    grid: Grid = None,
    scale: Scale = None,
    estimator: Estimator = None,
    directions: Directions = None,
    omega: Omega = None,
    start_frac: StartFrac = None,
    compare: Compare = None,
    epochs: Epochs = None,
    finetune_epochs: FinetuneEpochs = None,
    finetune_lr: FinetuneLr = None,
    batch_size: BatchSize = None,
    lr: Lr = None,
    opt: Opt = None,
    weight_decay: WeightDecay = None,
    clip_grad: ClipGrad = None,
    grad_accum_steps: GradAccum = None,
    smoothing: Smoothing = None,
    mixup: Mixup = None,
    cutmix: Cutmix = None,
    imbalance: Imbalance = None,
    pretrained: Pretrained = None,
    amp: Amp = None,
    workers: Workers = None,
    seed: Seed = None,
    device: Device = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    config: Config = None,
    assign: Assign = None,
    debug: Debug = False,
) -> None:
    """Train with weights of few bits, corrected by FOGZO, and pack them.

    A model from a file is quantised at once; a timm name is trained first.
    """
    parameters = dict(locals())
    from pyvitfast.train import quantize as job

    _run("quantize", job, parameters)


@verb
def grow(
    model: Source = None,
    grow_to: GrowTo = None,
    method: Method = None,
    rank: Rank = None,
    data: DataSpec = None,
    out: Out = None,
    operator_steps: OperatorSteps = None,
    operator_lr: OperatorLr = None,
    grow_noise: GrowNoise = None,
    grow_width: GrowWidth = None,
    grow_depth: GrowDepth = None,
    compare: FromScratch = None,
    epochs: Epochs = None,
    finetune_epochs: TargetEpochs = None,
    batch_size: BatchSize = None,
    lr: Lr = None,
    opt: Opt = None,
    weight_decay: WeightDecay = None,
    clip_grad: ClipGrad = None,
    grad_accum_steps: GradAccum = None,
    smoothing: Smoothing = None,
    mixup: Mixup = None,
    cutmix: Cutmix = None,
    imbalance: Imbalance = None,
    pretrained: Pretrained = None,
    amp: Amp = None,
    workers: Workers = None,
    seed: Seed = None,
    device: Device = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    config: Config = None,
    assign: Assign = None,
    debug: Debug = False,
) -> None:
    """Grow a trained model into a larger one, and train that.

    A source from a file is grown at once; a timm name is trained first.
    """
    parameters = dict(locals())
    from pyvitfast.train import grow as job

    _run("grow", job, parameters)


@verb
def distill(
    model: Model = None,
    data: DataSpec = None,
    out: Out = None,
    imbalance: Imbalance = None,
    imbalance_type: ImbalanceType = None,
    teacher: Teacher = None,
    teacher_model: TeacherModel = None,
    teacher_loss: TeacherLoss = None,
    teacher_epochs: TeacherEpochs = None,
    teacher_lr: TeacherLr = None,
    teacher_size: TeacherSize = None,
    sam_rho: SamRho = None,
    class_map: ClassMap = None,
    distill_alpha: DistillAlpha = None,
    drw_epoch: DrwEpoch = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Lr = None,
    opt: Opt = None,
    weight_decay: WeightDecay = None,
    sched: Sched = None,
    warmup_epochs: WarmupEpochs = None,
    clip_grad: ClipGrad = None,
    grad_accum_steps: GradAccum = None,
    smoothing: Smoothing = None,
    mixup: Mixup = None,
    cutmix: Cutmix = None,
    pretrained: Pretrained = None,
    amp: Amp = None,
    workers: Workers = None,
    seed: Seed = None,
    device: Device = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    config: Config = None,
    assign: Assign = None,
    debug: Debug = False,
) -> None:
    """Train a student with two heads on long-tailed images, one of them on a small CNN's labels (DeiT-LT).

    The CNN is trained on the same images first; --teacher FILE takes one that is there.
    """
    parameters = dict(locals())
    from pyvitfast.train import distill as job

    _run("distill", job, parameters)


@verb
def eval(
    model: Model = None,
    data: DataSpec = None,
    batch_size: BatchSize = None,
    pretrained: Pretrained = None,
    amp: Amp = None,
    workers: Workers = None,
    device: Device = None,
    json_path: Json = None,
    config: Config = None,
    assign: Assign = None,
    debug: Debug = False,
) -> None:
    """Print the accuracy of a model on the test images."""
    flags = _flags(dict(locals()))
    from pyvitfast.train import evaluate_model, resolve

    evaluate_model(resolve(config, assign or [], flags), console, json_path)


@verb
def summary(
    model: Model = None,
    latency: Annotated[bool, typer.Option("--latency", help="Also time a forward pass.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in the timed pass.")] = 1,
    json_path: Json = None,
    debug: Debug = False,
) -> None:
    """Print parameters, MACs and block widths of a model."""
    from pyvitfast.models.checkpoint import write_atomically
    from pyvitfast.models.summary import summary as summarize
    from pyvitfast.train import model as models
    from pyvitfast.train.settings import DIGITS

    name = model or DIGITS["model"]
    found = models.load_file(name) if models.is_file(name) else models.create(name)
    facts = summarize(found, latency=latency, batch_size=batch_size)
    console.print(str(facts), highlight=False, markup=False)
    if json_path is not None:
        write_atomically(json_path, json.dumps(asdict(facts), indent=2).encode())


@verb
def export(
    model: Model = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Target, ending in .onnx or .pt2.  [default: out/MODEL.onnx]"),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images of a call.  [default: any number]")
    ] = None,
    pretrained: Pretrained = None,
    json_path: Json = None,
    debug: Debug = False,
) -> None:
    """Write a model as ONNX or torch.export file, after comparing its logits with the model's."""
    from pyvitfast.models.checkpoint import write_atomically
    from pyvitfast.models.export import export as write
    from pyvitfast.train import model as models
    from pyvitfast.train.settings import DIGITS

    name = model or DIGITS["model"]
    if models.is_file(name):
        if pretrained:
            raise UserError(f"--pretrained goes with a timm name, not with the file {name}.")
        found = models.load_file(name)
    else:
        found = models.create(name, bool(pretrained))
    target = out or Path("out") / f"{Path(name).name.removesuffix('.safetensors')}.onnx"
    if out is None:
        target.parent.mkdir(parents=True, exist_ok=True)
    try:
        report = write(found, target, batch_size=batch_size)
    except (ValueError, NotImplementedError, ImportError, RuntimeError) as error:
        raise UserError(f"--model {name} cannot be exported: {error}") from error
    console.print(str(report), highlight=False, markup=False, soft_wrap=True)
    if json_path is not None:
        facts = asdict(report) | {"path": str(report.path)}
        write_atomically(json_path, json.dumps(facts, indent=2).encode())


@verb
def info(
    settings: Annotated[
        bool, typer.Option("--settings", help="List all settings and their defaults.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Print versions and what is built and loaded, ready to paste into an issue."""
    from pyvitfast import info as facts
    from pyvitfast.train.settings import Settings

    found = Settings().to_dict() if settings else facts.collect()
    console.print(
        yaml.safe_dump(json.loads(json.dumps(found)), sort_keys=False, width=100).rstrip(),
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def main() -> None:
    """Entry point of the console script."""
    app()
