"""Models as ONNX or ``torch.export`` files, compared with the model before they are written."""

from __future__ import annotations

import copy
import errno
import importlib.util
import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyvitfast.models.checkpoint import write_atomically
from pyvitfast.models.modules import plain_torch, unwrap
from pyvitfast.models.summary import summary

FORMATS = ("onnx", "pt2")
_NEEDED = ("onnx", "onnxscript")


@dataclass(frozen=True)
class ExportReport:
    """What :func:`export` wrote.

    Args:
        path: the file.
        format: ``"onnx"`` or ``"pt2"``.
        size: bytes of the file.
        input_size: channels, height, width.
        batch_size: images of a call; None is any number.
        runtime: what ran the file for the comparison; None where onnxruntime is not installed.
        max_error: largest difference to the model's logits; None without a comparison.
    """

    path: Path
    format: str
    size: int
    input_size: tuple[int, int, int]
    batch_size: int | None
    runtime: str | None
    max_error: float | None

    def __str__(self) -> str:
        batch = "any number of" if self.batch_size is None else self.batch_size
        checked = "not compared with the model: onnxruntime is not installed"
        if self.runtime is not None:
            checked = f"{self.runtime} differs from the model by at most {self.max_error:.1e}"
        shape = "x".join(map(str, self.input_size))
        return f"{self.path}: {self.size / 1024:,.1f} KiB, takes {batch} {shape} images; {checked}"


def _format(path: Path, given: str | None) -> str:
    by_suffix = path.suffix.removeprefix(".")
    chosen = by_suffix if given is None else given
    if chosen not in FORMATS:
        name, value = ("path", path.name) if given is None else ("format", given)
        rule = "end in .onnx or .pt2" if given is None else "be onnx or pt2"
        raise ValueError(f"export: `{name}` must {rule}, got {value!r}.")
    if by_suffix != chosen:
        raise ValueError(f"export: `path` must end in .{chosen} for that format, got {path.name!r}.")
    return chosen


def _check(model: nn.Module, chosen: str) -> None:
    for name, tensor in model.state_dict().items():
        if type(tensor) is not Tensor:
            raise NotImplementedError(
                f"export: `model` must hold plain tensors, got a {type(tensor).__name__} in {name}."
            )
        if chosen == "onnx" and tensor.is_floating_point() and tensor.dtype != torch.float32:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"export: `model` must be float32 for ONNX, got {dtype} in {name}.")
    if chosen == "onnx" and (missing := [n for n in _NEEDED if importlib.util.find_spec(n) is None]):
        raise ImportError(
            f"export: ONNX needs packages that are not installed, {' and '.join(missing)}: "
            "pip install 'pyvitfast[export]', or export to .pt2, which needs torch only."
        )


def _onnx(model: nn.Module, images: Tensor, shapes: Any) -> tuple[bytes, Callable[[Tensor], Tensor] | None]:
    try:
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        unknown = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", str(error))
        what = f"{unknown[1]} has no form" if unknown else "it cannot be written"
        raise NotImplementedError(
            f"export: {what} in ONNX that this torch knows. Export to .pt2 instead."
        ) from error
    assert program is not None
    data = program.model_proto.SerializeToString()
    if importlib.util.find_spec("onnxruntime") is None:
        return data, None
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return data, lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def _pt2(model: nn.Module, images: Tensor, shapes: Any) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(model, (images,), dynamic_shapes=shapes), buffer)
    return buffer.getvalue(), torch.export.load(io.BytesIO(buffer.getvalue())).module()


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: str | None = None,
    batch_size: int | None = None,
    *,
    input_size: tuple[int, int, int] | None = None,
    tolerance: float = 1e-4,
) -> ExportReport:
    """Write ``model`` as a file that runs without us, once it gave the model's logits.

    A copy in eval mode on the CPU is exported; its input is ``images`` [B, C, H, W], its output ``logits``.
    The file is compared on random images, with a dynamic batch in batches of 1 and 3, and appears whole or
    not at all.

    Args:
        model: a model of ours or timm's; wrapped by ``torch.compile`` or DistributedDataParallel or not.
        path: target, ending in ``.onnx`` or ``.pt2`` (``torch.export``).
        format: ``"onnx"`` or ``"pt2"``; by default what ``path`` ends in.
        batch_size: images of a call; None allows any number.
        input_size: channels, height, width; by default what the model was built for.
        tolerance: largest difference allowed between logits, absolute plus relative.

    Raises:
        ValueError: wrong suffix or batch size, or for ONNX a model that is not float32.
        NotImplementedError: a weight that is no plain tensor, such as a compressed one.
        ImportError: onnx or onnxscript is missing.
        RuntimeError: the file's logits differ from the model's; nothing is written.
        OSError: the folder is missing or cannot be written.
    """
    path = Path(path)
    chosen = _format(path, format)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"export: `batch_size` must be at least 1 or None, got {batch_size}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT,
            f"export: the folder of `path` must exist; make it first: mkdir -p {path.parent}",
            str(path.parent),
        )
    inner = unwrap(model)
    _check(inner, chosen)
    inner = copy.deepcopy(inner).cpu().eval().requires_grad_(False)
    size = input_size or summary(inner).input_size
    dtype = next((p.dtype for p in inner.parameters()), torch.float32)
    generator = torch.Generator().manual_seed(0)

    def images(count: int) -> Tensor:
        return torch.randn(count, *size, generator=generator).to(dtype)

    # A batch of one would be taken for a constant.
    shapes = ({0: torch.export.Dim("batch")},) if batch_size is None else None
    with plain_torch():  # no runtime but ours has our ops
        data, run = (_onnx if chosen == "onnx" else _pt2)(inner, images(batch_size or 2), shapes)
    error: float | None = None
    if run is not None:
        batches = [images(n) for n in ((1, 3) if batch_size is None else (batch_size,))]
        error = max(_difference(inner(x), run(x), tolerance) for x in batches)
    write_atomically(path, data)
    runtime = {"onnx": "onnxruntime", "pt2": "torch.export"}[chosen] if run is not None else None
    return ExportReport(path, chosen, len(data), size, batch_size, runtime, error)


@torch.no_grad()
def _difference(expected: Tensor, found: Tensor, tolerance: float) -> float:
    error = float((expected - found).abs().max()) if expected.numel() else 0.0
    # NaN in both is no agreement: nothing could be compared.
    if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance):
        raise RuntimeError(
            f"export: the file's logits must equal the model's within {tolerance:g}, got a difference of "
            f"{error:g}. Nothing was written."
        )
    return error
