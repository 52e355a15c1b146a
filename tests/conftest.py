from __future__ import annotations

import os

import pytest
import torch

BACKEND = os.environ.get("PYVITFAST_BACKEND", "") or "auto"


def pytest_report_header() -> list[str]:
    import pyvitfast.ops as ops
    from pyvitfast.info import collect

    facts = collect()
    return [
        f"pyvitfast: backend {BACKEND}, loaded {ops.STATUS.loaded or 'nothing'}, "
        f"CPU capability {facts['cpu_capability']}, torch {torch.__version__}"
    ]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
