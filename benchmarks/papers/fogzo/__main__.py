"""FOGZO beside the straight-through estimator, n-SPSA and the mix of both, at small scale.

    python -m benchmarks.papers.fogzo [--quick] [--problems N] [--seeds N] [--json FILE]

E1: quantised least squares with one sharp direction; two learning-rate schedules, each arm at its best rate.
The negative controls, the same without the sharp direction and with one bit, are where it does not help.

--quick takes 6 problems, one seed and short lists of rates. The exit code says whether the claims held.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks.papers.fogzo import least_squares
from benchmarks.papers.report import conditions, print_claims


def main(arguments: list[str] | None = None) -> int:
    """Run and print; 0 when every claim held."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers.fogzo", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="a few minutes")
    parser.add_argument("--problems", type=int, metavar="N", help="default: 24; with --quick 6")
    parser.add_argument("--seeds", type=int, metavar="N", help="of the noise; default: 2, with --quick 1")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    problems = (6 if options.quick else 24) if options.problems is None else options.problems
    seeds = (1 if options.quick else 2) if options.seeds is None else options.seeds
    if problems < 1 or seeds < 1:
        parser.error("--problems and --seeds must be at least 1")
    console = Console(stderr=True)

    def watch(values: Iterable[float], count: int) -> Iterable[float]:
        return track(values, "E1", total=count, console=console, transient=True)

    arms, rows = least_squares.ARMS, []
    plain = [arm for arm in arms if arm.name in ("STE", "FOGZO")]
    for decay in (False, True):
        rows += least_squares.run(arms, problems, seeds, decay, quick=options.quick, watch=watch)
    rows += least_squares.run(plain, problems, seeds, False, spiked=False, quick=options.quick, watch=watch)
    rows += least_squares.run(plain, problems, seeds, False, bits=1, quick=options.quick, watch=watch)
    for row in rows:
        kind = "spiked" if row["spiked"] else "well-conditioned"
        print(
            f"{row['bits']} bit, {kind}, {row['schedule']:8}  {row['arm']:24} lr {row['lr']:<6g} "
            f"loss {row['loss']:6.2f} ± {row['spread']:.2f}"
        )
    claims = least_squares.claims(rows)
    print_claims(claims)
    result: dict[str, Any] = {"conditions": conditions(), "e1": rows, "claims": claims}
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2))
    return 0 if all(claim["held"] for claim in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
