"""Model files: safetensors with the architecture as JSON in the metadata, and no pickle."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch
from torch import Tensor, nn

from pyvitfast._version import __version__
from pyvitfast.models.architecture import Config, config_of
from pyvitfast.models.config import ViTConfig
from pyvitfast.models.crossvit_config import CrossViTConfig
from pyvitfast.models.modules import unwrap
from pyvitfast.models.quantized import describe_layers, rebuild_layers
from pyvitfast.models.stvit_config import STViTConfig
from pyvitfast.models.stvit_swin_config import STViTSwinConfig
from pyvitfast.models.swin_config import SwinConfig

FORMAT_VERSION = 1
_KINDS: dict[type[Config], str] = {
    ViTConfig: "vit",
    SwinConfig: "swin",
    CrossViTConfig: "crossvit",
    STViTConfig: "stvit",
    STViTSwinConfig: "stvit_swin",
}
_KEY = "pyvitfast"
_SUFFIX = ".safetensors"


def _jsonable(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def describe(model: nn.Module) -> dict[str, Any]:
    """How to rebuild ``model``: an explicit ViT architecture, else a timm name with its arguments; and which
    of its layers are quantised.

    Raises:
        NotImplementedError: neither is known.
    """
    if quantised := describe_layers(model):
        return {"kind": "quantized", "base": _describe_float(model), **quantised}
    return _describe_float(model)


def _describe_float(model: nn.Module) -> dict[str, Any]:
    try:
        config = config_of(model)
        return {"kind": _KINDS[type(config)], "config": config.to_dict()}
    except (TypeError, NotImplementedError) as error:
        name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
        arguments = dict(getattr(model, "_model_args", None) or {})
        if not name or not timm.is_model(name) or not _jsonable(arguments):
            raise NotImplementedError(
                f"save: `model` must be a supported Vision Transformer or come from timm.create_model with "
                f"plain arguments, got {type(model).__name__} ({error})"
            ) from error
    if hasattr(model, "num_classes"):
        arguments["num_classes"] = model.num_classes
    return {"kind": "timm", "name": name, "arguments": arguments}


def build(architecture: Mapping[str, Any]) -> nn.Module:
    """A freshly initialised model from what :func:`describe` returned."""
    for family, kind in _KINDS.items():
        if architecture["kind"] == kind:
            return family.from_dict(architecture["config"]).build()
    if architecture["kind"] == "timm":
        model: nn.Module = timm.create_model(architecture["name"], **architecture["arguments"])
        return model
    if architecture["kind"] == "quantized":
        return rebuild_layers(build(architecture["base"]), architecture["packed"], architecture["layers"])
    raise ValueError(
        f"load: architecture kind must be one of {', '.join((*_KINDS.values(), 'timm', 'quantized'))}, "
        f"got {architecture['kind']!r}."
    )


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_suffix(function: str, path: Path) -> None:
    if path.suffix != _SUFFIX:
        raise ValueError(
            f"{function}: `path` must end in {_SUFFIX}, got {str(path)!r}. "
            "Pickled files (.pt, .pth, .bin) are neither written nor read."
        )


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is whole or not there; an existing one stays until the new one is."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; give the model the permissions an ordinary new file would have.
        os.umask(mask := os.umask(0))
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    # The rename itself lives in the folder; systems without folder handles have nothing to flush.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write ``model`` to one file from which :func:`load` rebuilds it without the source model.

    Weights keep their dtype; the architecture, timm's ``pretrained_cfg`` and a SHA-256 of the weights go in
    the metadata. The file appears whole or not at all: a failing save leaves an existing file untouched.

    Args:
        model: a model of ours, a timm Vision Transformer, or any model from ``timm.create_model``;
            wrapped by ``torch.compile`` or DistributedDataParallel or not.
        path: target, ending in ``.safetensors``.

    Raises:
        ValueError: wrong suffix.
        NotImplementedError: the architecture cannot be described.
        OSError: the folder is missing or cannot be written.
    """
    path = Path(path)
    _check_suffix("save", path)
    if not isinstance(model, nn.Module):
        raise TypeError(f"save: `model` must be an nn.Module, got {type(model).__name__}.")
    model = unwrap(model)
    if not path.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT,
            f"save: the folder of `path` must exist; make it first: mkdir -p {path.parent}",
            str(path.parent),
        )
    header: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "pyvitfast_version": __version__,
        "architecture": describe(model),
        "training": model.training,
    }
    pretrained = getattr(model, "pretrained_cfg", None)
    if pretrained and _jsonable(dict(pretrained)):
        header["pretrained_cfg"] = dict(pretrained)
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in model.state_dict().items()}
    header["sha256"] = _digest(tensors)
    data = safetensors_torch.save(tensors, {_KEY: json.dumps(header)})
    try:
        write_atomically(path, data)
    except OSError as error:
        raise type(error)(
            error.errno,
            f"save: {path} could not be written ({error.strerror}); an existing file there is unchanged. "
            "Check the folder's permissions and the free space",
            str(path),
        ) from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            # Copies, since products with weights at the file's odd addresses are slower and round otherwise.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"load: {path} must be a whole safetensors file, got one that is truncated or corrupted "
            f"({error}). Save or copy it again."
        ) from error
    if _KEY not in metadata:
        raise ValueError(
            f"load: {path} must be written by pyvitfast.save, got a safetensors file without our metadata. "
            "Its weights can be read with safetensors.torch.load_file and loaded into a model you build."
        )
    try:
        header = json.loads(metadata[_KEY])
        version = header["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"load: {path}: our metadata must be JSON with a format_version ({error!r})."
        ) from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"load: {path} must have format version {FORMAT_VERSION}, got {version!r} (written by pyvitfast "
            f"{header.get('pyvitfast_version')}, this is {__version__}). Upgrade pyvitfast to read it."
        )
    return header, tensors


def load(path: str | os.PathLike[str]) -> nn.Module:
    """Rebuild a model from a file that :func:`save` wrote.

    Returns:
        The model on the CPU, in the dtype and the train or eval mode it was saved in.

    Raises:
        FileNotFoundError: no such file.
        ValueError: wrong suffix, truncated or corrupted file, not written by us, unknown format version, or
            weights that do not fit the architecture.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            errno.ENOENT,
            "load: `path` must be a file written by pyvitfast.save",
            str(path),
        )
    _check_suffix("load", path)
    header, tensors = _read(path)
    try:
        model = build(header["architecture"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"load: {path}: the architecture in the metadata must be complete, got {error!r}. The file was "
            "edited or damaged; save it again."
        ) from error
    expected = {name: list(t.shape) for name, t in model.state_dict().items()}
    found = {name: list(t.shape) for name, t in tensors.items()}
    wrong = [
        f"{name} must have shape {expected.get(name)}, got {found.get(name)}"
        for name in sorted({*expected, *found})
        if expected.get(name) != found.get(name)
    ]
    if wrong:
        raise ValueError(
            f"load: {path}: weights must fit the stored architecture: {'; '.join(wrong[:5])}"
            f"{f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''}. The file was edited; save it again."
        )
    if header.get("sha256") != _digest(tensors):
        raise ValueError(
            f"load: {path}: the weights must match their stored SHA-256, but they differ: the file is "
            "corrupted. Save or copy it again."
        )
    model.load_state_dict(tensors, assign=True)
    dtypes = {t.dtype for t in tensors.values() if t.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())  # buffers that are not in the file, such as Swin's masks
    if "pretrained_cfg" in header:
        pretrained = {k: tuple(v) if isinstance(v, list) else v for k, v in header["pretrained_cfg"].items()}
        model.pretrained_cfg = model.default_cfg = pretrained  # type: ignore[assignment]
    return model.train(bool(header.get("training", False)))
