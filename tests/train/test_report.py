from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from rich.console import Console

import pyvitfast as vf
import pyvitfast.models.micro
from pyvitfast.report import Subject, latencies, write_report
from pyvitfast.report.measure import Facts, table


class Page(HTMLParser):
    """Text and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def slim_copy(dense: torch.nn.Module) -> torch.nn.Module:
    pruner = vf.prune.NViTPruner(dense, target=0.5, interval=1, groups_per_step=100, group_sizes={"mlp": 8})
    pruner.prune_once(torch.arange(pruner.table.count, dtype=torch.float64))
    return pruner.compact().eval()


def events() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {
            "event": "start",
            "command": ["pyvitfast", "prune", "--data", "<a&b>"],
            "versions": {"torch": "9.8.7"},
        }
    ]
    for stage, count in {"train": 3, "prune": 2, "finetune": 1}.items():
        for i in range(count):
            values = {"epoch": i + 1, "train_loss": 1 / (i + 1), "top1": 80 + i, "macs": 0.9 - i / 5}
            found.append({"event": "epoch", "stage": stage, **values})
        if stage == "train":
            found.append({"event": "dense", "top1": 82.0, "class_mean": 81.0})
        if stage == "prune":
            found.append({"event": "compact", "top1": 79.0, "class_mean": 78.0})
    return [*found, {"event": "result", "model": {"top1": 83.25, "class_mean": 82.5}}]


@pytest.fixture
def report(tmp_path: Path) -> tuple[Path, str, list[torch.nn.Module]]:
    dense = timm.create_model("vit_micro_patch2_8").eval()
    slim = slim_copy(dense)
    for model, name in ((dense, "dense"), (slim, "model")):
        vf.save(model, tmp_path / f"{name}.safetensors")
    console = Console(record=True, width=100, quiet=False, file=(tmp_path / "terminal.txt").open("w"))
    write_report(
        tmp_path,
        "a <title>",
        Subject(slim, tmp_path / "model.safetensors", 83.25, 82.5),
        Subject(dense, tmp_path / "dense.safetensors", 82.0, 81.0),
        events(),
        {"lr": 0.0123, "data": "<script>"},
        "cpu",
        console,
    )
    return tmp_path, console.export_text(), [dense, slim]


def test_page_needs_nothing_from_elsewhere(report: tuple[Path, str, list[torch.nn.Module]]) -> None:
    text = (report[0] / "report.html").read_text()
    assert not re.search(r"https?://", text)
    page = Page(text)
    sources = [
        value for name, value in page.attributes if name in ("src", "href", "srcset", "data", "action")
    ]
    assert len(sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "@import" not in text
    assert "url(" not in text
    assert "<script" not in text


def test_page_and_terminal_hold_the_numbers(report: tuple[Path, str, list[torch.nn.Module]]) -> None:
    folder, terminal, models = report
    texts = Page((folder / "report.html").read_text()).texts
    before, after = (vf.summary(model) for model in models)
    expected = [
        f"{before.params:,}",
        f"{after.params:,}",
        f"{before.macs:,}",
        f"{after.macs:,}",
        f"{before.macs / after.macs:.2f}x less",
        f"{(folder / 'dense.safetensors').stat().st_size / 1024:,.1f} KiB",
        f"{(folder / 'model.safetensors').stat().st_size / 1024:,.1f} KiB",
        "82.00 %",
        "83.25 %",
        "+1.25 points",
        "82.50 %",
    ]
    for number in expected:
        assert number in texts, number
        assert number in terminal, number
    assert {"0.0123", "9.8.7", "a <title>", "<script>"} <= set(texts)
    assert "pyvitfast prune --data '<a&b>'" in texts
    threads = f"on cpu, {torch.get_num_threads()} thread"
    assert any(threads in text for text in texts)
    assert threads in " ".join(terminal.split())


def test_figures_are_whole_pngs_of_a_readable_size(report: tuple[Path, str, list[torch.nn.Module]]) -> None:
    names = sorted(p.name for p in report[0].glob("*.png"))
    assert names == ["report-path.png", "report-training.png", "report-widths.png", "report.png"]
    for name in names:
        with Image.open(report[0] / name) as image:
            image.load()
            assert image.width >= 800
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 20  # something is drawn


def test_a_slower_model_is_called_slower() -> None:
    facts = vf.summary(timm.create_model("vit_micro_patch2_8"))
    before = Facts(facts, {1: 1.0, 32: 2.0}, 1024, 90.0, 90.0)
    after = Facts(facts, {1: 1.5, 32: 1.0}, 1024, 89.0, 90.0)
    ratios = {row.label: row.ratio for row in table(before, after)}
    assert ratios["Latency, batch 1"] == "1.50x more"
    assert ratios["Latency, batch 32"] == "2.00x less"
    assert ratios["Top-1 accuracy"] == "-1.00 points"
    assert {row.before for row in table(None, after)} == {""}


def test_latencies_take_turns_and_leave_models_alone() -> None:
    order: list[str] = []

    class Named(torch.nn.Module):
        def __init__(self, model: torch.nn.Module, name: str) -> None:
            super().__init__()
            self.model, self.name = model, name
            self.pretrained_cfg = {"input_size": (1, 8, 8)}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            order.append(self.name)
            return self.model(x)

    models = [Named(timm.create_model("vit_micro_patch2_8").eval(), name) for name in "ab"]
    first, second = latencies(models, "cpu", seconds=0.05)
    assert set(first) == set(second) == {1, 32}
    assert min(*first.values(), *second.values()) > 0
    timed = [name for name in order if name in "ab"]
    assert timed.count("a") == timed.count("b") >= 14
    assert "aaaa" not in "".join(timed)
