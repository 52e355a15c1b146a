"""The benchmark runs and says what it promises; no test here looks at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.measure import Case, Copy, Peer, error, measure, peak_bytes

ROOT = Path(__file__).parent.parent
KEYS = {
    "op", "case", "shape", "dtype", "direction", "device", "threads", "median_us", "best_peer", "ratio",
    "ratio_eager", "ratio_compile", "gbps", "gflops", "roofline", "peak_bytes", "max_error",
}  # fmt: skip


def case(ours, peers):
    return Case("op", "case", "[4]", "float32", "forward", ours, peers, lambda: [torch.ones(4).double()], 16)


def test_a_wrong_result_is_never_timed():
    with pytest.raises(AssertionError, match="off by"):
        measure(case(lambda: torch.zeros(4), {}), "cpu", 1, Copy("cpu"), 0.01)


def test_a_peer_with_another_result_gets_no_ratio():
    peers = {"eager": Peer(lambda: torch.zeros(4)), "compile": Peer(lambda: torch.ones(4))}
    row = measure(case(lambda: torch.ones(4), peers), "cpu", 1, Copy("cpu"), 0.01)
    assert set(row) >= KEYS
    assert row["ratio_eager"] is None
    assert row["best_peer"] == "compile"
    assert "no ratio" in row["notes"]["eager"]


def test_a_peer_that_cannot_run_says_why():
    def broken():
        raise RuntimeError("needs a thing")

    row = measure(case(lambda: torch.ones(4), {"eager": Peer(broken)}), "cpu", 1, Copy("cpu"), 0.01)
    assert row["notes"]["eager"] == "n/a: RuntimeError: needs a thing"
    assert row["ratio"] is None


def test_error_is_relative_and_refuses_other_shapes():
    assert error([torch.tensor([2.0])], [torch.tensor([4.0])]) == 0.5
    assert error([torch.ones(2)], [torch.ones(3)]) == float("inf")
    assert error([torch.tensor([float("nan")])], [torch.ones(1)]) == float("inf")


def test_peak_bytes_sees_a_temporary():
    def run():
        a = torch.ones(1000)
        del a
        return torch.ones(500)

    assert peak_bytes(run, lambda: None, "cpu") == 4000


def test_command_writes_rows(tmp_path):
    file = tmp_path / "rows.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.run",
        "--op",
        "saliency_commit_",
        "--quick",
        "--json",
        str(file),
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found = json.loads(file.read_text())
    assert found["header"]["threads"] >= 1
    assert all(set(row) >= KEYS for row in found["rows"])
