"""Wheel, source distribution and editable install, each used from another folder in a fresh environment."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from pyvitfast import __version__, ops
from tests.packaging.conftest import ROOT, SITE_PACKAGES, clean_environment, configure_command, run

pytest.importorskip("scikit_build_core")
pytestmark = pytest.mark.slow

NO_CUDA = ("-C", "cmake.define.PYVITFAST_CUDA=OFF")
HAS_NVCC = shutil.which("nvcc") is not None or "CUDACXX" in os.environ

USE = """
import pathlib, sys, torch, pyvitfast
from pyvitfast import _lib, ops, reference
print(pyvitfast.__file__)
print(_lib.find_binary('_ops'))
w, g = torch.randn(37, 53), torch.randn(37, 53)
assert torch.allclose(ops.saliency_rowcol([w], [g]), reference.saliency_rowcol([w], [g]), atol=1e-4)
(kept,) = ops.structured_gather([w], [torch.tensor([5, 1])], [None])
assert torch.equal(kept, w[[5, 1]])
assert '_ops' in ops.STATUS.loaded
"""


class Environment:
    """A virtual environment without pip, whose dependencies are those of the running interpreter."""

    def __init__(self, folder: Path) -> None:
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.packages = next((folder / "lib").glob("python*")) / "site-packages"
        # A plain path, so that the .pth files lying there, editable installs, are not followed.
        (self.packages / "dependencies.pth").write_text("\n".join(SITE_PACKAGES))

    def install(self, *what: str | Path) -> None:
        # Never uninstalls: a pyvitfast among the dependencies must stay as it is.
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "--no-index", "--no-deps"]
        run(*pip, "--ignore-installed", "--no-build-isolation", *what, cwd=self.folder)

    def run(self, *arguments: str) -> str:
        return run(self.python, *arguments, cwd=self.folder)


def build_wheel(source: Path, out: Path, *options: str) -> Path:
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    run(*pip, "-w", out, *options, source, cwd=out.parent)
    wheels = list(out.iterdir())
    assert len(wheels) == 1, wheels
    return wheels[0]


@pytest.fixture(scope="session")
def wheel(tree, tmp_path_factory) -> Path:
    """Built as a user builds it, CUDA kernels where they can be, for one architecture to save time."""
    out = tmp_path_factory.mktemp("wheel")
    return build_wheel(tree, out, "-C", "cmake.define.PYVITFAST_CUDA_ARCHS=80-real")


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("fresh") / "venv")
    environment.install(wheel)
    return environment


@pytest.fixture(scope="session")
def sdist(tree, tmp_path_factory) -> Path:
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, tree, cwd=out)
    (archive,) = out.iterdir()
    return archive


@pytest.fixture(scope="session")
def unpacked(sdist, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return source


def builds_cuda() -> bool:
    built_here = "_ops_cuda" in ops.STATUS.build.get("libraries", [])
    return HAS_NVCC and torch.version.cuda is not None and built_here


def test_wheel_contents(wheel):
    assert wheel.name.startswith(f"pyvitfast-{__version__}-")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(f"pyvitfast-{__version__}.dist-info/METADATA").decode()
        entry_points = archive.read(f"pyvitfast-{__version__}.dist-info/entry_points.txt").decode()
    assert f"\nVersion: {__version__}\n" in metadata
    assert "pyvitfast=pyvitfast.cli:main" in entry_points.replace(" ", "")
    binaries = {name.split("/")[-1].split(".")[0] for name in names if name.endswith(".so")}
    assert binaries == {"_ops", "_C"} | ({"_ops_cuda"} if builds_cuda() else set())
    assert {"pyvitfast/_ops.so", "pyvitfast/_build_info.json", "pyvitfast/py.typed"} <= set(names)
    assert "pyvitfast/train/recipes/crossvit.yaml" in names
    assert f"pyvitfast-{__version__}.dist-info/licenses/LICENSE" in names
    sources = {f"pyvitfast/{p.relative_to(ROOT / 'pyvitfast')}" for p in (ROOT / "pyvitfast").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    assert {name.split("/")[0] for name in names} == {"pyvitfast", f"pyvitfast-{__version__}.dist-info"}


def test_wheel_works_elsewhere(installed):
    where, binary = installed.run("-c", USE).splitlines()
    assert Path(where).is_relative_to(installed.packages)
    assert Path(binary).is_relative_to(installed.packages)
    assert (installed.packages / "pyvitfast/_ops_cuda.so").is_file() == builds_cuda()


def test_info_of_the_wheel(installed):
    printed = installed.run("-m", "pyvitfast.info")
    assert f"pyvitfast: {__version__}" in printed
    assert "  saliency_rowcol: {'CPU': True, " in printed
    assert f"torch: {torch.__version__}" in printed
    if builds_cuda():
        assert "loaded: ['_ops', '_ops_cuda']" in printed
        assert "  cuda_archs: 80-real" in printed
        assert "'CUDA': True" in printed
    else:
        assert "loaded: ['_ops']" in printed
        assert "  cuda: " in printed.split("reasons:")[1].split("build:")[0]


def test_sdist_contents(sdist):
    with tarfile.open(sdist) as archive:
        names = [name.split("/", 1)[1] for name in archive.getnames() if "/" in name]
    assert sdist.name == f"pyvitfast-{__version__}.tar.gz"
    assert {"CMakeLists.txt", "LICENSE", "pyproject.toml", "README.md", "PKG-INFO"} <= set(names)
    assert "pyvitfast/_lib.py" in names
    for folder in ("csrc", "tests", "docs"):
        shipped = {str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob("*") if p.is_file()}
        shipped = {p for p in shipped if not p.endswith((".pyc", ".so")) and "__pycache__" not in p}
        assert shipped <= set(names)
    for name in names:
        parts = name.split("/")
        assert not {".git", ".venv", "build", "dist", "out", "__pycache__"} & set(parts), name
        assert not name.endswith((".so", ".o", ".pyc", "_build_info.json")), name


def test_sdist_builds_and_editable_install_follows_the_source(unpacked, tmp_path_factory):
    # One folder for both, so that the second build finds the objects of the first.
    wheel = build_wheel(unpacked, tmp_path_factory.mktemp("from_sdist"), *NO_CUDA)
    fresh = Environment(tmp_path_factory.mktemp("sdist_env") / "venv")
    fresh.install(wheel)
    where, _ = fresh.run("-c", USE).splitlines()
    assert Path(where).is_relative_to(fresh.packages)
    assert "  cuda_reason: PYVITFAST_CUDA=OFF" in fresh.run("-m", "pyvitfast.info")

    editable = Environment(tmp_path_factory.mktemp("editable") / "venv")
    editable.install(*NO_CUDA, "-e", unpacked)
    where, binary = editable.run("-c", USE).splitlines()
    assert Path(where) == unpacked / "pyvitfast" / "__init__.py"
    assert Path(binary).is_relative_to(editable.packages)
    with (unpacked / "pyvitfast" / "info.py").open("a") as file:
        file.write("\nCHANGED = 'seen'\n")
    assert editable.run("-c", "from pyvitfast import info; print(info.CHANGED)") == "seen\n"


def environment_without_nvcc() -> dict[str, str]:
    env = clean_environment()
    folders = [f for f in env["PATH"].split(os.pathsep) if not Path(f, "nvcc").exists()]
    if shutil.which("g++", path=os.pathsep.join(folders)) is None and "CXX" not in env:
        pytest.skip("nvcc and g++ lie in one folder")
    env["PATH"] = os.pathsep.join([*folders, str(Path(shutil.which("ninja") or "").parent)])
    if shutil.which("nvcc", path=env["PATH"]):
        pytest.skip("nvcc and ninja lie in one folder")
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "CUDAToolkit_ROOT"):
        env.pop(name, None)
    return env


def torch_of(folder: Path, version: str, cuda: str | None) -> str:
    """A folder with a torch that says of itself what CMake asks for."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text(
        f"__version__ = {version!r}\nclass version:\n    cuda = {cuda!r}\n"
    )
    return str(folder)


def configure(build: Path, env: dict[str, str], *options: str) -> str:
    """What CMake printed, as one line of single spaces."""
    build.mkdir(exist_ok=True)
    return " ".join(run(*configure_command(build, *options), cwd=build, env=env, check=False).split())


class TestConfigure:
    def test_summary_without_cuda(self, tmp_path):
        printed = configure(tmp_path, clean_environment(), "-DPYVITFAST_CUDA=OFF")
        assert "CUDA kernels no: PYVITFAST_CUDA=OFF" in printed
        assert f"pyvitfast {__version__} builds: _ops, _C" in printed
        assert f"torch {torch.__version__} (stable ABI of torch 2.10: runs on that and newer)" in printed
        assert "emulated OFF" in printed

    def test_without_nvcc(self, tmp_path):
        env = environment_without_nvcc()
        env["PYTHONPATH"] = torch_of(tmp_path / "fake", "2.14.1+cu130", "13.0")
        reason = "nvcc was not found; put it on PATH or set CUDACXX"
        printed = configure(tmp_path / "auto", env)
        assert f"CUDA kernels no: {reason}" in printed
        assert printed.endswith("exit status 0")
        printed = configure(tmp_path / "on", env, "-DPYVITFAST_CUDA=ON")
        assert f"pyvitfast: PYVITFAST_CUDA=ON, but {reason}." in printed
        assert not printed.endswith("exit status 0")

    def test_with_a_cpu_torch(self, tmp_path):
        env = clean_environment(PYTHONPATH=torch_of(tmp_path / "fake", "2.13.0+cpu", None))
        reason = "torch 2.13.0+cpu is a CPU-only build"
        assert f"CUDA kernels no: {reason}" in configure(tmp_path / "auto", env)
        assert f"PYVITFAST_CUDA=ON, but {reason}." in configure(tmp_path / "on", env, "-DPYVITFAST_CUDA=ON")

    @pytest.mark.skipif(not HAS_NVCC, reason="no nvcc")
    def test_with_nvcc(self, tmp_path):
        if torch.version.cuda is None:
            pytest.skip(f"torch {torch.__version__} is a CPU-only build")
        options = ["-DPYVITFAST_CUDA=ON", "-DPYVITFAST_CUDA_ARCHS=80-real;90"]
        printed = configure(tmp_path, clean_environment(), *options)
        assert "builds: _ops, _ops_cuda, _C" in printed
        assert f"torch CUDA {torch.version.cuda}; architectures 80-real, 90" in printed

    @pytest.mark.skipif(not HAS_NVCC, reason="no nvcc")
    def test_cuda_versions_that_clash(self, tmp_path):
        env = clean_environment(PYTHONPATH=torch_of(tmp_path / "fake", "2.11.0+cu99", "9.9"))
        printed = configure(tmp_path / "auto", env)
        assert "but torch 2.11.0+cu99 was built with CUDA 9.9" in printed
        assert "builds: _ops, _C" in printed
        assert "PYVITFAST_CUDA=ON, but nvcc is" in configure(tmp_path / "on", env, "-DPYVITFAST_CUDA=ON")

    def test_torch_that_is_too_old_or_missing(self, tmp_path):
        env = clean_environment(PYTHONPATH=torch_of(tmp_path / "old", "2.9.1", None))
        printed = configure(tmp_path / "a", env)
        assert "torch 2.10 or newer is needed, found 2.9.1." in printed
        (tmp_path / "none" / "torch").mkdir(parents=True)
        (tmp_path / "none" / "torch" / "__init__.py").write_text("raise ImportError('no torch')")
        printed = configure(tmp_path / "b", clean_environment(PYTHONPATH=str(tmp_path / "none")))
        assert "torch cannot be imported by" in printed
        assert "pip install --no-build-isolation" in printed


def test_emulated_library_only_when_asked_for(tmp_path):
    printed = configure(tmp_path, clean_environment(), "-DPYVITFAST_CUDA=OFF", "-DPYVITFAST_BUILD_TESTS=ON")
    assert "builds: _ops, _ops_emulated, _C" in printed


def test_max_jobs_bounds_the_compiler_runs(tmp_path):
    configure(tmp_path, clean_environment(MAX_JOBS="3"), "-DPYVITFAST_CUDA=OFF")
    rules = (tmp_path / "CMakeFiles" / "rules.ninja").read_text() + (tmp_path / "build.ninja").read_text()
    assert re.search(r"^pool compile\n\s+depth = 3$", rules, re.MULTILINE)
    assert "pool = compile" in rules


def test_thread_sanitizer_needs_the_emulator(tmp_path):
    printed = configure(tmp_path, clean_environment(), "-DPYVITFAST_CUDA=OFF", "-DPYVITFAST_SANITIZE=thread")
    assert "PYVITFAST_SANITIZE=thread goes with PYVITFAST_BUILD_TESTS=ON" in printed
