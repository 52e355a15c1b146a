"""What is installed, built and loaded: ``python -m pyvitfast.info``."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from typing import Any

import torch

from pyvitfast import _lib, ops
from pyvitfast._version import __version__

OLDEST_TORCH = "2.10"
NEWEST_TORCH = "2.14"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _capability() -> dict[str, Any]:
    if _lib.find_binary("_C") is None:
        return {"cpu_capability": "not built"}
    from pyvitfast import _C

    return {
        "cpu_capability": _C.cpu_capability(),
        "cpu_capabilities_supported": list(_C.supported_cpu_capabilities()),
    }


def support() -> dict[str, dict[str, bool]]:
    """For each op: which kernels the dispatcher holds, read from the dispatcher itself."""
    table = {}
    for name in ops.__all__:
        keys = {}
        for key in ("CPU", "CUDA", "Meta", "Autograd"):
            registered = bool(ops.STATUS.loaded) and torch._C._dispatch_has_kernel_for_dispatch_key(
                f"pyvitfast::{name}", key
            )
            keys[key] = bool(registered)
        table[name] = keys
    return table


def collect() -> dict[str, Any]:
    """Versions, build, loaded libraries and the reason for what is missing, as JSON-able values."""
    return {
        "pyvitfast": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_supported": f"{OLDEST_TORCH} to {NEWEST_TORCH}",
        "torch_cuda": str(torch.version.cuda),
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "packages": {p: _version(p) for p in ("timm", "torchvision", "accelerate", "numpy")},
        "backend": _lib.requested_backend() or "auto",
        "loaded": ops.STATUS.loaded,
        "reasons": ops.STATUS.reasons,
        "build": ops.STATUS.build,
        **_capability(),
        "ops": support(),
    }


def main() -> None:
    """Print :func:`collect`, one fact a line."""
    for key, value in collect().items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, entry in value.items():
                print(f"  {name}: {entry}")
        else:
            print(f"{key}: {value}")


if __name__ == "__main__":
    main()
