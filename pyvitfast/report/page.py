"""The HTML page of a report: one file, nothing fetched from elsewhere."""

from __future__ import annotations

import base64
import html
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1e293b; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse }
td, th { padding: .3rem .9rem; border-bottom: 1px solid #e2e8f0; text-align: left; overflow-wrap: anywhere }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
img { max-width: 100%; height: auto }
pre { background: #f1f5f9; padding: .7rem; white-space: pre-wrap; overflow-wrap: anywhere }
p.note { color: #64748b; font-size: .9rem }
"""


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = []
    for number, row in enumerate(rows):
        tag = "td" if number else "th"
        first, *rest = (html.escape(value) for value in row)
        cells = [f"<{tag}>{first}</{tag}>", *(f'<{tag} class="number">{value}</{tag}>' for value in rest)]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _pairs(values: Mapping[str, Any]) -> str:
    lines = [
        f"<tr><td>{html.escape(str(k))}</td><td>{html.escape(str(v))}</td></tr>" for k, v in values.items()
    ]
    return f"<table>{''.join(lines)}</table>"


def page(
    title: str,
    rows: Sequence[Sequence[str]],
    note: str,
    images: Mapping[str, Path],
    settings: Mapping[str, Any],
    versions: Mapping[str, Any],
    command: Sequence[str],
    tables: Mapping[str, Sequence[Sequence[str]]] | None = None,
) -> str:
    """The page as text.

    Args:
        title: heading.
        rows: of the table, the first one the head.
        note: how the table was measured.
        images: PNG files by heading, embedded.
        settings: of the run.
        versions: of the software.
        command: the command line.
        tables: more tables by heading, the first row the head.
    """
    more = [f"<h2>{html.escape(heading)}</h2>{_table(lines)}" for heading, lines in (tables or {}).items()]
    figures = []
    for heading, file in images.items():
        data = base64.b64encode(file.read_bytes()).decode()
        name = html.escape(heading)
        figures.append(f'<h2>{name}</h2><img alt="{name}" src="data:image/png;base64,{data}">')
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_CSS}</style></head><body><h1>{html.escape(title)}</h1>"
        f'{_table(rows)}<p class="note">{html.escape(note)}</p>{"".join(more)}{"".join(figures)}'
        f"<h2>Command</h2><pre>{html.escape(shlex.join(command))}</pre>"
        f"<h2>Settings</h2>{_pairs(settings)}<h2>Versions</h2>{_pairs(versions)}</body></html>\n"
    )
