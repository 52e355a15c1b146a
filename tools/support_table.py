"""The support table of the README, read from the dispatcher: ``python tools/support_table.py [--write]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from pyvitfast import ops

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- support table: begin -->", "<!-- support table: end -->"


def has(op: str, key: str) -> bool:
    """Whether the dispatcher holds a kernel of ``pyvitfast::<op>`` for this key."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"pyvitfast::{op}", key))


def table() -> str:
    """Markdown, one row an op. CUDA is read where the CUDA library is loaded, which takes a CUDA torch."""
    lines = [
        "| op | CPU | CUDA | torch.compile, export | gradient | reference |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in ops.__all__:
        gradient = "yes" if has(name, "Autograd") else "not differentiable"
        cells = [has(name, "CPU"), has(name, "CUDA"), has(name, "Meta")]
        words = ["yes" if c else "no" for c in cells]
        lines.append(f"| [`{name}`](docs/ops/{name}.md) | {' | '.join(words)} | {gradient} | yes |")
    return "\n".join(lines)


def main() -> int:
    """Print the table, or write it into the README."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the table in README.md")
    if not parser.parse_args().write:
        print(table())
        return 0
    head, rest = README.read_text().split(BEGIN)
    tail = rest.split(END)[1]
    README.write_text(f"{head}{BEGIN}\n{table()}\n{END}{tail}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
