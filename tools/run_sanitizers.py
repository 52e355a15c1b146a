"""The op tests under AddressSanitizer, UBSan and ThreadSanitizer, and the emulator's own sanitizer tests."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MEMORY = "address,undefined"
# Inductor's own compiler runs would inherit the preloaded sanitizer; they try no further kernel code.
LEFT_OUT = "not inductor"
FINDING = re.compile(r"(?:SUMMARY: )(\w+Sanitizer: .*)|(/\S+: runtime error: .*)")
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:exitcode=67",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
}


@dataclass
class Row:
    """One run of the table."""

    sanitizer: str
    backend: str
    tests: str
    result: str
    seconds: float
    good: bool


def build(sanitizer: str) -> Path:
    """Configure and build; the folder of a package copy whose binaries are instrumented."""
    folder = ROOT / "build" / f"sanitize-{sanitizer.replace(',', '-')}"
    pybind11 = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True
    )
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
    configure += ["-DPYVITFAST_CUDA=OFF", "-DPYVITFAST_BUILD_TESTS=ON", f"-DPYVITFAST_SANITIZE={sanitizer}"]
    configure += [f"-Dpybind11_DIR={pybind11.stdout.strip()}", f"-DPython_EXECUTABLE={sys.executable}"]
    for command in (configure, ["cmake", "--build", str(folder)]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout}")
    package = folder / "package"
    shutil.rmtree(package, ignore_errors=True)
    skip = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    shutil.copytree(ROOT / "pyvitfast", package / "pyvitfast", ignore=skip)
    shutil.copytree(ROOT / "tests", package / "tests", ignore=skip)
    for item in [ROOT / "pyproject.toml", ROOT / "docs", ROOT / "csrc"]:
        # Some tests read these; a link saves the copy.
        if item.exists():
            (package / item.name).symlink_to(item)
    for binary in [*folder.glob("*.so"), folder / "_build_info.json"]:
        shutil.copy2(binary, package / "pyvitfast")
    return package


def runtime(name: str) -> str:
    """The path of one of the compiler's libraries."""
    compiler = os.environ.get("CXX", "g++")
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def environment(package: Path, backend: str, library: str) -> dict[str, str]:
    """Preloads the sanitizer and shows Python the package copy.

    Without libstdc++ beside it the first C++ exception aborts.
    """
    packages = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    return {
        **os.environ,
        **OPTIONS,
        "LD_PRELOAD": f"{runtime(library)} {runtime('libstdc++.so.6')}",
        "PYTHONPATH": os.pathsep.join([str(package), *packages]),
        "PYVITFAST_BACKEND": backend,
    }


def python(package: Path, env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python without site: an editable install's import hook would win over the package copy."""
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=package,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def check_copy(package: Path, env: dict[str, str], sanitizer: str) -> None:
    """Stop unless the instrumented binaries are the ones that load."""
    code = "import pyvitfast.ops as o, sys; sys.exit(o.STATUS.build['sanitize'] != sys.argv[1])"
    done = python(package, env, "-c", code, sanitizer)
    if done.returncode != 0:
        raise SystemExit(f"the {sanitizer} build does not load:\n{done.stdout}")


def judge(row: Row, done: subprocess.CompletedProcess[str]) -> Row:
    """Fill in the result, and show the output of a run that is not clean."""
    finding = FINDING.search(done.stdout)
    row.good = done.returncode == 0 and finding is None
    if not row.good:
        print(done.stdout[-20000:], flush=True)
        text = (finding[1] or finding[2]).replace(f"{ROOT}/", "") if finding else ""
        row.result = text[:120] or f"exit status {done.returncode}"
    return row


def pytest_row(
    sanitizer: str, backend: str, done: subprocess.CompletedProcess[str], report: Path, start: float
) -> Row:
    """A row from pytest's report; a run that a sanitizer ended has none."""
    row = Row(sanitizer, backend, "stopped", "clean", time.monotonic() - start, False)
    if report.is_file():
        suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
        tests = sum(int(s.get("tests", 0)) - int(s.get("skipped", 0)) for s in suites)
        bad = sum(int(s.get("failures", 0)) + int(s.get("errors", 0)) for s in suites)
        row.tests = f"{tests - bad} of {tests}"
        if tests == 0:
            row.result = "no test ran"
    row = judge(row, done)
    row.good &= row.result == "clean"
    return row


def memory_rows(backends: list[str], rest: list[str]) -> list[Row]:
    """tests/ops under AddressSanitizer and UBSan."""
    package = build(MEMORY)
    rows = []
    for backend in backends:
        env = environment(package, backend, "libasan.so")
        check_copy(package, env, MEMORY)
        report = package / f"{backend}.xml"
        print(f"== {MEMORY}, {backend}: pytest tests/ops -k '{LEFT_OUT}'", flush=True)
        start = time.monotonic()
        pytest = ["-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-k", LEFT_OUT]
        done = python(package, env, *pytest, f"--junitxml={report}", "tests/ops", *rest)
        rows.append(pytest_row(MEMORY, backend, done, report, start))
    return rows


def thread_row() -> Row:
    """Each op on tiny inputs under ThreadSanitizer, where a block costs about a tenth of a second."""
    package = build("thread")
    env = environment(package, "emulated", "libtsan.so")
    check_copy(package, env, "thread")
    print("== thread, emulated: tests/ops/tiny.py", flush=True)
    start = time.monotonic()
    done = python(package, env, "-m", "tests.ops.tiny")
    calls = re.search(r"^\d+ calls$", done.stdout, re.MULTILINE)
    tests = calls[0] if calls else "stopped"
    return judge(Row("thread", "emulated", tests, "clean", time.monotonic() - start, False), done)


def emulator_row() -> Row:
    """The emulator's own tests: silent on right kernels, and each planted mistake is found."""
    report = ROOT / "build" / "sanitize-cpp.xml"
    report.unlink(missing_ok=True)
    print("== address, undefined, thread: pytest -m sanitize tests/cpp", flush=True)
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-m", "sanitize", f"--junitxml={report}", "tests/cpp"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return pytest_row("all three", "tests/cpp", done, report, start)


def main() -> int:
    """Run all of it; 0 when nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("memory", "thread", "cpp"), help="one part")
    parser.add_argument("--backend", choices=("cpu", "emulated"), help="one backend of the memory part")
    parser.add_argument("rest", nargs="*", help="pytest arguments for the memory part, after --")
    args = parser.parse_args()
    rows: list[Row] = []
    if args.only in (None, "memory"):
        rows += memory_rows([args.backend] if args.backend else ["cpu", "emulated"], args.rest)
    if args.only in (None, "thread"):
        rows.append(thread_row())
    if args.only in (None, "cpp"):
        rows.append(emulator_row())
    print(f"\n{'sanitizer':<19}{'backend':<11}{'tests':>14}{'seconds':>9}  result")
    for row in rows:
        print(f"{row.sanitizer:<19}{row.backend:<11}{row.tests:>14}{row.seconds:>9.0f}  {row.result}")
    return int(not all(row.good for row in rows))


if __name__ == "__main__":
    sys.exit(main())
