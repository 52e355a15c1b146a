from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
JUNK = [".git", ".venv", "build", "dist", "out", "__pycache__", "*.so", "*_build_info.json", ".*_cache"]
SITE_PACKAGES = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]


def clean_environment(**settings: str) -> dict[str, str]:
    """This process's environment without what would change the outcome, and with ``settings``."""
    left_out = ("PYVITFAST_", "PYTHONPATH", "LD_PRELOAD")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
    return {**kept, **settings}


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None, check: bool = True) -> str:
    """The output of a command, which must succeed or, with ``check=False``, may fail."""
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env=clean_environment() if env is None else env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0 or not check, f"{command}\n{done.stdout}"
    return done.stdout if check else f"{done.stdout}\nexit status {done.returncode}"


def configure_command(build: Path, *options: str) -> list[str]:
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not on PATH")
    pybind11 = pytest.importorskip("pybind11")
    return [
        cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}", *options,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    """A copy of the source tree with nothing built in it, and with litter that must not be shipped."""
    copy = tmp_path_factory.mktemp("source") / "pyvitfast"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*JUNK))
    for litter in (".git/HEAD", ".venv/pyvenv.cfg", "build/junk.o", "out/report.html", "pyvitfast/_ops.so"):
        (copy / litter).parent.mkdir(parents=True, exist_ok=True)
        (copy / litter).write_text("litter")
    return copy
