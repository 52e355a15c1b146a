"""What a FOGZO step costs beside a straight-through one: the whole step, on digits and a micro DeiT."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from torch import Tensor
from torch.nn import functional as F

import pyvitfast  # noqa: F401  registers the micro model with timm
from benchmarks.measure import alternate
from pyvitfast.quantize import FOGZO, QuantConfig, prepare


def stepper(estimator: str, n: int, batch: int) -> Callable[[], Tensor]:
    """A call that takes one optimizer step."""
    torch.manual_seed(0)
    model = prepare(timm.create_model("vit_micro_patch2_8"), QuantConfig(weight_bits=2)).train()
    images, labels = torch.randn(batch, 1, 8, 8), torch.randint(0, 10, (batch,))
    optimizer = FOGZO(
        torch.optim.AdamW(model.parameters(), lr=1e-3), model, estimator=estimator, n=n, schedule="constant"
    )
    return lambda: optimizer.step(lambda: F.cross_entropy(model(images), labels))


def run(batches: Sequence[int], seconds: float = 10.0) -> list[dict[str, Any]]:
    """Medians of alternating steps, by batch size; ``ideal`` counts a backward pass as two forward ones."""
    rows = []
    for batch in batches:
        steps = {
            "STE": stepper("ste", 1, batch),
            "FOGZO n=1": stepper("fogzo", 1, batch),
            "FOGZO n=4": stepper("fogzo", 4, batch),
            "n-SPSA n=1": stepper("spsa", 1, batch),
        }
        times = alternate(copy.copy(steps), lambda: None, "cpu", seconds)
        ideal = {"STE": 1.0, "FOGZO n=1": 1 + 2 / 3, "FOGZO n=4": 1 + 8 / 3, "n-SPSA n=1": 2 / 3}
        rows += [
            {
                "batch": batch,
                "arm": name,
                "ms": 1e3 * seconds_taken,
                "ratio": seconds_taken / times["STE"],
                "ideal": ideal[name],
            }
            for name, seconds_taken in times.items()
        ]
    return rows
