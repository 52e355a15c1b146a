"""The only loader of the compiled libraries."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

BACKENDS = ("cpu", "cuda", "emulated")
REMEDY = "Reinstall against the torch you run: pip install --no-build-isolation --force-reinstall --no-deps ."


@dataclass
class Status:
    """What was loaded, and the reason for what was not."""

    build: dict[str, Any] = field(default_factory=dict)
    loaded: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)


def requested_backend() -> str | None:
    """The value of ``PYVITFAST_BACKEND``, or None when the choice is left to us."""
    value = os.environ.get("PYVITFAST_BACKEND", "").strip().lower()
    if value and value not in BACKENDS:
        raise ImportError(
            f"pyvitfast: PYVITFAST_BACKEND must be one of {', '.join(BACKENDS)} or unset, got {value!r}."
        )
    return value or None


def find_binary(name: str) -> Path | None:
    """The path of ``pyvitfast.<name>``; right in editable installs too, unlike a path next to this file."""
    spec = importlib.util.find_spec(f"pyvitfast.{name}")
    return Path(spec.origin) if spec is not None and spec.origin else None


def read_build_info(binary: Path) -> dict[str, Any]:
    """What CMake wrote beside the binary."""
    path = binary.with_name("_build_info.json")
    if not path.is_file():
        raise ImportError(f"pyvitfast: {path} is missing beside {binary.name}; reinstall the package.")
    info: dict[str, Any] = json.loads(path.read_text())
    return info


def version_tuple(version: str) -> tuple[int, int]:
    """Major and minor of a torch version such as ``2.14.1+cu130``."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        raise ImportError(f"pyvitfast: cannot read the torch version {version!r}.")
    return int(match[1]), int(match[2])


def check_versions(build: dict[str, Any], package_version: str, torch_version: str) -> None:
    """Raise ImportError when the binaries were built for another torch or another pyvitfast."""
    if build["version"] != package_version:
        raise ImportError(
            f"pyvitfast: the Python files are version {package_version}, "
            f"the compiled libraries are version {build['version']}. {REMEDY}"
        )
    if version_tuple(torch_version) < version_tuple(build["torch_target"]):
        raise ImportError(
            f"pyvitfast: built for torch {build['torch_target']} or newer (compiled against "
            f"{build['torch_version']}), but torch {torch_version} is running. {REMEDY}"
        )


def check_cuda_versions(build: dict[str, Any], torch_cuda: str) -> None:
    """Raise ImportError when the CUDA kernels were built for another CUDA major version than torch's."""
    built = str(build["torch_cuda"])
    if built.split(".")[0] != torch_cuda.split(".")[0]:
        raise ImportError(
            f"pyvitfast: the CUDA kernels were built for CUDA {built}, but torch {torch.__version__} brings "
            f"CUDA {torch_cuda}. Reinstall against the torch you run "
            "(pip install --no-build-isolation --force-reinstall --no-deps .), or set PYVITFAST_BACKEND=cpu."
        )


def load_library(path: Path) -> None:
    """Load one library; a loader error names both torch versions and the remedy."""
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ImportError(
            f"pyvitfast: {path.name} could not be loaded under torch {torch.__version__}: {error}. {REMEDY}"
        ) from error


def check_cpu_capability() -> None:
    """Raise ImportError when ``PYVITFAST_CPU_CAPABILITY`` names what this processor cannot run."""
    if not os.environ.get("PYVITFAST_CPU_CAPABILITY") or find_binary("_C") is None:
        return  # without _C the first op call reports it
    introspection = importlib.import_module("pyvitfast._C")
    try:
        introspection.cpu_capability()
    except RuntimeError as error:
        raise ImportError(f"{error}.") from None


def load(package_version: str) -> Status:
    """Load what ``PYVITFAST_BACKEND`` asks for, or CPU kernels and, where torch has CUDA, CUDA kernels."""
    status = Status()
    backend = requested_backend()
    main = "_ops_emulated" if backend == "emulated" else "_ops"
    binary = find_binary(main)
    if binary is None:
        hint = (
            "build the test binaries: "
            "pip install --no-build-isolation -C cmake.define.PYVITFAST_BUILD_TESTS=ON ."
            if backend == "emulated"
            else "install with a C++20 compiler present: pip install --no-build-isolation ."
        )
        status.reasons["cpu"] = f"the compiled library pyvitfast/{main} is not installed; {hint}"
        status.reasons["cuda"] = status.reasons["cpu"]
        if backend is not None:
            raise ImportError(f"pyvitfast: PYVITFAST_BACKEND={backend}, but {status.reasons['cpu']}")
        return status
    status.build = read_build_info(binary)
    check_versions(status.build, package_version, torch.__version__)
    check_cpu_capability()
    load_library(binary)
    status.loaded.append(main)
    if backend == "emulated":
        status.reasons["cuda"] = "PYVITFAST_BACKEND=emulated runs the CUDA kernels on CPU tensors"
        return status
    reason = None
    cuda_binary = find_binary("_ops_cuda")
    if backend == "cpu":
        reason = "PYVITFAST_BACKEND=cpu"
    elif torch.version.cuda is None:
        reason = f"torch {torch.__version__} is a CPU-only build"
    elif cuda_binary is None:
        reason = f"the CUDA kernels were not built: {status.build.get('cuda_reason', 'unknown reason')}"
    if reason is None and cuda_binary is not None:
        check_cuda_versions(status.build, str(torch.version.cuda))
        load_library(cuda_binary)
        status.loaded.append("_ops_cuda")
    else:
        status.reasons["cuda"] = str(reason)
        if backend == "cuda":
            raise ImportError(f"pyvitfast: PYVITFAST_BACKEND=cuda, but {reason}.")
    return status


def warn_once_missing(name: str, reason: str) -> None:
    """Tell, once an op, that the plain-torch reference stands in for the compiled kernel."""
    warnings.warn(
        f"pyvitfast: {name} runs on the plain-torch reference: {reason}", RuntimeWarning, stacklevel=3
    )
