"""An op is whole or it is not there: every part of every op, by its one name."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
import torch

from pyvitfast import info, ops, reference

ROOT = Path(__file__).parent.parent
NAMES = sorted(ops.__all__)

# Ops without a gradient say why here; every other op has NAME_backward.
NOT_DIFFERENTIABLE = {
    "saliency_commit_": "bookkeeping outside the graph",
    "scaled_sqnorm": "part of an estimate of the gradient, outside the graph",
    "spsa_perturb": "part of an estimate of the gradient, outside the graph",
    "spsa_update_": "part of an estimate of the gradient, outside the graph",
    "structured_zero_": "writes parameters in place, outside the graph",
}


def registered() -> set[str]:
    return {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("pyvitfast::")
    }


def test_nothing_is_registered_that_is_not_listed():
    expected = set(NAMES) | {f"{n}_backward" for n in NAMES if n not in NOT_DIFFERENTIABLE}
    assert registered() == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "path",
    [
        "csrc/ops/{0}/{0}.h",
        "csrc/ops/{0}/{0}_math.h",
        "csrc/ops/{0}/{0}.cpp",
        "csrc/ops/{0}/{0}_cpu.cpp",
        "csrc/ops/{0}/{0}_cuda.cu",
        "pyvitfast/ops/{0}.py",
        "pyvitfast/reference/{0}.py",
        "tests/ops/test_{0}.py",
        "benchmarks/ops/{0}.py",
        "docs/ops/{0}.md",
    ],
)
def test_each_part_has_its_file(name, path):
    assert (ROOT / path.format(name)).is_file()


@pytest.mark.parametrize(
    "folder", ["csrc/ops", "pyvitfast/ops", "pyvitfast/reference", "benchmarks/ops", "docs/ops"]
)
def test_no_file_of_an_op_that_is_gone(folder):
    stems = {p.stem for p in (ROOT / folder).iterdir() if not p.name.startswith(("_", "."))}
    assert stems == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_dispatcher_holds_every_kernel(name):
    for op in [name] + ([] if name in NOT_DIFFERENTIABLE else [f"{name}_backward"]):
        has = {
            key: torch._C._dispatch_has_kernel_for_dispatch_key(f"pyvitfast::{op}", key)
            for key in ("CPU", "Meta")
        }
        assert all(has.values()), (op, has)


@pytest.mark.parametrize("name", NAMES)
def test_cuda_kernel_is_registered_where_it_was_built(name):
    if "_ops_cuda" not in ops.STATUS.loaded:
        pytest.skip(ops.STATUS.reasons["cuda"])
    assert info.support()[name]["CUDA"]


@pytest.mark.parametrize("name", NAMES)
def test_gradient_or_a_reason(name):
    assert info.support()[name]["Autograd"] == (name not in NOT_DIFFERENTIABLE)


@pytest.mark.parametrize("name", NAMES)
def test_lists_agree(name):
    assert name in reference.__all__
    assert set(reference.__all__) == set(NAMES)
    cmake = (ROOT / "CMakeLists.txt").read_text()
    (listed,) = re.findall(r"set\(PYVITFAST_OPS ([^)]*)\)", cmake)
    assert set(listed.split()) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_docstring_says_what_users_need(name):
    text = getattr(ops, name).__doc__
    for part in ("Args:", "Raises:", "Example:"):
        assert part in text, part


@pytest.mark.parametrize("name", NAMES)
def test_schema_names_its_arguments_and_marks_what_it_writes(name):
    schema = getattr(torch.ops.pyvitfast, name).default._schema
    assert schema.is_mutable == name.endswith("_")
    assert all(a.name for a in schema.arguments)


# cli -> report, train -> methods -> ops -> _lib; `models` serves the methods; `reference` imports torch only.
MAY_IMPORT = {
    "_version": set(),
    "_lib": {"_C"},
    "reference": {"reference"},
    "ops": {"ops", "reference", "_lib", "_version"},
    "info": {"_lib", "_C", "ops", "_version"},
    "models": {"models", "ops", "reference", "_version"},
    "distill": {"distill", "models", "ops", "reference"},
    "grow": {"grow", "models", "ops", "reference"},
    "prune": {"prune", "models", "ops", "reference"},
    "quantize": {"quantize", "models", "ops", "reference"},
    "tokens": {"tokens", "models", "ops", "reference"},
    "train": {"train", "distill", "grow", "prune", "quantize", "tokens", "models", "ops", "info", "_version"},
    "report": {"report", "models", "info", "_version"},
    "cli": {"train", "report", "prune", "models", "info", "_version", "ops"},
    "__main__": {"cli"},
    "__init__": {"_version", "ops", "models"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{a.name}" for a in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "pyvitfast" and len(parts) > 1:
                found.add(parts[1])
    return found


@pytest.mark.parametrize(
    "path", sorted((ROOT / "pyvitfast").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT / "pyvitfast"))
)
def test_imports_point_one_way(path):
    room = path.relative_to(ROOT / "pyvitfast").parts[0].removesuffix(".py")
    known = imports(path) - {"__version__"}
    assert known <= MAY_IMPORT[room], f"{room} may not import {known - MAY_IMPORT[room]}"


def test_reference_imports_torch_and_the_standard_library_only():
    allowed = {"torch", *sys.stdlib_module_names}
    for path in (ROOT / "pyvitfast/reference").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert all(a.name.split(".")[0] in allowed for a in node.names), path
            elif isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] in {*allowed, "pyvitfast"}, path


def test_kernels_include_no_torch_header():
    for path in [
        *(ROOT / "csrc").rglob("*.cu"),
        *(ROOT / "csrc").rglob("*_cpu.cpp"),
        *(ROOT / "csrc/portable").glob("*"),
    ]:
        assert not re.search(r"#include\s+[<\"](torch|ATen|c10)/", path.read_text()), path


def test_support_table_of_the_readme_is_the_dispatchers():
    if "_ops_cuda" not in ops.STATUS.loaded:
        pytest.skip("the table has a CUDA column; " + ops.STATUS.reasons.get("cuda", ""))
    import runpy

    table = runpy.run_path(str(ROOT / "tools/support_table.py"))["table"]()
    assert table in (ROOT / "README.md").read_text()


def test_import_registers_the_models_with_timm():
    import subprocess

    script = "import pyvitfast, timm; timm.create_model('vit_micro_patch2_8')"
    subprocess.run([sys.executable, "-c", script], check=True)
