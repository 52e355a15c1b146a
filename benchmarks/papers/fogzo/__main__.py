"""FOGZO beside the straight-through estimator, n-SPSA and the mix of both, at small scale.

    python -m benchmarks.papers.fogzo [--quick] [--part e1|e4|networks|cost] [--problems N] [--seeds N]
                                      [--json FILE]

e1: quantised least squares with one sharp direction; two learning-rate schedules, each arm at its best rate.
The negative controls, the same without the sharp direction and with one bit, are where it does not help.
e4: on the same problem, loss by forward passes for several numbers of directions.
networks: a perceptron, a Vision Transformer and a residual network on digits, and a small language model.
cost: time of a step beside a straight-through one; run it while nothing else runs.

--quick takes 6 problems, one seed, short lists of rates and short trainings. The exit code says whether the
claims of e1 held.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.papers.fogzo import cost, least_squares, networks
from benchmarks.papers.report import cell, conditions, print_claims, watching

PARTS = ("e1", "e4", "networks", "cost")


def e1(problems: int, seeds: int, quick: bool, watch: Any) -> dict[str, Any]:
    """Run and print the least squares."""
    arms, plain, rows = least_squares.ARMS, least_squares.CONTROLS, []
    for decay in (False, True):
        rows += least_squares.run(arms, problems, seeds, decay, quick=quick, watch=watch)
    rows += least_squares.run(plain, problems, seeds, False, spiked=False, quick=quick, watch=watch)
    rows += least_squares.run(plain, problems, seeds, False, bits=1, quick=quick, watch=watch)
    for row in rows:
        kind = "spiked" if row["spiked"] else "well-conditioned"
        print(
            f"{row['bits']} bit, {kind}, {row['schedule']:8}  {row['arm']:24} lr {row['lr']:<6g} "
            f"loss {row['loss']:6.2f} ± {row['spread']:.2f}"
        )
    claims = least_squares.claims(rows)
    print_claims(claims)
    return {"e1": rows, "claims": claims}


def main(arguments: list[str] | None = None) -> int:
    """Run and print; 0 when every claim held."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers.fogzo", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="a few minutes")
    parser.add_argument("--part", action="append", choices=PARTS, help="may be repeated; default: all")
    parser.add_argument("--problems", type=int, metavar="N", help="default: 24; with --quick 6")
    parser.add_argument("--seeds", type=int, metavar="N", help="of the noise; default: 2, with --quick 1")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    problems = (6 if options.quick else 24) if options.problems is None else options.problems
    seeds = (1 if options.quick else 2) if options.seeds is None else options.seeds
    if problems < 1 or seeds < 1:
        parser.error("--problems and --seeds must be at least 1")
    watch = watching("FOGZO")
    result: dict[str, Any] = {"conditions": conditions()}
    parts = options.part or list(PARTS)
    if "e1" in parts:
        result |= e1(problems, seeds, options.quick, watch)
    if "e4" in parts:
        result["e4"] = least_squares.sweep(problems, watch)
        for row in result["e4"]:
            print(f"{row['arm']:12} {row['forwards']:6} forward passes  loss {row['loss']:6.2f}")
        ratio = least_squares.equal_loss(result["e4"])
        reached = "FOGZO did not reach it" if ratio is None else f"{ratio:.2g}x those of FOGZO"
        print(f"forward passes of n-SPSA for its least loss: {reached}")
    if "networks" in parts:
        share = 0.1 if options.quick else 1.0
        count = 1 if options.quick else max(seeds, 3)
        result["networks"] = networks.run(list(networks.TASKS), count, share, watch=watch)
        for row in result["networks"]:
            score = "loss" if networks.TASKS[row["task"]].text else "top-1"
            losses = [100 * value for value in row["loss"]]
            print(
                f"{row['task']:22} {row['arm']:22} lr {row['lr']}  100 x loss {cell(losses)}  test {score} "
                f"{cell(row['score'])}"
            )
    if "cost" in parts:
        result["cost"] = cost.run((1, 64), 4.0 if options.quick else 20.0)
        for row in result["cost"]:
            print(
                f"batch {row['batch']:3}  {row['arm']:12} {row['ms']:7.2f} ms  {row['ratio']:.2f}x STE "
                f"(by passes {row['ideal']:.2f})"
            )
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2))
    return 0 if all(claim["held"] for claim in result.get("claims", [])) else 1


if __name__ == "__main__":
    sys.exit(main())
