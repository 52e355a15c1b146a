import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "cpp"
EMULATOR_SOURCES = sorted((ROOT / "csrc" / "emulator").glob("*.cpp"))
WARNINGS = ["-Wall", "-Wextra", "-Werror"]

# The emulator itself reads the data of all threads by design, so under ThreadSanitizer only the
# kernels are instrumented.
VARIANTS = {
    "plain": (["-O2"], [], []),
    "ucontext": (["-O2", "-DPYVITFAST_EMULATOR_UCONTEXT"], [], []),
    "address": (
        ["-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"]
        + ["-fno-sanitize-recover=undefined"],
        [],
        ["-fsanitize=address,undefined"],
    ),
    "thread": (
        ["-O1", "-fno-omit-frame-pointer"],
        ["-fsanitize=thread"],
        ["-fsanitize=thread"],
    ),
}


def pytest_configure(config):
    config.addinivalue_line("markers", "sanitize: builds and runs with a sanitizer")


@pytest.fixture(scope="session")
def cxx():
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on PATH and CXX is not set")
    return compiler


@pytest.fixture(scope="session")
def compile_cxx(cxx):
    """Returns a function that runs the compiler and fails the test with its messages."""

    def run(*arguments):
        command = [cxx, "-std=c++20", "-g", *WARNINGS, f"-I{ROOT / 'csrc'}", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
        return done

    return run


@pytest.fixture(scope="session")
def emulator_program(compile_cxx, tmp_path_factory):
    """Returns a function that builds a variant of the test program, once a session."""
    built = {}

    def build(variant):
        if variant not in built:
            folder = tmp_path_factory.mktemp(variant)
            common, kernel_flags, link_flags = VARIANTS[variant]
            define = ["-DPYVITFAST_EMULATOR_TSAN"] if variant == "thread" else []
            objects = []
            for source in EMULATOR_SOURCES:
                objects.append(folder / (source.name + ".o"))
                compile_cxx(*common, *define, "-c", source, "-o", objects[-1])
            for source in [HERE / "emulator_kernels.cu", HERE / "emulator_cases.cpp"]:
                objects.append(folder / (source.name + ".o"))
                flags = ["-DPYVITFAST_EMULATED", *common, *kernel_flags, f"-I{HERE}"]
                compile_cxx(*flags, "-x", "c++", "-c", source, "-o", objects[-1])
            program = folder / "emulator_cases"
            compile_cxx(*link_flags, *objects, "-ldl", "-o", program)
            built[variant] = program
        return built[variant]

    return build


@pytest.fixture(scope="session")
def emulator_library(compile_cxx, tmp_path_factory):
    """The test kernels as a shared library with hidden symbols, like an extension module."""
    folder = tmp_path_factory.mktemp("library")
    library = folder / "libkernels.so"
    flags = ["-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-DPYVITFAST_EMULATED", f"-I{HERE}"]
    sources = [HERE / "emulator_library.cpp", HERE / "emulator_kernels.cu"]
    compile_cxx(*flags, "-x", "c++", *sources, *EMULATOR_SOURCES, "-x", "none", "-ldl", "-o", library)
    return library
