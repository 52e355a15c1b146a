"""Vision Transformers made small, fast and cheap to train, on compiled kernels."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

from pyvitfast._version import __version__

_PUBLIC = {
    "save": "pyvitfast.models.checkpoint",
    "load": "pyvitfast.models.checkpoint",
    "summary": "pyvitfast.models.summary",
}
_SUBPACKAGES = (
    "distill",
    "grow",
    "models",
    "ops",
    "prune",
    "quantize",
    "reference",
    "report",
    "tokens",
    "train",
)

__all__ = [
    "__version__",
    "distill",
    "grow",
    "load",
    "models",
    "ops",
    "prune",
    "quantize",
    "reference",
    "report",
    "save",
    "summary",
    "tokens",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"pyvitfast.{name}")
    raise AttributeError(f"module 'pyvitfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


importlib.import_module("pyvitfast.ops")
# Registers our models with timm. Beside a torch that timm or torchvision cannot use (ImportError, or
# RuntimeError from torchvision's own ops) the compiled ops still work; what needs timm says so when used.
with contextlib.suppress(ImportError, RuntimeError):
    importlib.import_module("pyvitfast.models")
