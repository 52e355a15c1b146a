from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from pyvitfast.cli import app
from pyvitfast.train.loop import Loop

ROOT = Path(__file__).resolve().parents[2]

# A whole pruning run in about three seconds: 13 updates an epoch.
TINY_PRUNE = [
    "--epochs",
    "2",
    "--batch-size",
    "100",
    "--interval",
    "2",
    "--groups-per-step",
    "8",
    "--finetune-epochs",
    "1",
    "--device",
    "cpu",
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # bits of sums may depend on it


@pytest.fixture
def cli() -> Callable[..., Result]:
    """Run ``pyvitfast ARGS`` in this process."""

    def run(*args: object) -> Result:
        return CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)

    return run


@pytest.fixture
def refused(cli: Callable[..., Result]) -> Callable[..., str]:
    """Run ``pyvitfast ARGS``, which must end with exit code 2 and one line; that line."""

    def run(*args: object) -> str:
        result = cli(*args)
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("error: ")
        assert len(result.stderr.strip().splitlines()) == 1
        assert "Traceback" not in result.output
        return result.stderr

    return run


def start(*args: object, processes: int = 1) -> subprocess.Popen[str]:
    """Start ``pyvitfast ARGS`` as processes of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [*launcher, "pyvitfast", *map(str, args)]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run without what differs from run to run: times and the command line."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in e.items() if k != "seconds"} for e in events if e["event"] != "start"]


@contextlib.contextmanager
def stopping_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A signal comes after so many batches."""
    left, steps = itertools.count(batches - 1, -1), Loop._steps

    def interrupted(self: Loop, running: Any) -> Iterator[Any]:
        for loss in steps(self, running):
            if next(left) == 0:
                signal.raise_signal(signal.SIGINT)
            yield loss

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_steps", interrupted)
        yield


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Two classes of ten 12x12 colour images, which differ in brightness."""
    root = tmp_path / "images"
    random_state = np.random.RandomState(0)
    for c, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for i in range(10):
            pixels = random_state.randint(120 * c, 120 * c + 120, (12, 12, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.{'png' if i % 2 else 'jpg'}")
    return root
