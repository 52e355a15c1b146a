"""Fair timing of candidates that compute the same thing: compare first, then alternate and take medians."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Peer:
    """Another way to the same result. ``same`` is False where the quantity differs, so no ratio is taken."""

    run: Callable[[], Any]
    same: bool = True
    note: str = ""


@dataclass
class Case:
    """One row of the benchmark.

    ``least_bytes`` is what must be read and written at the least; ``weights`` the size of the inputs, to
    which extra memory is compared. ``expected`` is the float64 result; ``tolerance`` the greatest allowed
    difference from it, relative to its greatest entry.
    """

    op: str
    case: str
    shape: str
    dtype: str
    direction: str
    ours: Callable[[], Any]
    peers: dict[str, Peer]
    expected: Callable[[], list[Tensor]]
    least_bytes: int
    flops: int = 0
    tolerance: float = 1e-4
    before: Callable[[], None] = field(default=lambda: None)


def synchronize(device: str) -> None:
    """Wait for the device's queue."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], Any], before: Callable[[], None], device: str) -> float:
    """Seconds of one call."""
    before()
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def alternate(
    candidates: dict[str, Callable[[], Any]], before: Callable[[], None], device: str, seconds: float
) -> dict[str, float]:
    """Median seconds of each candidate; they take turns, so that a drifting machine treats all alike."""
    first = {name: timed(run, before, device) for name, run in candidates.items()}
    repeats = max(5, min(200, int(seconds / max(sum(first.values()), 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            times[name].append(timed(run, before, device))
    return {name: statistics.median(values) for name, values in times.items()}


def flat(result: Any) -> list[Tensor]:
    """The tensors of a result as float64 on the CPU."""
    leaves = torch.utils._pytree.tree_leaves(result)
    return [t.detach().double().cpu() for t in leaves if isinstance(t, Tensor)]


def error(result: list[Tensor], expected: list[Tensor]) -> float:
    """Greatest difference relative to the greatest expected entry; infinite where shapes differ."""
    worst = 0.0
    if len(result) != len(expected):
        return float("inf")
    for got, want in zip(result, expected, strict=True):
        if got.shape != want.shape or not bool(got.isfinite().all()):
            return float("inf")
        scale = max(float(want.abs().max()) if want.numel() else 0.0, 1e-30)
        if got.numel():
            worst = max(worst, float((got - want).abs().max()) / scale)
    return worst


def peak_bytes(run: Callable[[], Any], before: Callable[[], None], device: str) -> int:
    """Most memory that a call held at once beyond what was there before."""
    before()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - base
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    with tempfile.NamedTemporaryFile(suffix=".json", delete=False) as file:
        path = file.name
    try:
        profiler.export_chrome_trace(path)
        with open(path) as trace:
            events = json.load(trace)["traceEvents"]
    finally:
        os.unlink(path)
    del kept
    steps = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    held = peak = 0
    for _, size in sorted(steps, key=lambda step: step[0]):
        held += size
        peak = max(peak, held)
    return peak


class Copy:
    """A copy far larger than the caches: the roofline, timed in turn with the candidates of each case."""

    def __init__(self, device: str) -> None:
        size = 2**28 if device == "cuda" else 2**25
        self.target = torch.empty(size, device=device)
        self.source = torch.ones(size, device=device)
        self.bytes = 8 * size

    def __call__(self) -> None:
        self.target.copy_(self.source)


def measure(case: Case, device: str, threads: int, copy: Copy, seconds: float) -> dict[str, Any]:
    """The row of one case; a candidate whose result is wrong gets no ratio but the error."""
    expected = [t.double().cpu() for t in case.expected()]

    def result_of(run: Callable[[], Any]) -> float:
        case.before()
        return error(flat(run()), expected)

    max_error = result_of(case.ours)
    if max_error > case.tolerance:
        raise AssertionError(f"{case.op} {case.case}: off by {max_error:.3g}, allowed {case.tolerance:.3g}")
    candidates: dict[str, Callable[[], Any]] = {"ours": case.ours, "copy": copy}
    notes: dict[str, str] = {}
    for name, peer in case.peers.items():
        try:
            if peer.same:
                off = result_of(peer.run)
                if off > max(case.tolerance, 1e-2):
                    notes[name] = f"no ratio: off by {off:.3g}"
                    continue
            else:
                peer.run()
                notes[name] = peer.note
            candidates[name] = peer.run
        except Exception as problem:
            notes[name] = f"n/a: {type(problem).__name__}: {problem}".splitlines()[0][:200]
    medians = alternate(candidates, case.before, device, seconds)
    ours = medians.pop("ours")
    copy_gbps = copy.bytes / medians.pop("copy") / 1e9
    same = {name: t for name, t in medians.items() if case.peers[name].same}
    best = min(same, key=same.__getitem__) if same else None
    gbps = case.least_bytes / ours / 1e9
    return {
        "op": case.op,
        "case": case.case,
        "shape": case.shape,
        "dtype": case.dtype,
        "direction": case.direction,
        "device": device,
        "threads": threads,
        "median_us": ours * 1e6,
        "best_peer": best,
        "ratio": same[best] / ours if best else None,
        "ratio_eager": same["eager"] / ours if "eager" in same else None,
        "ratio_compile": same["compile"] / ours if "compile" in same else None,
        "gbps": gbps,
        "gflops": case.flops / ours / 1e9,
        "roofline": gbps / copy_gbps,
        "copy_gbps": copy_gbps,
        "peak_bytes": peak_bytes(case.ours, case.before, device),
        "max_error": max_error,
        "peers_us": {name: t * 1e6 for name, t in medians.items()},
        "notes": notes,
    }
