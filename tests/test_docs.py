"""What the pages say and can be checked: links, examples, variables, error texts."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

from pyvitfast import ops

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")]
OP_PAGES = [ROOT / "docs" / "ops" / f"{name}.md" for name in ops.__all__]
PYTHON = [p for room in ("pyvitfast", "tools", "tests", "benchmarks") for p in (ROOT / room).rglob("*.py")]
CXX = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu")]

# Read by programs that the build calls, not by our own code.
READ_BY_OTHERS = {"CMAKE_BUILD_PARALLEL_LEVEL"}
# Set for programs that tests and tools start; environment.md says so below its tables.
SET_ONLY = {
    "ASAN_OPTIONS",
    "UBSAN_OPTIONS",
    "TSAN_OPTIONS",
    "LD_PRELOAD",
    "PYTHONPATH",
    "PATH",
    "CUDAToolkit_ROOT",
}


def identify(path: Path) -> str:
    return str(path.relative_to(ROOT))


def is_environment(node: ast.AST) -> bool:
    return "environ" in ast.unparse(node) or ast.unparse(node) == "env"


def read_in_python(path: Path) -> set[str]:
    """Names given to os.environ and os.getenv, and every constant that is a PYVITFAST_ name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(re.findall(r"^PYVITFAST_[A-Z_]*[A-Z]$", node.value))
        names: list[ast.expr] = []
        if isinstance(node, ast.Subscript) and is_environment(node.value):
            names = [node.slice]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            environment = node.func.attr in ("get", "pop", "setdefault") and is_environment(node.func.value)
            names = [node.args[0]] if environment or node.func.attr == "getenv" else []
        elif isinstance(node, ast.Compare) and is_environment(node.comparators[0]):
            names = [node.left]
        found |= {n.value for n in names if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return found


def variables_in_code() -> set[str]:
    found = set().union(*(read_in_python(path) for path in PYTHON if path != Path(__file__)))
    for path in CXX:
        found |= set(re.findall(r'getenv\("(\w+)"\)', path.read_text()))
    runtime = (ROOT / "csrc/emulator/runtime.cpp").read_text()
    (settings,) = re.findall(r"kSettingNames = \{([^}]*)\}", runtime)
    found |= {f"PYVITFAST_EMULATOR_{name}" for name in re.findall(r'"(\w+)"', settings)}
    found |= set(re.findall(r"ENV\{(\w+)\}", (ROOT / "CMakeLists.txt").read_text()))
    found |= set(re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE))
    return found - SET_ONLY


def variables_in_table() -> set[str]:
    rows = re.findall(r"^\| (`[^|]*`) \|", (ROOT / "docs/environment.md").read_text(), re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_environment_table_is_complete():
    assert variables_in_code() - variables_in_table() == set()


def test_environment_table_has_nothing_that_is_gone():
    everything = "\n".join(p.read_text() for p in [*PYTHON, *CXX, ROOT / "CMakeLists.txt", ROOT / "Makefile"])
    words = set(re.findall(r"\w+", everything)) | variables_in_code() | READ_BY_OTHERS
    assert variables_in_table() - words == set()


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_no_path_of_one_machine(page):
    assert not re.findall(r"(?<![\w.~-])/(?:work|root|home|Users|mnt)/\S*", page.read_text())


@pytest.mark.parametrize("page", OP_PAGES, ids=identify)
def test_op_page_is_whole_and_its_examples_run(page):
    text = page.read_text()
    for heading in ("Formula", "Signature", "Guarantees", "Backward", "Cost", "Kernels", "Example"):
        assert f"\n## {heading}\n" in text, heading
    signature = inspect.signature(getattr(ops, page.stem))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    (shown,) = re.findall(rf"```\n{page.stem}(\([^`]*\)) -> ", text)
    assert " ".join(shown.split()) == str(inspect.Signature(bare))
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("op", ["saliency_rowcol", "structured_zero_", "structured_gather"])
def test_stated_tensors_of_a_launch_are_those_of_the_source(op):
    (most,) = re.findall(r"constexpr int kMax\w+ = (\d+);", (ROOT / f"csrc/ops/{op}/{op}.h").read_text())
    page = (ROOT / "docs" / "ops" / f"{op}.md").read_text()
    assert set(re.findall(r"1 for up to (\d+)", page)) == {most}


def headings() -> list[str]:
    return re.findall(r"^## (.*)$", (ROOT / "docs/faq.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("heading", headings())
def test_faq_headings_are_texts_of_the_code(heading):
    sources = [p for p in PYTHON if p.is_relative_to(ROOT / "pyvitfast")] + CXX + [ROOT / "CMakeLists.txt"]
    # Adjacent literals, as the compilers and CMake join them.
    text = "\n".join(re.sub(r'"\s+f?r?"', "", p.read_text()) for p in sources)
    for part in heading.split("…"):
        assert part.strip(" ,=") in text, part
