"""The benchmark runs and says what it promises; no test here looks at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.measure import Case, Limits, Peer, directed, error, measure, peak_bytes, rounds, saved_bytes

ROOT = Path(__file__).parent.parent
KEYS = {
    "op", "case", "shape", "dtype", "direction", "device", "threads", "median_us", "best_peer", "ratio",
    "ratio_eager", "ratio_compile", "gbps", "gflops", "roofline", "limit", "peak_bytes",
    "saved_bytes", "saved_ratio", "max_error",
}  # fmt: skip


@pytest.fixture(scope="module")
def limits():
    return Limits("cpu", 1)


def case(ours, peers, **more):
    expected = lambda: [torch.ones(4).double()]  # noqa: E731
    return Case("op", "case", "[4]", "float32", "forward", ours, peers, expected, 16, **more)


def test_a_wrong_result_is_never_timed(limits):
    with pytest.raises(AssertionError, match="off by"):
        measure(case(lambda: torch.zeros(4), {}), "cpu", 1, limits, 0.01)


def test_a_peer_with_another_result_gets_no_ratio(limits):
    peers = {"eager": Peer(lambda: torch.zeros(4)), "compile": Peer(lambda: torch.ones(4))}
    row = measure(case(lambda: torch.ones(4), peers), "cpu", 1, limits, 0.01)
    assert set(row) >= KEYS
    assert row["ratio_eager"] is None
    assert row["best_peer"] == "compile"
    assert "no ratio" in row["notes"]["eager"]


def test_a_peer_that_cannot_run_says_why(limits):
    def broken():
        raise RuntimeError("needs a thing")

    row = measure(case(lambda: torch.ones(4), {"eager": Peer(broken)}), "cpu", 1, limits, 0.01)
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


def test_the_limit_is_the_slower_of_bytes_and_operations(limits):
    """With a copy of 10 GB/s and a peak of 100 GFLOP/s, by hand."""
    medians = {
        "ours": 1e-6,
        "copy": limits.copy.bytes / 10e9,
        "fma": limits.multiply_add.flops / 100e9,
    }
    few, many = (limits.of(case(None, {}, flops=flops), medians) for flops in (0, 50_000))
    assert (few["limit"], many["limit"]) == ("copy", "fma")
    assert few["roofline"] == pytest.approx(16 / 10e9 / 1e-6)
    assert many["roofline"] == pytest.approx(50_000 / 100e9 / 1e-6)
    assert (few["copy_gbps"], few["peak_gflops"]) == (pytest.approx(10), pytest.approx(100))


def test_candidates_take_turns_in_changing_order():
    seen = []
    candidates = {name: lambda name=name: seen.append(name) for name in "abc"}
    times = rounds(candidates, lambda: seen.append("|"), "cpu", 0.0)
    assert {name: len(values) for name, values in times.items()} == {"a": 5, "b": 5, "c": 5}
    calls = [name for name in seen if name != "|"]
    assert seen[::2] == ["|"] * len(calls)  # what comes before, comes before each
    turns = ["".join(calls[i : i + 3]) for i in range(3, len(calls), 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns) and len(set(turns)) > 1


def test_all_threads_multiply_and_add():
    one, two = (Limits("cpu", threads).multiply_add for threads in (1, 2))
    assert two() == 2 * one.loop(two.iterations)


def test_directions_give_results_or_gradients():
    x, unused = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    runs = {
        direction: directed(lambda: x * x, [x, unused], [torch.ones(3)], direction)
        for direction in ("forward", "backward", "both")
    }
    result = runs["forward"]()
    assert torch.equal(result, torch.ones(3)) and not result.requires_grad
    for direction in ("backward", "both"):
        for _ in range(2):
            gradient, none = runs[direction]()
            assert torch.equal(gradient, torch.full((3,), 2.0)) and none is None
    with pytest.raises(ValueError, match="got 'sideways'"):
        directed(lambda: x, [x], [x], "sideways")


def test_backward_of_a_compiled_function_can_be_repeated():
    x = torch.ones(3, requires_grad=True)
    run = directed(torch.compile(lambda: (x.sin() * x.cos()).exp()), [x], [torch.ones(3)], "backward")
    assert torch.equal(run()[0], run()[0])


def test_saved_bytes_counts_a_storage_once_and_not_what_is_given(limits):
    x, w = torch.ones(4, 8, requires_grad=True), torch.ones(8, requires_grad=True)

    def forward():
        y = x * w  # keeps x and w
        return (y[:2] * y[2:]).sum()  # keeps two views of y

    assert saved_bytes(forward, [x, w]) == 4 * 8 * 4
    assert saved_bytes(forward, [x]) == 4 * 8 * 4 + 8 * 4
    row = measure(
        case(
            lambda: torch.ones(4), {}, forwards={"ours": lambda: x.exp(), "eager": forward}, given=[x, w]
        ),
        "cpu", 1, limits, 0.01,
    )  # fmt: skip
    assert (row["saved_bytes"], row["saved_ratio"]) == (128, 1.0)


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
