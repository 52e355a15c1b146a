"""Fair timing of candidates that compute the same thing: compare first, then alternate and take medians."""

from __future__ import annotations

import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
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

    ``direction`` is "forward", "backward" (of a graph that is kept) or "both". ``least_bytes`` is what must
    be read and written at the least, ``flops`` the float32 operations of the cheapest known form; 0 leaves
    arithmetic out of the limit. ``expected`` is the float64 result; ``tolerance`` the greatest allowed
    difference from it, relative to its greatest entry. ``before`` runs before each call and is not timed.
    ``forwards`` are the forward passes of "ours" and of peers, whose bytes kept for backward are counted;
    ``given`` are the inputs and weights, which are there anyway.
    """

    op: str
    case: str
    shape: str
    dtype: str
    direction: str
    ours: Callable[[], Any]
    peers: dict[str, Peer]
    expected: Callable[[], Any]
    least_bytes: int
    flops: int = 0
    tolerance: float = 1e-4
    before: Callable[[], None] = field(default=lambda: None)
    forwards: dict[str, Callable[[], Any]] = field(default_factory=dict)
    given: list[Tensor] = field(default_factory=list)


def directed(
    function: Callable[[], Any], inputs: list[Tensor], gradients: list[Tensor], direction: str
) -> Callable[[], Any]:
    """A call of ``function`` to be timed: its results, or the gradients of ``inputs``, or both at once.

    ``gradients`` are those of the results. An input that the results do not depend on gets None. "backward"
    differentiates the graph of one forward pass again and again.
    """

    def forward() -> Any:
        with torch.inference_mode():
            return function()

    def differentiate(results: Any, keep: bool) -> Any:
        leaves = [results] if isinstance(results, Tensor) else list(results)
        return torch.autograd.grad(leaves, inputs, gradients, retain_graph=keep, allow_unused=True)

    graph: list[Any] = []

    def backward() -> Any:
        if not graph:
            # Inductor would else reuse what the first backward pass has read.
            with torch._functorch.config.patch(donated_buffer=False):
                graph.append(function())
        return differentiate(graph[0], keep=True)

    runs = {"forward": forward, "backward": backward, "both": lambda: differentiate(function(), keep=False)}
    if direction not in runs:
        raise ValueError(f"directed: `direction` must be one of {', '.join(runs)}, got {direction!r}")
    return runs[direction]


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


def rounds(
    candidates: dict[str, Callable[[], Any]], before: Callable[[], None], device: str, seconds: float
) -> dict[str, list[float]]:
    """Seconds of each candidate by round; they take turns, so that a drifting machine treats all alike.

    The order changes by round, so that no candidate always finds what the same other one left in the caches.
    """
    first = {name: timed(run, before, device) for name, run in candidates.items()}
    repeats = max(5, min(200, int(seconds / max(sum(first.values()), 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order, shuffled = list(candidates.items()), random.Random(0)
    for _ in range(repeats):
        shuffled.shuffle(order)
        for name, run in order:
            times[name].append(timed(run, before, device))
    return times


def alternate(
    candidates: dict[str, Callable[[], Any]], before: Callable[[], None], device: str, seconds: float
) -> dict[str, float]:
    """Median seconds of each candidate over the rounds."""
    times = rounds(candidates, before, device, seconds)
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


def saved_bytes(forward: Callable[[], Any], given: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass: each storage once, without those of ``given``."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    there = {tensor.untyped_storage().data_ptr() for tensor in given}
    return sum(storage.nbytes() for address, storage in kept.items() if address not in there)


class Copy:
    """A copy far larger than the caches."""

    def __init__(self, device: str) -> None:
        size = 2**28 if device == "cuda" else 2**25
        self.target = torch.empty(size, device=device)
        self.source = torch.ones(size, device=device)
        self.bytes = 8 * size

    def __call__(self) -> None:
        self.target.copy_(self.source)


class MultiplyAdd:
    """Multiply-adds in registers on all threads, for about 20 ms."""

    def __init__(self, threads: int) -> None:
        from pyvitfast import _C

        self.loop = _C.fma_loop
        self.pool = ThreadPoolExecutor(threads)
        self.threads = threads
        self.iterations = 10_000
        seconds = min(timed(self, lambda: None, "cpu") for _ in range(3))
        self.iterations = max(1, int(self.iterations * 0.02 / seconds))
        self.flops = self()

    def __call__(self) -> float:
        return sum(self.pool.map(self.loop, [self.iterations] * self.threads))


class Limits:
    """What the machine can do at most, timed after the candidates of each case.

    No multiply-adds on CUDA: there is no such loop, and a matrix product would be another limit.
    """

    def __init__(self, device: str, threads: int) -> None:
        self.copy = Copy(device)
        self.multiply_add = MultiplyAdd(threads) if device == "cpu" else None
        self.runs: dict[str, Callable[[], Any]] = {"copy": self.copy}
        if self.multiply_add is not None:
            self.runs["fma"] = self.multiply_add

    def of(self, case: Case, medians: dict[str, float]) -> dict[str, Any]:
        """The limits measured, and the share of the one that binds: the least time over the time taken."""
        copy_gbps = self.copy.bytes / medians["copy"] / 1e9
        least = {"copy": case.least_bytes / copy_gbps / 1e9}
        peak = None
        if self.multiply_add is not None:
            peak = self.multiply_add.flops / medians["fma"] / 1e9
            least["fma"] = case.flops / peak / 1e9
        binding = max(least, key=least.__getitem__)
        return {
            "roofline": least[binding] / medians["ours"],
            "limit": binding,
            "copy_gbps": copy_gbps,
            "peak_gflops": peak,
        }


def measure(case: Case, device: str, threads: int, limits: Limits, seconds: float) -> dict[str, Any]:
    """The row of one case; a candidate whose result is wrong gets no ratio but the error."""
    expected = flat(case.expected())

    def result_of(run: Callable[[], Any]) -> float:
        case.before()
        return error(flat(run()), expected)

    max_error = result_of(case.ours)
    if max_error > case.tolerance:
        raise AssertionError(f"{case.op} {case.case}: off by {max_error:.3g}, allowed {case.tolerance:.3g}")
    candidates: dict[str, Callable[[], Any]] = {"ours": case.ours}
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
    # Not in the same turns: whoever follows a copy of 256 MB finds the caches empty.
    medians |= alternate(limits.runs, lambda: None, device, seconds / 10)
    ours = medians["ours"]
    peers = {name: t for name, t in medians.items() if name in case.peers}
    same = {name: t for name, t in peers.items() if case.peers[name].same}
    best = min(same, key=same.__getitem__) if same else None
    saved = {name: saved_bytes(forward, case.given) for name, forward in case.forwards.items()}
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
        "gbps": case.least_bytes / ours / 1e9,
        "gflops": case.flops / ours / 1e9,
        **limits.of(case, medians),
        "peak_bytes": peak_bytes(case.ours, case.before, device),
        "saved_bytes": saved.get("ours"),
        "saved_ratio": saved["eager"] / max(saved["ours"], 1) if {"ours", "eager"} <= saved.keys() else None,
        "max_error": max_error,
        "peers_us": {name: t * 1e6 for name, t in peers.items()},
        "notes": notes,
    }
