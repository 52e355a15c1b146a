"""The settings of a run: one dataclass, from defaults, YAML file, ``--set`` and flags."""

from __future__ import annotations

import contextlib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import timm.optim
import yaml

from pyvitfast.distill import PaCoConfig
from pyvitfast.grow import METHODS as GROWTH
from pyvitfast.models.stvit import POOLS
from pyvitfast.quantize import ESTIMATORS, QuantConfig
from pyvitfast.train.errors import UserError, nearest

RECIPES = Path(__file__).parent / "recipes"
AMP = ("no", "bf16", "fp16")
BUDGETS = ("macs", "params", "latency")
COST_RULES = ("subtract", "divide")
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "none")
GROUP_KINDS = ("embed", "head", "qk", "v", "mlp")

WEIGHT_NORMS = ("batch", "classes", "global")
TEACHER_LOSSES = ("ldam", "paco", "ce", "balanced_softmax")
IMBALANCES = ("exp", "step")
CROPS = ("rrc", "pad")
ERASINGS = ("const", "rand", "pixel")
VIEWS = ("cifar", "imagenet")

# What the built-in data set wants instead of the general defaults; 1300 small images.
DIGITS: dict[str, Any] = {
    "model": "vit_micro_patch2_8",
    "epochs": 30,
    "batch_size": 50,
    "lr": 2e-3,
    "target": 0.42,
    "interval": 10,
    "groups_per_step": 3,
    "group_sizes": {"embed": 4, "head": 1, "qk": 2, "v": 2, "mlp": 8},
    "prune_lr": 5e-4,
    "finetune_epochs": 10,
    "finetune_lr": 1e-3,
    # In smaller batches calls cost the micro model more than arithmetic, and narrower is not faster.
    "latency_batch_size": 256,
    "hflip": 0.0,
    "workers": 0,
    "grow_to": "vit_micro_wide_patch2_8",
}


# What ``distill`` wants there besides.
DIGITS_DISTILL: dict[str, Any] = {
    "model": "deit_micro_distilled_patch2_8",
    "imbalance": 20.0,
    "epochs": 60,
    "teacher_model": "resnet20_cifar",
    "teacher_epochs": 30,
    "teacher_batch_size": 50,
    "sam_rho": 0.02,
    "mixup": 0.8,
    "cutmix": 1.0,
}


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on; names are timm's where timm has one.

    Args:
        model: timm model name, or a ``.safetensors`` file written by ``pyvitfast.save``.
        pretrained: load timm's pretrained weights; only with a name.
        img_size: image side in pixels; None takes the model's own.
        data: ``digits``, a folder of class folders, ``torch/NAME`` or ``hfds/NAME``.
        data_dir: where ``torch/`` and ``hfds/`` data sets are kept.
        download: fetch a ``torch/`` or ``hfds/`` data set that is missing.
        check_images: read every image file's header before the run.
        train_list: text file of lines ``path label`` that names the training images of a folder, paths from
            there and labels from 0; None takes its class folders.
        test_list: the same of its test images.
        imbalance: ratio of the largest to the smallest class of a long tail; 1 keeps all. The same images for
            every seed.
        imbalance_type: of class sizes: ``exp``, which fall exponentially, or ``step``, half of them small.
        epochs: epochs of training; of the dense model in ``prune``.
        batch_size: images in a step, over all processes.
        grad_accum_steps: steps whose gradients are added up for one optimizer update.
        opt: timm optimizer.
        lr: peak learning rate.
        weight_decay: weight decay.
        sched: timm schedule, stepped at each update: cosine, tanh, step, multistep, poly or none;
            ``multistep`` steps after 8/10 and 9/10 of the epochs.
        decay_rate: what a step of ``step`` and ``multistep`` multiplies the rate by; None is a tenth, and a
            hundredth with ``multistep``.
        warmup_epochs: epochs of linear warm-up.
        warmup_lr: learning rate at its start.
        min_lr: learning rate at the end.
        clip_grad: largest norm of the gradient; None does not clip.
        smoothing: label smoothing.
        mixup: mixup alpha; 0 is off.
        cutmix: cutmix alpha; 0 is off.
        mixup_prob: probability of mixup or cutmix for a batch.
        mixup_switch_prob: probability of cutmix when both are on.
        drop_path: stochastic depth rate of a model made by name.
        aa: timm auto-augment policy such as ``rand-m9-mstd0.5-inc1``; images only.
        color_jitter: colour jitter; images only.
        hflip: probability of a horizontal flip; images only.
        reprob: probability of random erasing; images only.
        remode: what erases: ``const``, black; ``rand``, one random colour; ``pixel``, noise.
        train_crop: of image files: ``rrc`` random resized crops, or ``pad`` crops of the whole padded by an
            eighth.
        crop_pct: of image files: side of the central crop for tests, as a part of the shorter side; None is
            the model's own.
        aug_repeats: times an image comes up in an epoch, augmented differently each time; an epoch keeps its
            length, so it sees that fraction of the images.
        seed: seed of weights, order, augmentation.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        amp: mixed precision: ``no``, ``bf16`` or ``fp16``.
        workers: loader processes on each rank.
        target: fraction of the budget that pruning leaves.
        budget: what the target counts: ``macs``, ``params`` or ``latency``.
        latency_table: JSON file of a latency table; None measures one when the budget is ``latency``.
        latency_batch_size: images in a forward pass of that measurement.
        eta: weight of the saved cost, as a fraction of the whole, subtracted from scores;
            None takes the preset's.
        cost_rule: ``subtract`` that from a score, or ``divide`` the score by the saved cost.
        interval: optimizer updates between two removals.
        groups_per_step: groups in a removal.
        group_sizes: units in a group by kind (embed, head, qk, v, mlp); None chooses them.
        preset: NViT preset, ``paper`` or ``nvit_repo``.
        prune_lr: constant learning rate while pruning.
        finetune_epochs: epochs after compaction.
        finetune_lr: peak learning rate after compaction.
        kl_weight: weight of the divergence from the dense model, while pruning (from the first removal on)
            and finetuning; 0 is off, None takes the preset's.
        kl_temperature: temperature of that divergence; None takes the preset's.
        cnn_teacher: timm name (with pretrained weights) or ``.safetensors`` file of a network whose most
            likely class is learnt too while pruning and finetuning.
        teacher: of ``distill``: timm name (with pretrained weights) or ``.safetensors`` file of the network
            whose labels the DIST head learns, or a checkpoint of the authors' programs (``.pth``, ``.tar``)
            for ``teacher_model``; None trains one.
        teacher_model: timm name of that.
        teacher_loss: ``ldam``, ``paco``, ``ce`` or ``balanced_softmax``.
        teacher_epochs: epochs of the teacher.
        teacher_batch_size: images in its steps, over all processes.
        teacher_lr: its peak learning rate; SGD with momentum.
        teacher_sched: its schedule, as ``sched``.
        teacher_decay_rate: of its schedule, as ``decay_rate``.
        teacher_warmup_epochs: epochs of its linear warm-up; None takes 5, or none in less than 50 epochs.
        teacher_drw_epoch: first epoch, from 0, whose ``ldam`` loss is weighted by class; None takes 4/5 of
            the epochs, and a number of at least ``teacher_epochs`` is never.
        teacher_weight_decay: its weight decay.
        teacher_crop: its crops, as ``train_crop``; ``paco`` has ``teacher_views`` instead.
        teacher_margin: largest margin of ``ldam``.
        teacher_views: of ``paco``, two of each image: ``cifar``, AutoAugment and Cutout beside SimCLR, or
            ``imagenet``, RandAugment beside SimCLR. Digits are moved, and in part erased, with either.
        paco_alpha: of ``paco``: weight of each feature of the same class.
        paco_beta: weight of the class's centre.
        paco_gamma: factor of the features in the denominator.
        paco_temperature: divides the products of features.
        paco_queue: features kept of earlier batches.
        paco_dim: width of a feature.
        paco_momentum: of the key encoder.
        sam_rho: radius of SAM in the teacher's training; 0 is off.
        sam_rho_steps: other radii by the epoch, from 0, that they begin with.
        teacher_size: side of the teacher's images in pixels; None takes what it was made for.
        class_map: JSON list: the student's number of each of the teacher's classes; None for equal ones.
        distill_alpha: share of the DIST head's loss.
        drw_epoch: first epoch, from 0, whose DIST loss is weighted by class; None takes 11/12 of the epochs,
            and a number of at least ``epochs`` is never.
        drw_beta: of the effective number of images.
        weight_norm: what weighted sums are divided by: ``batch``, ``classes`` or ``global``, which keeps all
            images of an optimizer update on the device.
        mixing_after_drw: keep mixup, cutmix and label smoothing from then on.
        weight_bits: bits of a quantised weight, 1 to 8.
        activation_bits: bits of the inputs of quantised layers; None leaves them.
        granularity: what shares a scale: ``tensor``, ``channel`` or ``group``.
        group_size: columns in a group.
        grid: ``integer``, ``half_integer`` or ``sign``; None takes the one that suits the bits.
        scale: rule for the scales: ``lsq``, ``absmax``, ``mse`` or ``fixed``.
        estimator: of gradients while finetuning a quantised model: ``fogzo``, ``ste``, ``spsa`` or ``zo``.
        directions: measured at each step; each costs two forward passes.
        omega: energy of the noise in a direction.
        compare: of ``quantize``: finetune with ``ste`` beside it, from the same weights and with the same
            batches; of ``grow``: train the target from scratch beside it. For the report.
        start_frac: part of these steps taken with plain straight-through gradients first.
        tokens: of ``sparsify``: grid of semantic tokens that replace the image tokens, ``4`` or ``4x6``; None
            makes the weights 2:4 sparse instead.
        tokens_base: blocks before them; None takes a third.
        tokens_pool: where they start: ``learned``, ``avg``, ``max``, ``overlap`` or ``multiscale``.
        grow_to: timm name or file of the target of ``grow``.
        method: of growth: ``mango``, ``ligo`` or a fixed rule.
        rank: of Mango's bonds.
        operator_steps: training steps of the operator of ``mango`` and ``ligo``.
        operator_lr: learning rate in them; None takes one that suits the width.
        grow_noise: relative size of the noise on new units; None takes the method's.
        grow_width: width rule of a depth method: ``fpi``, ``net2net``, ``aki`` or ``average``.
        grow_depth: depth rule of any other: ``stack``, ``stack_top``, ``interleave`` or ``identity``.

    Raises:
        UserError: a value of a wrong type or out of its range.
    """

    model: str = ""
    pretrained: bool = False
    img_size: int | None = None
    data: str = "digits"
    data_dir: str = "data"
    download: bool = False
    check_images: bool = True
    train_list: str | None = None
    test_list: str | None = None
    imbalance: float = 1.0
    imbalance_type: str = "exp"
    epochs: int = 100
    batch_size: int = 128
    grad_accum_steps: int = 1
    opt: str = "adamw"
    lr: float = 5e-4
    weight_decay: float = 0.05
    sched: str = "cosine"
    decay_rate: float | None = None
    warmup_epochs: int = 0
    warmup_lr: float = 1e-6
    min_lr: float = 0.0
    clip_grad: float | None = None
    smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    drop_path: float = 0.0
    aa: str | None = None
    color_jitter: float = 0.4
    hflip: float = 0.5
    reprob: float = 0.0
    remode: str = "pixel"
    train_crop: str = "rrc"
    crop_pct: float | None = None
    aug_repeats: int = 1
    seed: int = 0
    device: str = "auto"
    amp: str = "no"
    workers: int = 4
    target: float = 0.5
    budget: str = "macs"
    latency_table: str | None = None
    latency_batch_size: int = 32
    eta: float | None = None
    cost_rule: str = "subtract"
    interval: int = 100
    groups_per_step: int = 2
    group_sizes: dict[str, int] | None = field(default=None)
    preset: str = "paper"
    prune_lr: float = 1e-4
    finetune_epochs: int = 30
    finetune_lr: float = 5e-4
    kl_weight: float | None = None
    kl_temperature: float | None = None
    cnn_teacher: str | None = None
    teacher: str | None = None
    teacher_model: str = "resnet32_cifar"
    teacher_loss: str = "ldam"
    teacher_epochs: int = 200
    teacher_batch_size: int = 128
    teacher_lr: float = 0.1
    teacher_sched: str = "cosine"
    teacher_decay_rate: float | None = None
    teacher_warmup_epochs: int | None = None
    teacher_drw_epoch: int | None = None
    teacher_weight_decay: float = 2e-4
    teacher_crop: str = "pad"
    teacher_margin: float = 0.5
    teacher_views: str = "cifar"
    paco_alpha: float = 0.01
    paco_beta: float = 1.0
    paco_gamma: float = 1.0
    paco_temperature: float = 0.05
    paco_queue: int = 1024
    paco_dim: int = 32
    paco_momentum: float = 0.999
    sam_rho: float = 0.8
    sam_rho_steps: dict[int, float] | None = field(default=None)
    teacher_size: int | None = None
    class_map: str | None = None
    distill_alpha: float = 0.5
    drw_epoch: int | None = None
    drw_beta: float = 0.9999
    weight_norm: str = "batch"
    mixing_after_drw: bool = False
    weight_bits: int = 4
    activation_bits: int | None = None
    granularity: str = "channel"
    group_size: int = 0
    grid: str | None = None
    scale: str = "lsq"
    estimator: str = "fogzo"
    directions: int = 1
    omega: float = 1.0
    start_frac: float = 0.7
    compare: bool = False
    tokens: str | None = None
    tokens_base: int | None = None
    tokens_pool: str = "learned"
    grow_to: str = ""
    method: str = "mango"
    rank: int = 1
    operator_steps: int = 100
    operator_lr: float | None = None
    grow_noise: float | None = None
    grow_width: str | None = None
    grow_depth: str | None = None

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(Settings)
        for f in fields(self):
            object.__setattr__(self, f.name, _typed(f.name, getattr(self, f.name), hints[f.name]))
        counts = ("batch_size", "grad_accum_steps", "interval", "groups_per_step", "latency_batch_size")
        for name in (*counts, "aug_repeats"):
            self._need(name, "at least 1", getattr(self, name) >= 1)
        for name in ("epochs", "finetune_epochs", "warmup_epochs", "workers", "seed", "weight_decay"):
            self._need(name, "at least 0", getattr(self, name) >= 0)
        for name in ("warmup_lr", "min_lr", "mixup", "cutmix", "color_jitter"):
            self._need(name, "at least 0", getattr(self, name) >= 0)
        for name in ("lr", "prune_lr", "finetune_lr"):
            self._need(name, "a positive number", getattr(self, name) > 0)
        for name in ("mixup_prob", "mixup_switch_prob", "hflip", "reprob"):
            self._need(name, "between 0 and 1", 0 <= getattr(self, name) <= 1)
        for name in ("smoothing", "drop_path"):
            self._need(name, "at least 0 and below 1", 0 <= getattr(self, name) < 1)
        between = "a fraction between 0 and 1, both excluded (0.5 halves the budget)"
        self._need("target", between, 0 < self.target < 1)
        self._need(
            "imbalance", "at least 1 (100 makes the rarest class 100 times smaller)", self.imbalance >= 1
        )
        self._need("img_size", "at least 1", self.img_size is None or self.img_size >= 1)
        self._need("clip_grad", "a positive number", self.clip_grad is None or self.clip_grad > 0)
        self._need("kl_weight", "at least 0", self.kl_weight is None or self.kl_weight >= 0)
        hot = self.kl_temperature is None or self.kl_temperature > 0
        self._need("kl_temperature", "a positive number", hot)
        self._one_of("method", tuple(GROWTH))
        self._need("rank", "at least 1", self.rank >= 1)
        self._need("operator_steps", "at least 0", self.operator_steps >= 0)
        positive = self.operator_lr is None or self.operator_lr > 0
        self._need("operator_lr", "a positive number", positive)
        self._need("grow_noise", "at least 0", self.grow_noise is None or self.grow_noise >= 0)
        self._need("tokens", "a number such as 4, or rows and columns such as 4x6", self._grid_is_good())
        self._need("tokens_base", "at least 0", self.tokens_base is None or self.tokens_base >= 0)
        self._one_of("tokens_pool", POOLS)
        self._one_of("estimator", ESTIMATORS)
        self._need("directions", "at least 1", self.directions >= 1)
        self._need("omega", "at least 0", self.omega >= 0)
        self._need("start_frac", "at least 0 and below 1", 0 <= self.start_frac < 1)
        try:
            self.quantization()
        except ValueError as error:
            raise UserError(str(error).replace("QuantConfig: ", "")) from error
        self._one_of("imbalance_type", IMBALANCES)
        self._one_of("train_crop", CROPS)
        self._one_of("remode", ERASINGS)
        whole = self.crop_pct is None or 0 < self.crop_pct <= 1
        self._need("crop_pct", "above 0 and at most 1", whole)
        self._one_of("teacher_crop", CROPS)
        self._one_of("teacher_views", VIEWS)
        try:
            self.paco()
        except ValueError as error:
            raise UserError(str(error).replace("PaCoConfig: `", "--paco-").replace("`", "")) from error
        self._one_of("teacher_loss", TEACHER_LOSSES)
        self._one_of("teacher_sched", SCHEDULES)
        both = (self.train_list is None) == (self.test_list is None)
        self._need("train_list", "given together with test_list, or neither", both)
        for epoch, rho in (self.sam_rho_steps or {}).items():
            good = type(epoch) is int and epoch >= 0 and type(rho) in (int, float) and 0 <= rho < float("inf")
            self._need("sam_rho_steps", "radii of at least 0 by epochs from 0, such as {6: 0.1}", good)
        self._one_of("weight_norm", WEIGHT_NORMS)
        for name in ("teacher_epochs", "teacher_weight_decay", "sam_rho"):
            self._need(name, "at least 0", getattr(self, name) >= 0)
        for name in ("teacher_lr", "teacher_margin"):
            self._need(name, "a positive number", getattr(self, name) > 0)
        self._need("teacher_batch_size", "at least 1", self.teacher_batch_size >= 1)
        self._need("teacher_size", "at least 1", self.teacher_size is None or self.teacher_size >= 1)
        self._need("distill_alpha", "between 0 and 1", 0 <= self.distill_alpha <= 1)
        self._need("drw_beta", "at least 0 and below 1", 0 <= self.drw_beta < 1)
        for name in ("decay_rate", "teacher_decay_rate"):
            value = getattr(self, name)
            self._need(name, "above 0 and at most 1", value is None or 0 < value <= 1)
        for name in ("drw_epoch", "teacher_drw_epoch", "teacher_warmup_epochs"):
            self._need(name, "at least 0", getattr(self, name) is None or getattr(self, name) >= 0)
        self._one_of("cost_rule", COST_RULES)
        self._need("eta", "at least 0", self.eta is None or self.eta >= 0)
        self._need("eta", "0 with --cost-rule divide", not self.eta or self.cost_rule == "subtract")
        self._one_of("amp", AMP)
        self._one_of("budget", BUDGETS)
        self._one_of("sched", SCHEDULES)
        self._one_of("preset", ("paper", "nvit_repo"))
        self._one_of("opt", timm.optim.list_optimizers())
        for kind, size in (self.group_sizes or {}).items():
            rule = f"whole numbers of at least 1 for {', '.join(GROUP_KINDS)}"
            good = kind in GROUP_KINDS and isinstance(size, int) and size >= 1
            self._need("group_sizes", rule, good)

    def _grid_is_good(self) -> bool:
        sides = (self.tokens or "1").split("x")
        return len(sides) <= 2 and all(side.isascii() and side.isdigit() and int(side) > 0 for side in sides)

    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of semantic tokens."""
        sides = [int(side) for side in (self.tokens or "").split("x")]
        return sides[0], sides[-1]

    def quantization(self) -> QuantConfig:
        """What to quantise and how.

        Raises:
            ValueError: settings that do not go together.
        """
        names = ("weight_bits", "activation_bits", "granularity", "group_size", "grid", "scale")
        return QuantConfig(**{name: getattr(self, name) for name in names})

    def paco(self) -> PaCoConfig:
        """What a teacher is contrasted by.

        Raises:
            ValueError: a value out of its range.
        """
        names = PaCoConfig.__dataclass_fields__
        return PaCoConfig(**{name: getattr(self, f"paco_{name}") for name in names})

    def _need(self, name: str, rule: str, good: bool) -> None:
        if not good:
            raise UserError(f"{_flag(name)} must be {rule}, got {getattr(self, name)!r}.")

    def _one_of(self, name: str, known: Sequence[str]) -> None:
        value = getattr(self, name)
        if value not in known:
            some = f"one of {', '.join(known)}" if len(known) < 8 else "a known name"
            raise UserError(f"{_flag(name)} must be {some}, got {value!r}.{nearest(value, known)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data that YAML and JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "settings") -> Settings:
        """The inverse of :meth:`to_dict`; missing keys take their defaults.

        Args:
            data: settings by name.
            source: where they come from, for messages.

        Raises:
            UserError: a key that is not a setting, or a bad value.
        """
        check_keys(data, source)
        return cls(**data)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _typed(name: str, value: Any, hint: Any) -> Any:
    """``value`` as the type ``hint``; YAML reads 1e-3 as a string, so numbers may come as such."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and types.NoneType in allowed:
        return None
    kind = next(a for a in allowed if a is not types.NoneType)
    plain = typing.get_origin(kind) or kind
    if plain is float and isinstance(value, str | int) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            value = float(value)
    # NaN compares false with everything and would slip through some of the range checks.
    finite = not isinstance(value, float) or abs(value) < float("inf")
    if name == "tokens" and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # YAML reads 4 as a number
    if isinstance(value, plain) and finite and (plain is bool or not isinstance(value, bool)):
        return value
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}
    raise UserError(f"{_flag(name)} must be {words[plain]}, got {value!r}.")


def check_keys(data: Mapping[str, Any], source: str) -> None:
    """Raise UserError for the first key that is not a setting, naming the nearest one."""
    known = [f.name for f in fields(Settings)]
    for key in data:
        if key not in known:
            raise UserError(
                f"{source}: unknown key {key!r}.{nearest(str(key), known)} "
                "All keys are listed by `pyvitfast info --settings`."
            )


def recipe_names() -> list[str]:
    """The settings of papers that ``--config`` takes by name."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, or, where there is no such file, in the recipe of that name.

    Raises:
        UserError: neither such a file nor such a recipe, not YAML, or not a mapping.
    """
    names = recipe_names()
    known = not path.is_file() and str(path) in names
    try:
        data = yaml.safe_load((RECIPES / f"{path}.yaml" if known else path).read_text())
    except FileNotFoundError as error:
        raise UserError(
            f"--config {path}: no such file, and no recipe of that name ({', '.join(names)})."
            f"{nearest(str(path), names)}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise UserError(
            f"--config {path} is not valid YAML{line}: expected lines of `key: value`."
        ) from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"--config {path} must hold lines of `key: value`, got a {type(data).__name__}.")
    data.pop("verb", None)  # a run's own config.yaml says who wrote it
    return data


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """``["lr=1e-3", "mixup=0.8"]`` as a mapping; values are YAML.

    Raises:
        UserError: no ``=``, no key, an unknown key, or a value that is not YAML.
    """
    parsed = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set {text!r} must have the form key=value, such as --set mixup=0.8.")
        key = key.strip().replace("-", "_")
        try:
            parsed[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--set {key}: the value {value!r} is not valid YAML.") from error
    check_keys(parsed, "--set")
    return parsed


def resolve(
    config: Path | None = None,
    assignments: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    verb: str = "",
) -> Settings:
    """Settings from their sources; later ones win: defaults, data recipe, YAML file, ``--set``, flags.

    The data recipe holds the values that suit the built-in ``digits`` data set and the ``verb``.

    Raises:
        UserError: an unknown key, a bad value, or no model for data other than ``digits``.
    """
    given: dict[str, Any] = {}
    if config is not None:
        given = read_yaml(config)
        check_keys(given, f"--config {config}")
    given.update(parse_assignments(assignments))
    given.update({key: value for key, value in (flags or {}).items() if value is not None})
    digits = DIGITS | (DIGITS_DISTILL if verb == "distill" else {})
    recipe = dict(digits) if given.get("data", "digits") == "digits" else {}
    if given.get("model", DIGITS["model"]) != DIGITS["model"]:
        # The group sizes belong to the micro model's widths.
        recipe.pop("group_sizes", None)
    settings = Settings.from_dict({**recipe, **given})
    if not settings.model:
        raise UserError(
            f"--model is needed with --data {settings.data}: a timm name such as deit_tiny_patch16_224, "
            "or a .safetensors file."
        )
    return settings
