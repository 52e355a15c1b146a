"""Vision Transformers made small, fast and cheap to train, on compiled kernels."""

from __future__ import annotations

import importlib
from typing import Any

from pyvitfast._version import __version__

_PUBLIC = {
    "save": "pyvitfast.models.checkpoint",
    "load": "pyvitfast.models.checkpoint",
    "summary": "pyvitfast.models.summary",
}
_SUBPACKAGES = ("models", "ops", "prune", "reference", "report", "train")

__all__ = ["__version__", "load", "models", "ops", "prune", "reference", "report", "save", "summary", "train"]


def __getattr__(name: str) -> Any:
    # timm is imported only by what needs it, so the ops also work beside a torch that timm cannot use.
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"pyvitfast.{name}")
    raise AttributeError(f"module 'pyvitfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


importlib.import_module("pyvitfast.ops")
