"""Times every op beside its peers: ``python -m benchmarks.run --json FILE``."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.measure import Limits, measure
from pyvitfast import __version__, info, ops


def processor() -> str:
    """The processor's name."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def revision() -> str:
    """The commit the figures belong to."""
    found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def header(device: str, threads: int, module: str = "benchmarks.run") -> dict[str, Any]:
    """What a reader needs to repeat the run."""
    facts = info.collect()
    return {
        "command": " ".join([f"python -m {module}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "pyvitfast": __version__,
        "revision": revision(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "cpu_capability": facts["cpu_capability"],
        "threads": threads,
    }


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    """The table for people; losses are printed like gains."""
    table = Table()
    for column in (
        "op",
        "case",
        "dtype",
        "dir",
        "ms",
        "GB/s",
        "of limit",
        "best peer",
        "x peer",
        "x eager",
        "x compile",
        "extra MB",
    ):
        table.add_column(
            column, justify="left" if column in ("op", "case", "dtype", "dir", "best peer") else "right"
        )
    number = lambda v, spec=".2f": "-" if v is None else format(v, spec)  # noqa: E731
    short = {"forward": "fwd", "backward": "bwd", "both": "both"}
    for row in rows:
        table.add_row(
            row["op"], row["case"], row["dtype"], short[row["direction"]],
            number(row["median_us"] / 1e3, ".3f"), number(row["gbps"], ".1f"),
            f"{row['roofline']:.0%} {row['limit']}", row["best_peer"] or "-", number(row["ratio"]),
            number(row["ratio_eager"]), number(row["ratio_compile"]), number(row["peak_bytes"] / 1e6, ".1f"),
        )  # fmt: skip
    console.print(table)
    for row in rows:
        if row["saved_ratio"] is not None:
            kept, ratio = row["saved_bytes"] / 1e6, row["saved_ratio"]
            text = f"keeps {kept:.2f} MB for backward, eager {ratio:.1f} times that"
            console.print(f"{row['op']} {row['case']}: {text}", style="dim")
        for name, note in row["notes"].items():
            console.print(f"{row['op']} {row['case']}: {name}: {note}", style="dim")


def main() -> int:
    """Run the benchmark; 0 when every result was right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", choices=ops.__all__, action="append", help="only this op; may be repeated")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name has this in it")
    parser.add_argument("--direction", choices=("forward", "backward", "both"), help="only this direction")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="smaller shapes and fewer repeats")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    if args.threads < 1:
        parser.error(f"--threads must be 1 or more, got {args.threads}")
    if args.device == "cuda" and not ops.available("saliency_rowcol", "cuda"):
        parser.error(f"--device cuda: {ops.STATUS.reasons.get('cuda', 'no CUDA device')}")
    torch.set_num_threads(args.threads)
    console = Console(width=None if sys.stdout.isatty() else 180)
    seconds = 1.0 if args.quick else 6.0
    rows, failed = [], []
    limits = Limits(args.device, args.threads)
    with Progress(console=console, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("benchmarks", total=None)
        for name in args.op or ops.__all__:
            cases = importlib.import_module(f"benchmarks.ops.{name}").cases(args.device, args.quick)
            for case in cases:
                if args.direction not in (None, case.direction) or args.case not in case.case:
                    continue
                progress.update(task, description=f"{name} {case.case}, {case.direction}")
                try:
                    rows.append(measure(case, args.device, args.threads, limits, seconds))
                except AssertionError as wrong:
                    failed.append(str(wrong))
                # Past 8 variants of one function dynamo falls back to eager without a word.
                torch._dynamo.reset()
    facts = header(args.device, args.threads)
    console.print(
        " | ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items())
    )
    show(console, rows)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"header": facts, "rows": rows, "failed": failed}, indent=1))
    for wrong in failed:
        console.print(f"WRONG, not timed: {wrong}", style="red")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
