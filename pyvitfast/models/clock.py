"""How long a call takes."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def seconds_of(run: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Mean seconds of ``calls`` calls of ``run``, with what it started on ``device``."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    wait()
    return (time.perf_counter() - start) / calls
