"""CrossViT's cross-attention on the op: the fusion stage and whole models beside timm's, and small trainings.

    python -m benchmarks.papers.crossvit [--quick] [--part stage|models|accuracy|all] [--threads N]
                                         [--model NAME] [--batch N] [--data digits|fashion-mnist|all]
                                         [--seeds N] [--epochs N] [--lr X] [--json FILE]

stage: the exchange between the branches of one encoder, forward alone and with all gradients.
models: whole models, eager, compiled and compiled with frozen weights, and the parts their time goes to.
accuracy: CrossViT-micro with each fusion scheme of the ablation, and a DeiT-micro of equal MACs.

--quick takes the smallest model, small batches, one seed and few epochs: it shows that all parts run. The
exit code says whether all results were right; claims are printed as they came out and fail nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.measure import Limits
from benchmarks.papers.crossvit import accuracy, models, stage
from benchmarks.papers.data import LOADERS
from benchmarks.papers.report import print_claims
from benchmarks.run import header

PARTS = ("stage", "models", "accuracy")
MODELS = {
    "stage": ("crossvit_15_240", "crossvit_18_240"),
    "models": ("crossvit_9_240", "crossvit_15_240", "crossvit_18_240"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the parts asked for; 0 when every result was right."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers.crossvit", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="a few minutes: does all of it run?")
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    parser.add_argument("--model", action="append", metavar="NAME", help="of timm; may be repeated")
    parser.add_argument("--batch", type=int, action="append", metavar="N", help="may be repeated")
    parser.add_argument("--data", choices=(*LOADERS, "all"), default="digits")
    parser.add_argument("--seeds", type=int, metavar="N", help="default: 3; with --quick 1")
    parser.add_argument("--epochs", type=int, metavar="N", help="of the accuracy part")
    parser.add_argument("--lr", type=float, metavar="X", help="of the accuracy part")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="for downloads")
    options = parser.parse_args(arguments)
    options.seeds = (1 if options.quick else 3) if options.seeds is None else options.seeds
    for name, values in (
        ("threads", [options.threads]),
        ("seeds", [options.seeds]),
        ("batch", options.batch or ()),
        ("epochs", [1 if options.epochs is None else options.epochs]),
    ):
        if any(value < 1 for value in values):
            parser.error(f"--{name} must be at least 1, got {min(values)}")
    torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else 180)
    found: dict[str, Any] = {
        "paper": "crossvit",
        "quick": options.quick,
        "header": header("cpu", options.threads, "benchmarks.papers.crossvit"),
        "claims": [],
        "failed": [],
    }

    def save() -> None:
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(found, indent=1))

    def chosen(part: str) -> tuple[str, ...]:
        return tuple(options.model or (MODELS[part][:1] if options.quick else MODELS[part]))

    batches = options.batch or ((1, 4) if options.quick else (1, 32, 128))
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        if options.part in ("stage", "all"):
            limits = Limits("cpu", options.threads)
            rows = stage.run(chosen("stage"), batches, options, limits, progress, found["failed"])
            found["stage"] = rows
            found["claims"] += stage.claims(rows)
            save()
        if options.part in ("models", "all"):
            few = options.batch or ((1,) if options.quick else batches)  # each is compiled four times
            rows = models.run(chosen("models"), few, options.quick, progress, found["failed"])
            found["models"] = rows
            found["claims"] += models.claims(rows)
            save()
        if options.part in ("accuracy", "all"):
            found["accuracy"] = {}
            for name in LOADERS if options.data == "all" else (options.data,):
                found["accuracy"][name] = accuracy.run(name, options, progress)
                found["claims"] += accuracy.claims(name, found["accuracy"][name])
                save()
    console.print(" | ".join(f"{key} {value}" for key, value in found["header"].items()))
    if "stage" in found:
        stage.show(console, found["stage"])
    if "models" in found:
        models.show(console, found["models"])
    for name, entry in found.get("accuracy", {}).items():
        accuracy.show(console, name, entry)
    print_claims(found["claims"])
    for wrong in found["failed"]:
        console.print(f"WRONG, not timed: {wrong}", style="red")
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
