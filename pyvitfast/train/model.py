"""The model of a run: by timm name or from a file, checked against the data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import pyvitfast.models.micro  # noqa: F401  registers the micro model with timm
from pyvitfast import grow as growth
from pyvitfast.models.checkpoint import describe, load
from pyvitfast.prune.sparsity import sparse_layers
from pyvitfast.quantize import prepare
from pyvitfast.tokens import to_stvit
from pyvitfast.train.data import Data, image_size, input_channels
from pyvitfast.train.errors import UserError, nearest
from pyvitfast.train.settings import Settings

OPERATORS: dict[str, Callable[..., growth.GrowthOperator]] = {
    "mango": growth.MangoOperator,
    "ligo": growth.LiGOOperator,
}
RANDOM, PRETRAINED, FILE = "random weights", "timm's pretrained weights", "a file"


def is_file(model: str) -> bool:
    """Whether ``--model`` means a file rather than a timm name."""
    return Path(model).suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt") or Path(model).exists()


def check_name(name: str, flag: str = "--model") -> None:
    """Raise UserError, about ``flag``, unless timm knows ``name``."""
    if not timm.is_model(name) and not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        hint = nearest(name.split(".")[0], timm.list_models())
        raise UserError(f"{flag} {name}: no such timm model and no such file.{hint}")


def load_file(path: str, flag: str = "--model") -> nn.Module:
    """The model in a file written by ``pyvitfast.save``, named with ``flag``.

    Raises:
        UserError: missing, damaged or foreign file.
    """
    if Path(path).is_dir():
        raise UserError(f"{flag} {path} is a folder. Give a file in it, such as {path}/model.safetensors.")
    if not Path(path).is_file():
        raise UserError(f"{flag} {path}: no such file.")
    try:
        return load(path)
    except (ValueError, OSError, NotImplementedError) as error:
        raise UserError(f"{flag} {path}: {error}") from error


def create(name: str, pretrained: bool = False, flag: str = "--model", **arguments: Any) -> nn.Module:
    """A model by timm name, given with ``flag``.

    Raises:
        UserError: unknown name, an argument it does not take, or weights that cannot be fetched.
    """
    check_name(name, flag)
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **arguments)
        describe(model)
    except (TypeError, RuntimeError, ValueError, OSError, NotImplementedError, AssertionError) as error:
        given = ", ".join(f"{k}={v}" for k, v in arguments.items())
        source = " with pretrained weights" if pretrained else ""
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{flag} {name} cannot be made{source} ({given}): {reason}") from error
    return model


def for_data(settings: Settings, data: Data) -> tuple[nn.Module, str]:
    """The model of ``settings`` for ``data``, and where its weights come from.

    Raises:
        UserError: model and data do not fit, or the model cannot be made.
    """
    if is_file(settings.model):
        if settings.pretrained:
            raise UserError(f"--pretrained goes with a timm name, not with the file {settings.model}.")
        model, origin = load_file(settings.model), FILE
    else:
        arguments: dict[str, Any] = {"num_classes": data.num_classes}
        if data.in_chans is not None:
            arguments["in_chans"] = data.in_chans
        if settings.img_size is not None:
            arguments["img_size"] = settings.img_size
        if settings.drop_path:
            arguments["drop_path_rate"] = settings.drop_path
        torch.manual_seed(settings.seed)
        model = create(settings.model, settings.pretrained, **arguments)
        take_size_of(data, model)
        origin = PRETRAINED if settings.pretrained else RANDOM
    check_fit(model, settings.model, data)
    return model, origin


def take_size_of(data: Data, model: nn.Module) -> None:
    """Let a network without patches, which takes any size, take that of ``data`` in memory as its own."""
    if data.in_chans is not None and not hasattr(model, "patch_embed"):
        known: Any = model
        shape = tuple(data.train[0, None][0].shape)
        known.pretrained_cfg = known.default_cfg = {**known.pretrained_cfg, "input_size": shape}


def trained(name: str, data: Data, flag: str, otherwise: str) -> nn.Module:
    """The trained network ``name``, a file or a timm name with pretrained weights, given with ``flag``.

    Raises:
        UserError: it is not there, or has other classes than ``data``; then ``otherwise`` says what to do.
    """
    model = load_file(name, flag) if is_file(name) else create(name, True, flag)
    check_classes(model, name, data, flag, otherwise)
    return model


def check_classes(model: nn.Module, name: str, data: Data, flag: str, otherwise: str) -> None:
    """Raise UserError, about ``flag``, when ``model`` has other classes than ``data``."""
    classes = getattr(model, "num_classes", data.num_classes)
    if classes != data.num_classes:
        raise UserError(
            f"{flag} {name} tells {classes} classes apart, --data {data.name} has {data.num_classes}. "
            + otherwise
        )


def check_fit(model: nn.Module, name: str, data: Data) -> None:
    """Raise UserError when channels or classes of ``model`` and ``data`` differ."""
    chans = input_channels(model)
    if data.in_chans is not None and chans != data.in_chans:
        raise UserError(
            f"--model {name} takes images with {chans} channels, --data {data.name} has {data.in_chans}. "
            "Use a model made for it, such as vit_micro_patch2_8 for digits."
        )
    if chans not in (1, 3):
        raise UserError(f"--model {name} takes images with {chans} channels; image data has 1 or 3.")
    classes = getattr(model, "num_classes", data.num_classes)
    if classes != data.num_classes:
        raise UserError(
            f"--model {name} tells {classes} classes apart, --data {data.name} has {data.num_classes}. "
            "Use the data it was trained on, or start from a timm name, whose classifier is made to fit."
        )
    size = image_size(model)
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, chans, size, size))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--model {name} cannot take images of {size}x{size}: {reason}") from error


def check_sparsity(model: nn.Module, name: str) -> None:
    """Raise UserError when no layer of ``model`` can be made sparse."""
    try:
        sparse_layers(model)
    except ValueError as error:
        raise UserError(f"--model {name} cannot be made sparse: {error}") from error


def with_tokens(model: nn.Module, settings: Settings) -> nn.Module:
    """``model`` with the semantic tokens of ``settings``.

    Raises:
        UserError: it cannot have them.
    """
    try:
        return to_stvit(
            model,
            settings.token_grid(),
            base=settings.tokens_base,
            pool=settings.tokens_pool,
            seed=settings.seed,
        )
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"--model {settings.model} cannot have semantic tokens: {error}") from error


def check_quantization(model: nn.Module, settings: Settings) -> None:
    """Raise UserError when ``model`` cannot be quantised as ``settings`` say, or not trained so."""
    if settings.estimator != "ste" and settings.grad_accum_steps > 1:
        raise UserError(
            f"--grad-accum-steps {settings.grad_accum_steps} goes with --estimator ste only: the others "
            "need all images of an update at once. Raise --batch-size instead."
        )
    if settings.estimator != "ste" and settings.amp == "fp16":
        raise UserError("--amp fp16 goes with --estimator ste only; use --amp bf16 or no.")
    quantise(copy.deepcopy(model), settings)


def check_heads(model: nn.Module, settings: Settings) -> None:
    """Raise UserError unless ``model`` has two heads."""
    # LeViT and others have two heads on one feature: no token of theirs could become an expert.
    if not all(hasattr(model, name) for name in ("set_distilled_training", "head_dist", "dist_token")):
        names = ", ".join(timm.list_models("deit_*distilled*")[:3])
        raise UserError(
            f"--model {settings.model} has no distillation token and head. Take one that has: {names}."
        )


def quantise(model: nn.Module, settings: Settings) -> None:
    """Prepare ``model`` in place.

    Raises:
        UserError: it cannot be quantised.
    """
    try:
        prepare(model, settings.quantization())
    except ValueError as error:
        raise UserError(f"--model {settings.model} cannot be quantised: {error}") from error


def target_of(source: nn.Module, settings: Settings) -> nn.Module:
    """The target with its own first weights, for the source's channels, classes and images.

    Raises:
        UserError: it cannot be made.
    """
    known: Any = source
    torch.manual_seed(settings.seed)
    arguments: dict[str, Any] = {"num_classes": known.num_classes, "in_chans": input_channels(source)}
    if is_file(settings.grow_to):
        if settings.compare:
            raise UserError(
                f"--compare goes with a timm name for --target, not with the file {settings.grow_to}, whose "
                "weights are not those that training from scratch begins with."
            )
        return load_file(settings.grow_to, "--target")
    if settings.img_size is not None:
        arguments["img_size"] = settings.img_size
    if settings.drop_path:
        arguments["drop_path_rate"] = settings.drop_path
    return create(settings.grow_to, flag="--target", **arguments)


def check_growth(source: nn.Module, settings: Settings) -> None:
    """Raise UserError when ``source`` cannot grow into the target of ``settings``, or not be compared."""
    if settings.compare and not settings.finetune_epochs:
        raise UserError("--compare needs --finetune-epochs of at least 1: accuracies come after each epoch.")
    grown(copy.deepcopy(source), settings)


def grown(
    source: nn.Module, settings: Settings, train: Callable[[growth.GrowthOperator], None] | None = None
) -> nn.Module:
    """``source`` grown into the target of ``settings``; ``train`` is called with a learned operator.

    Raises:
        UserError: the pair does not fit, or the operator's loss became infinite.
    """
    s = settings
    target = target_of(source, s)
    sizes = image_size(source), image_size(target)
    if sizes[0] != sizes[1]:
        raise UserError(
            f"--target {s.grow_to} takes images of {sizes[1]} pixels, the source of {sizes[0]}. Give both "
            f"one size, for example --set img_size={sizes[0]}."
        )
    options: dict[str, Any] = {"noise": s.grow_noise, "depth": s.grow_depth}
    if s.method == "mango":
        options["rank"] = s.rank
    if s.method not in OPERATORS or s.grow_width is not None:
        options["width"] = s.grow_width
    try:
        if s.method not in OPERATORS or train is None:
            return growth.grow(source, target, s.method, seed=s.seed, **options)
        given = {name: value for name, value in options.items() if value is not None}
        operator = OPERATORS[s.method](source, target, seed=s.seed, **given)
        train(operator)
        return operator.materialize()
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"--source {s.model} cannot grow: {str(error).removeprefix('grow: ')}") from error
    except FloatingPointError as error:
        raise UserError(f"the operator of --method {s.method}: {error}") from error
