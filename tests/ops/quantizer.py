"""What the tests of the quantisation ops share."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from torch import Tensor


def scale_like(tensor: Tensor, granularity: str, group: int = 0) -> Tensor:
    """Random scales from 0.1 to 0.3 for a tensor."""
    if granularity == "tensor" or tensor.ndim == 0 or tensor.numel() == 0:
        shape: tuple[int, ...] = ()
    elif granularity == "channel":
        shape = (tensor.shape[0],)
    else:
        shape = (tensor.shape[0], -(-tensor[0].numel() // group))
    return 0.1 + 0.2 * torch.rand(shape)


def bits_of(tensor: Tensor) -> list[str]:
    """The bits of float32 values as eight hexadecimal digits."""
    return [f"{word & 0xFFFFFFFF:08x}" for word in tensor.flatten().view(torch.int32).tolist()]


def outputs_by_capability(script: str) -> set[bytes]:
    """What a script prints on each instruction set of this processor."""
    from pyvitfast import _C

    seen = set()
    for capability in _C.supported_cpu_capabilities():
        env = {**os.environ, "PYVITFAST_CPU_CAPABILITY": capability}
        seen.add(
            subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, check=True).stdout
        )
    return seen
