"""What the loader says when the binaries are missing, broken, or of another version."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from pyvitfast import __version__, _lib, info, ops
from tests.packaging.conftest import ROOT, SITE_PACKAGES, clean_environment, configure_command, run

BUILD = {
    "version": __version__,
    "torch_target": "2.10",
    "torch_version": "2.14.1+cu130",
    "torch_cuda": "13.0",
}


def package(folder: Path, binaries: bool = True, **changed: str) -> Path:
    """A copy of the package in ``folder``, its build information changed."""
    copy = folder / "pyvitfast"
    shutil.copytree(
        ROOT / "pyvitfast", copy, ignore=shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    )
    if binaries:
        for name in ("_ops", "_ops_cuda", "_C"):
            found = _lib.find_binary(name)
            if found is not None:
                shutil.copy2(found, copy)
        facts = _lib.read_build_info(_lib.find_binary("_ops"))
        (copy / "_build_info.json").write_text(json.dumps({**facts, **changed}))
    return folder


def python(folder: Path, code: str, **settings: str) -> str:
    """Runs ``code`` with the package in ``folder``; without site, so that an editable install cannot win."""
    path = os.pathsep.join([str(folder), *SITE_PACKAGES])
    env = clean_environment(PYTHONPATH=path, **settings)
    return run(sys.executable, "-S", "-c", f"import os, sys, torch\n{code}", cwd=folder, env=env)


# Imports the package again after each change, and prints what it raised.
TRY_IMPORT = """
def attempt(change):
    for name in [n for n in sys.modules if n.split('.')[0] == 'pyvitfast']:
        del sys.modules[name]
    change()
    try:
        import pyvitfast
        print('imported', pyvitfast.__file__)
    except Exception as error:
        print(type(error).__name__ + ':', str(error).replace(chr(10), ' '))
"""


def test_versions_that_fit_are_silent():
    _lib.check_versions(BUILD, __version__, "2.10.0")
    _lib.check_versions(BUILD, __version__, "2.14.1+cu130")
    _lib.check_versions(BUILD, __version__, "3.0.0a0+git1234567")
    _lib.check_cuda_versions(BUILD, "13.2")


@pytest.mark.parametrize(
    ("build", "torch_version", "named"),
    [
        ({"version": "9.8.7"}, "2.14.1", (__version__, "9.8.7")),
        ({"torch_target": "2.12"}, "2.11.0+cpu", ("2.12", "2.11.0+cpu")),
        ({"torch_target": "3.0"}, "2.99.0", ("3.0", "2.99.0")),
        ({}, "2.9.1", ("2.10", "2.9.1")),
    ],
)
def test_version_mismatch_names_both_and_the_remedy(build, torch_version, named):
    with pytest.raises(ImportError) as caught:
        _lib.check_versions({**BUILD, **build}, __version__, torch_version)
    for part in (*named, "pip install --no-build-isolation --force-reinstall"):
        assert part in str(caught.value)


def test_cuda_mismatch_names_both_and_the_remedy():
    with pytest.raises(ImportError) as caught:
        _lib.check_cuda_versions(BUILD, "12.8")
    for part in ("CUDA 13.0", "CUDA 12.8", torch.__version__, "pip install", "PYVITFAST_BACKEND=cpu"):
        assert part in str(caught.value)


def test_unreadable_torch_version():
    with pytest.raises(ImportError, match="cannot read the torch version 'master'"):
        _lib.check_versions(BUILD, __version__, "master")


def test_mismatch_at_import(tmp_path):
    changes = [{"version": "9.8.7"}, {"torch_target": "99.1"}]
    # Known only once the CPU kernels are loaded, so it stands last.
    if torch.version.cuda is not None and _lib.find_binary("_ops_cuda") is not None:
        changes.append({"torch_cuda": "4.2"})
    code = f"""
import json
path = 'pyvitfast/_build_info.json'
facts = json.load(open(path))
for change in {changes!r}:
    attempt(lambda: json.dump({{**facts, **change}}, open(path, 'w')))
"""
    lines = python(package(tmp_path), TRY_IMPORT + code).splitlines()
    assert len(lines) == len(changes)
    assert all(line.startswith("ImportError: pyvitfast: ") and "pip install" in line for line in lines), lines
    assert "9.8.7" in lines[0]
    assert __version__ in lines[0]
    assert "99.1" in lines[1]
    assert torch.__version__ in lines[1]
    if len(lines) == 3:
        assert "CUDA 4.2" in lines[2]
        assert f"CUDA {torch.version.cuda}" in lines[2]


def test_without_binaries(tmp_path):
    code = """
import warnings
import pyvitfast
from pyvitfast import info, ops, reference
warnings.simplefilter('always')
w, alive = torch.ones(2, 3), torch.tensor([True, False])
with warnings.catch_warnings(record=True) as caught:
    for _ in range(2):
        assert ops.implementation('structured_zero_', 'cpu') is reference.structured_zero_
    assert ops.implementation('saliency_rowcol', 'cpu') is reference.saliency_rowcol
for warning in caught:
    print(warning.category.__name__ + ':', warning.message)
reference.structured_zero_([w], [alive], [None])
assert w.sum() == 3
assert not ops.available('saliency_rowcol')
assert ops.__all__ and not ops.STATUS.loaded
x, i = torch.ones(1), torch.zeros(2, dtype=torch.int64)
calls = {
    'saliency_rowcol': ([w], [w]), 'structured_zero_': ([w], [alive], [None]),
    'structured_gather': ([w], [None], [None]), 'saliency_commit_': (x, i, x, i, i[:0]),
    'linear_cross_attention': (w, w[:, None], *[torch.eye(3)] * 4),
    'scaled_sqnorm': ([w], [x]), 'fake_quantize': ([w], [x]),
    'spsa_perturb': ([w], [w], [x], x), 'spsa_update_': ([w], [x], x, x),
    'adaptive_window_pool': (w[None, None], (1, 1)),
    'two_head_loss': (w, w, i[:1], i[:1]),
    'semantic_pool_attention': (w[None], w[None], *[torch.eye(3)] * 4),
    'kron_grow': (w[None, None], torch.eye(3), torch.eye(2), torch.ones(1, 1, 1)),
    'tensor_ring_grow': [torch.ones(1, 1, 1, 1)] * 5,
    'few_query_attention': [torch.ones(1, 1, 1, 1)] * 3,
    'window_gather_attention': (torch.ones([1] * 6), *[torch.ones([1] * 5)] * 2, *[(1, 1)] * 3),
}
noise = {'seed': 0, 'one_minus_beta': 0.5}
options = {
    'linear_cross_attention': {'num_heads': 1}, 'semantic_pool_attention': {'num_heads': 1},
    'fake_quantize': {'bits': 2}, 'spsa_update_': noise,
    'spsa_perturb': {**noise, 'bits': 2, 'eps_bar': 0.3},
}
for name in ops.__all__:
    try:
        getattr(ops, name)(*calls[name], **options.get(name, {}))
    except ImportError as error:
        print(error)
assert info.support()['saliency_rowcol'] == {'CPU': False, 'CUDA': False, 'Meta': False, 'Autograd': False}
assert info.collect()['cpu_capability'] == 'not built'
"""
    lines = python(package(tmp_path, binaries=False), code).splitlines()
    reason = "the compiled library pyvitfast/_ops is not installed; install with a C++20 compiler present"
    warned = [line for line in lines if line.startswith("RuntimeWarning: ")]
    assert len(warned) == 2
    for name, line in zip(("structured_zero_", "saliency_rowcol"), warned):
        assert line.startswith(
            f"RuntimeWarning: pyvitfast: {name} runs on the plain-torch reference: {reason}"
        )
    raised = [line for line in lines if line not in warned]
    assert len(raised) == len(ops.__all__), lines
    for name, line in zip(ops.__all__, raised):
        assert line.startswith(f"{name}: {reason}")
        assert line.endswith(f"pyvitfast.reference.{name} works without it.")


def test_broken_library_or_lost_build_information(tmp_path):
    folder = package(tmp_path)
    code = """
def lose(): os.remove('pyvitfast/_build_info.json')
attempt(lambda: open('pyvitfast/_ops.so', 'wb').write(b'not a library'))
attempt(lose)
"""
    broken, lost = python(folder, TRY_IMPORT + code).splitlines()
    start = f"ImportError: pyvitfast: _ops.so could not be loaded under torch {torch.__version__}: "
    assert broken.startswith(start)
    assert "pip install --no-build-isolation --force-reinstall" in broken
    assert re.match(r"ImportError: pyvitfast: .*_build_info\.json is missing beside _ops\.so; ", lost)


def test_backend_and_capability_asked_for_in_vain(tmp_path):
    folder = package(tmp_path)
    (folder / "pyvitfast/_ops_cuda.so").unlink(missing_ok=True)
    code = """
def ask(**settings):
    for name in ('PYVITFAST_BACKEND', 'PYVITFAST_CPU_CAPABILITY'):
        os.environ.pop(name, None)
    os.environ.update(settings)
attempt(lambda: ask(PYVITFAST_BACKEND='gpu'))
attempt(lambda: ask(PYVITFAST_BACKEND='cuda'))
attempt(lambda: ask(PYVITFAST_BACKEND='emulated'))
attempt(lambda: ask(PYVITFAST_CPU_CAPABILITY='sse9'))
attempt(lambda: ask(PYVITFAST_BACKEND='cpu'))
attempt(lambda: os.remove('pyvitfast/_ops.so') or ask(PYVITFAST_BACKEND='cpu'))
"""
    unknown, cuda, emulated, capability, right, missing = python(folder, TRY_IMPORT + code).splitlines()
    start = "ImportError: pyvitfast: "
    assert unknown == f"{start}PYVITFAST_BACKEND must be one of cpu, cuda, emulated or unset, got 'gpu'."
    reason = "is a CPU-only build" if torch.version.cuda is None else "the CUDA kernels were not built: "
    assert cuda.startswith(f"{start}PYVITFAST_BACKEND=cuda, but ")
    assert reason in cuda
    reason = "the compiled library pyvitfast/_ops_emulated is not installed"
    assert emulated.startswith(f"{start}PYVITFAST_BACKEND=emulated, but {reason}")
    assert "PYVITFAST_BUILD_TESTS=ON" in emulated
    assert re.fullmatch(
        rf"{start}PYVITFAST_CPU_CAPABILITY must be one of baseline[a-z0-9, ]* "
        r"on this processor, got 'sse9'\.",
        capability,
    )
    assert right.startswith("imported")
    assert missing.startswith(f"{start}PYVITFAST_BACKEND=cpu, but the compiled library pyvitfast/_ops is not")


def test_forced_capability_is_the_one_that_runs(tmp_path):
    code = """
import pyvitfast
from pyvitfast import _C, ops
print(_C.cpu_capability(), ops.saliency_rowcol([torch.ones(2, 3)], [torch.ones(2, 3)]).tolist())
"""
    printed = python(package(tmp_path), code, PYVITFAST_CPU_CAPABILITY="baseline")
    assert printed.split(maxsplit=1) == ["baseline", "[3.0, 3.0, 2.0, 2.0, 2.0]\n"]


def test_capability_without_introspection_is_an_error_not_a_crash(tmp_path):
    folder = package(tmp_path)
    for path in (folder / "pyvitfast").glob("_C*"):
        path.unlink()
    code = """
from pyvitfast import ops
try:
    ops.saliency_rowcol([torch.ones(2, 3)], [torch.ones(2, 3)])
except RuntimeError as error:
    print(error)
"""
    assert "PYVITFAST_CPU_CAPABILITY must be one of" in python(folder, code, PYVITFAST_CPU_CAPABILITY="sse9")


def test_ops_do_not_need_timm(tmp_path):
    code = """
for name in ('timm', 'torchvision', 'accelerate', 'torchmetrics', 'matplotlib', 'sklearn'):
    sys.modules[name] = None
import pyvitfast, pyvitfast.ops, pyvitfast.reference, pyvitfast.info
print(pyvitfast.__file__)
print(pyvitfast.ops.saliency_rowcol([torch.ones(1, 2)], [torch.ones(1, 2)]).tolist())
pyvitfast.info.collect()
"""
    where, sums = python(package(tmp_path), code).splitlines()
    assert where.startswith(str(tmp_path))
    assert sums == "[2.0, 1.0, 1.0]"


def test_one_version_everywhere():
    newest = re.search(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == __version__ == ops.STATUS.build["version"] == info.collect()["pyvitfast"]
    text = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in text
    assert 'input = "pyvitfast/_version.py"' in text
    assert not re.search(r'^version\s*=\s*"', text, re.MULTILINE)


def test_oldest_torch_agrees_everywhere():
    oldest = ops.STATUS.build["torch_target"]
    assert oldest == info.OLDEST_TORCH
    text = (ROOT / "pyproject.toml").read_text()
    assert text.count(f'"torch>={oldest}"') == 2
    cmake = (ROOT / "CMakeLists.txt").read_text()
    assert f"TORCH_VERSION VERSION_LESS {oldest})" in cmake
    major, minor = (int(part) for part in oldest.split("."))
    assert f'"0x{major:02x}{minor:02x}000000000000"' in cmake


def test_support_table_is_the_dispatcher():
    for name, keys in info.support().items():
        dump = torch._C._dispatch_dump(f"pyvitfast::{name}")
        listed = set(re.findall(r"^(\w+)(?:\[alias\])?: registered", dump, re.MULTILINE))
        assert {key for key, held in keys.items() if held} == listed & keys.keys(), name


class TestLaunchPlan:
    """For a matrix of 3072 x 768 in float32, by hand from the tile sizes."""

    @pytest.fixture
    def plan(self):
        return pytest.importorskip("pyvitfast._C").launch_plan

    @pytest.mark.parametrize("arch", [80, 90, 100])
    @pytest.mark.parametrize(
        ("op", "shape", "expected"),
        [
            # 48 tiles of 64 x 1024; 8 warps keep 64 row sums, and one flag; w and g read, sums written.
            ("saliency_rowcol", (3072, 768), (1, 48, 256, 8 * 64 * 4 + 4, 8 * 3072 * 768 + 4 * (3072 + 768))),
            # 96 x 3 tiles of 32 x 256; each entry written.
            ("structured_zero_", (3072, 768), (1, 288, 256, 0, 4 * 3072 * 768)),
            # The same tiles; each entry read and written.
            ("structured_gather", (3072, 768), (1, 288, 256, 0, 8 * 3072 * 768)),
            # One image of 196 tokens in 4 splits of 64 and less, 6 heads: 16 rows, u, sums, 19 values a head.
            ("linear_cross_attention", (196, 384), (7, 4, 256, 4 * (28 * 384 + 6 * 19 + 16), 4 * 209 * 384)),
            # A grid of 14 by 14 in 4 by 4 bins: 16 x 384 sums, four a thread.
            ("adaptive_window_pool", (14, 384), (1, 12, 128, 0, 4 * 384 * (14 * 14 + 16))),
            # A warp a row, 8 rows a block; above 1024 classes a block a row.
            ("two_head_loss", (128, 1000), (2, 16, 256, 0, 8 * 128 * 1000)),
            ("two_head_loss", (128, 8142), (2, 128, 256, 0, 8 * 128 * 8142)),
            # 16 queries with 6 heads in tiles of 16 rows, tokens in 4 splits of 64 and less.
            (
                "semantic_pool_attention",
                (196, 384),
                (8, 24, 256, 4 * (48 * 388 + 10 * 256 + 96), 4 * (228 * 384 + 4 * 384**2)),
            ),
            # Squares, then the sum; 39,312 units of DeiT-B.
            ("saliency_commit_", (39312, 1), (2, 154, 256, 0, 12 * 39312)),
            # Past 1024 blocks the threads stride.
            ("saliency_commit_", (3072 * 768, 1), (2, 1024, 256, 0, 12 * 3072 * 768)),
        ],
    )
    def test_one_matrix(self, plan, op, shape, expected, arch):
        names = ("launches", "blocks", "threads", "shared_bytes", "least_bytes")
        assert plan(op, [shape], arch) == dict(zip(names, expected))

    def test_growth(self, plan):
        """DeiT-S to DeiT-B for qkv, and DeiT-Ti to DeiT-S by a ring of rank 4."""
        kron = plan("kron_grow", [(3, 3), (12, 12), (384, 384), (768, 768)])
        # Mixing, then two products for each four of twelve matrices of three types.
        assert kron["launches"] == 1 + 2 * 3 * 3
        assert kron["blocks"] == 6 * 6 * 4
        assert kron["least_bytes"] == 4 * (3 * 12 * (384**2 + 768**2) + 3 * 144 + 2 * 384 * 768)
        ring = plan("tensor_ring_grow", [(12, 12), (192, 192), (12, 12), (384, 384), (4, 4), (4, 4)])
        assert ring["launches"] == 4 * 12
        assert ring["blocks"] == 3 * 144
        cores = 16 * (144 + 144 + 2 * 192 * 384)
        assert ring["least_bytes"] == 4 * (144 * (192**2 + 384**2) + cores)
        for op in ("kron_grow", "tensor_ring_grow"):
            with pytest.raises(ValueError, match=f"{op} takes [46] shapes, got 1"):
                plan(op, [(1, 1)])

    def test_attention(self, plan):
        """STViT-S at 196 tokens, batch 1 and 32, and the first layer of detection."""
        one = plan("few_query_attention", [(6, 16), (196, 64)])
        assert (one["launches"], one["blocks"]) == (2, 18)  # three splits of 64 keys and more
        # 16 queries and two tiles of 64 keys in rows of 68 floats, and 16 x 64 weights.
        assert one["shared_bytes"] == 4 * (144 * 68 + 1024)
        many = plan("few_query_attention", [(192, 100), (196, 64)])
        assert (many["launches"], many["blocks"]) == (1, 192 * 7)
        assert many["least_bytes"] == 4 * 192 * (2 * 64 * 296 + 100)
        gather = plan("window_gather_attention", [(288, 9), (196, 32), (3 * 56 * 84, 1)])
        assert gather["blocks"] == 288
        assert gather["least_bytes"] == 4 * (64 * (3 * 56 * 84 + 288 * 9) + 288 * 9)
        with pytest.raises(ValueError, match="window_gather_attention takes 3 shapes, got 1"):
            plan("window_gather_attention", [(1, 1)])

    @pytest.mark.parametrize(
        ("op", "most"), [("saliency_rowcol", 320), ("structured_zero_", 440), ("structured_gather", 230)]
    )
    def test_a_launch_holds_many_matrices(self, plan, op, most):
        assert plan(op, [(1, 1)] * most)["launches"] == 1
        assert plan(op, [(1, 1)] * (most + 1))["launches"] == 2

    def test_bad_arguments(self, plan):
        with pytest.raises(ValueError, match="`arch` must be 80 or newer, got 75"):
            plan("saliency_rowcol", [(1, 1)], 75)
        for shapes in ([], [(1, 1)]):
            with pytest.raises(ValueError, match="unknown op 'saliency'"):
                plan("saliency", shapes)


class TestFmaLoop:
    @pytest.fixture
    def module(self):
        return pytest.importorskip("pyvitfast._C")

    def test_counts_what_it_does(self, module):
        # Repeats x sums x lanes x (a product and a sum).
        one = {"baseline": 4 * 12 * 4 * 2, "avx2": 4 * 12 * 8 * 2, "avx512": 4 * 16 * 16 * 2}
        for iterations in (0, 1, 1000):
            assert module.fma_loop(iterations) == iterations * one[module.cpu_capability()]

    def test_lets_other_threads_run(self, module):
        looping = threading.Thread(target=module.fma_loop, args=(50_000_000,))
        seen = [time.perf_counter()]
        looping.start()
        while looping.is_alive():
            seen.append(time.perf_counter())
        looping.join()
        # Kept out, this thread would not look at the clock for nearly all of the time.
        assert max(b - a for a, b in pairwise(seen)) < 0.5 * (seen[-1] - seen[0])

    def test_refuses_a_negative_count(self, module):
        with pytest.raises(ValueError, match="`iterations` must be 0 or more, got -1"):
            module.fma_loop(-1)


def undefined(name: str) -> list[str]:
    binary = _lib.find_binary(name)
    if binary is None or shutil.which("nm") is None:
        pytest.skip(f"no {name}, or no nm")
    listed = run("nm", "-D", "--undefined-only", binary, cwd=ROOT)
    return [line.split()[-1] for line in listed.splitlines()]


@pytest.mark.parametrize("name", ["_ops", "_ops_emulated"])
def test_cpu_library_needs_no_cuda_symbol(name):
    # A CPU-only torch has the device type's name but nothing of CUDA; one symbol more and loading fails.
    symbols = [s for s in undefined(name) if re.search(r"[Cc]uda|CUDA|^cu[A-Z]|^nv", s)]
    assert set(symbols) <= {"aoti_torch_device_type_cuda"}


@pytest.mark.slow
def test_no_weak_symbols_in_wider_instruction_sets(tmp_path):
    # The linker keeps one copy of a weak function: an AVX-512 one would then run on every processor.
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    env = clean_environment()
    run(*configure_command(tmp_path, "-DPYVITFAST_CUDA=OFF"), cwd=tmp_path, env=env)
    facts = json.loads((tmp_path / "_build_info.json").read_text())
    wider = [c for c in facts["cpu_capabilities"] if c != "baseline"]
    if not wider:
        pytest.skip("this processor family has one instruction set")
    targets = [f"{kind}_{c}" for c in wider for kind in ("cpu", "fma")]
    run(shutil.which("cmake"), "--build", tmp_path, "--target", *targets, cwd=tmp_path, env=env)
    for capability in wider:
        objects = sorted(tmp_path.glob(f"CMakeFiles/cpu_{capability}.dir/**/*_cpu.cpp.o"))
        assert len(objects) == len(ops.__all__)
        objects += tmp_path.glob(f"CMakeFiles/fma_{capability}.dir/**/*_cpu.cpp.o")
        assert len(objects) == len(ops.__all__) + 1
        for path in objects:
            listed = run("nm", "-C", "--defined-only", path, cwd=tmp_path)
            weak = [line for line in listed.splitlines() if re.match(r"[0-9a-f]* [WVu] ", line)]
            assert not weak, (path, weak)
            assert f"::{capability}::" in listed


def test_build_info_of_the_module_is_the_file_beside_it():
    binary = _lib.find_binary("_C")
    if binary is None:
        pytest.skip("_C is not installed")
    from pyvitfast import _C

    assert _C.build_info() == _lib.read_build_info(binary)
