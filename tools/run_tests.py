"""Every test on every backend and instruction set, and how many ran where."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def plan(quick: bool) -> list[tuple[str, dict[str, str], list[str]]]:
    """Label, environment and pytest arguments of each run."""
    from pyvitfast import _C

    supported = list(_C.supported_cpu_capabilities())
    best = supported[-1]
    runs = [(f"cpu ({best})", {"PYVITFAST_BACKEND": "cpu"}, ["tests"])]
    if quick:
        runs = [(f"cpu ({best})", {"PYVITFAST_BACKEND": "cpu"}, ["tests/ops"])]
    runs.append(("emulated", {"PYVITFAST_BACKEND": "emulated"}, ["tests/ops"]))
    for capability in supported[:-1]:
        env = {"PYVITFAST_BACKEND": "cpu", "PYVITFAST_CPU_CAPABILITY": capability}
        runs.append((f"cpu ({capability})", env, ["tests/ops"]))
    import torch

    if torch.cuda.is_available():
        runs.append(("cuda", {"PYVITFAST_BACKEND": "cuda"}, ["tests/ops"]))
    return runs


def main() -> int:
    """Run the plan; 0 when every test of every run passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the ops alone")
    parser.add_argument("rest", nargs="*", help="further pytest arguments, after --")
    args = parser.parse_args()
    rows = []
    failed = False
    for label, env, paths in plan(args.quick):
        print(f"\n== {label}: pytest {' '.join(paths)}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-m",
                "not sanitize",
                f"--junitxml={report}",
                *paths,
            ]
            start = time.monotonic()
            code = subprocess.run([*command, *args.rest], cwd=ROOT, env={**os.environ, **env}).returncode
            seconds = time.monotonic() - start
            counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
            if report.is_file():
                for suite in ElementTree.parse(report).getroot().iter("testsuite"):
                    for key in counts:
                        counts[key] += int(suite.get(key, 0))
        failed |= code != 0 or counts["tests"] == 0
        bad = counts["failures"] + counts["errors"]
        rows.append((label, counts["tests"] - bad - counts["skipped"], bad, counts["skipped"], seconds))
    print(f"\n{'backend':<20}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}")
    for label, passed, bad, skipped, seconds in rows:
        print(f"{label:<20}{passed:>8}{bad:>8}{skipped:>9}{seconds:>9.0f}")
    if not any(label == "cuda" for label, *_ in rows):
        print("cuda: no GPU here, so the CUDA kernels ran on the emulator only")
    passed, bad = sum(r[1] for r in rows), sum(r[2] for r in rows)
    print(f"{passed} passed, {bad} failed")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
