"""Compiled ops. ``__all__`` lists them; each has a twin in :mod:`pyvitfast.reference`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from pyvitfast import _lib
from pyvitfast._version import __version__

STATUS = _lib.load(__version__)

from pyvitfast.ops.adaptive_window_pool import adaptive_window_pool  # noqa: E402
from pyvitfast.ops.fake_quantize import fake_quantize  # noqa: E402
from pyvitfast.ops.few_query_attention import few_query_attention  # noqa: E402
from pyvitfast.ops.kron_grow import kron_grow  # noqa: E402
from pyvitfast.ops.linear_cross_attention import linear_cross_attention  # noqa: E402
from pyvitfast.ops.saliency_commit_ import saliency_commit_  # noqa: E402
from pyvitfast.ops.saliency_rowcol import saliency_rowcol  # noqa: E402
from pyvitfast.ops.scaled_sqnorm import scaled_sqnorm  # noqa: E402
from pyvitfast.ops.semantic_pool_attention import semantic_pool_attention  # noqa: E402
from pyvitfast.ops.spsa_perturb import spsa_perturb  # noqa: E402
from pyvitfast.ops.spsa_update_ import spsa_update_  # noqa: E402
from pyvitfast.ops.structured_gather import structured_gather  # noqa: E402
from pyvitfast.ops.structured_zero_ import structured_zero_  # noqa: E402
from pyvitfast.ops.tensor_ring_grow import tensor_ring_grow  # noqa: E402
from pyvitfast.ops.two_head_loss import two_head_loss  # noqa: E402
from pyvitfast.ops.window_gather_attention import window_gather_attention  # noqa: E402

__all__ = [
    "adaptive_window_pool",
    "fake_quantize",
    "few_query_attention",
    "kron_grow",
    "linear_cross_attention",
    "saliency_commit_",
    "saliency_rowcol",
    "scaled_sqnorm",
    "semantic_pool_attention",
    "spsa_perturb",
    "spsa_update_",
    "structured_gather",
    "structured_zero_",
    "tensor_ring_grow",
    "two_head_loss",
    "window_gather_attention",
]


_COMPILED: dict[str, Callable[..., Any]] = {name: globals()[name] for name in __all__}


def available(name: str, device: str | torch.device = "cpu") -> bool:
    """Whether the compiled kernel of op ``name`` can run on ``device``.

    Args:
        name: one of ``pyvitfast.ops.__all__``.
        device: a torch device or its name.

    Raises:
        ValueError: the op does not exist.
    """
    if name not in __all__:
        raise ValueError(f"available: `name` must be one of {', '.join(__all__)}, got {name!r}.")
    kind = torch.device(device).type
    if not STATUS.loaded or kind not in ("cpu", "cuda"):
        return False
    if kind == "cuda":
        return "_ops_cuda" in STATUS.loaded and torch.cuda.is_available()
    return True


@cache
def _reference(name: str, reason: str) -> Callable[..., Any]:
    _lib.warn_once_missing(name, reason)
    module = importlib.import_module("pyvitfast.reference")
    function: Callable[..., Any] = getattr(module, name)
    return function


def implementation(name: str, device: str | torch.device) -> Callable[..., Any]:
    """The compiled op where it can run on ``device``, else its reference with one RuntimeWarning.

    The methods call ops through this, so that they also work without a binary.
    """
    if available(name, device):
        return _COMPILED[name]
    kind = torch.device(device).type
    return _reference(name, STATUS.reasons.get(kind, f"there is no kernel for device {kind!r}"))
