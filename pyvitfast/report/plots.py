"""The figures of a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from torch import Tensor, amax, amin

from pyvitfast.models.summary import ModelSummary
from pyvitfast.report.measure import Facts

BEFORE, AFTER, MARK = "#b6bec8", "#2563a8", "#d1495b"
_STAGES = {
    "train": "#64748b",
    "prune": "#d1495b",
    "finetune": "#2563a8",
    "teacher": "#edae49",
    "student": "#2563a8",
}
_BASELINES = ("ste", "scratch")
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e5e9ee",
    "axes.edgecolor": "#94a3b8",
    "figure.dpi": 130,
    "svg.fonttype": "none",
}

Event = dict[str, Any]


@contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    # A Figure of its own draws with Agg and leaves pyplot's global state alone.
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(path)


def remaining(path: Path, before: Facts, after: Facts) -> None:
    """Bars: what is left of parameters, MACs, latencies and size, in percent of before."""
    labels = ["Parameters", "MACs", *(f"Latency, batch {b}" for b in after.latency), "Size on disk"]
    old = [
        before.summary.params,
        before.summary.macs,
        *(before.latency[b] for b in after.latency),
        before.size,
    ]
    new = [after.summary.params, after.summary.macs, *(after.latency[b] for b in after.latency), after.size]
    if after.sparse and before.nonzero and after.nonzero:
        labels.insert(1, "Parameters not 0")
        old.insert(1, before.nonzero)
        new.insert(1, after.nonzero)
    shares = [100 * n / o for n, o in zip(new, old)]
    with _figure(path, 7.2, 3.0) as figure:
        axes = figure.subplots()
        axes.barh(labels, [100] * len(labels), color=BEFORE, height=0.62, label="before")
        axes.barh(labels, shares, color=AFTER, height=0.62, label="after")
        if grew := [label for label, share in zip(labels, shares) if share > 100]:
            axes.barh(grew, [100] * len(grew), color=BEFORE, height=0.62)  # or the larger bar hides it
        for place, share in enumerate(shares):
            inside = share > 12
            axes.text(
                share - 1 if inside else share + 1,
                place,
                f"{share:.0f} %",
                va="center",
                ha="right" if inside else "left",
                color="white" if inside else "black",
            )
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, max(100, *shares) * 1.02)
        axes.set_xlabel("percent of before")
        axes.set_title(f"Top-1 accuracy {before.top1:.2f} % before, {after.top1:.2f} % after", loc="left")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def widths(path: Path, before: ModelSummary, after: ModelSummary) -> None:
    """Bars: heads, query/key, value and MLP widths of each block, and the residual width."""
    panels = [
        ("Heads", "heads"),
        ("QK width of a head", "qk_dim"),
        ("V width of a head", "v_dim"),
        ("MLP width", "mlp"),
    ]
    count = max(len(before.blocks), len(after.blocks))
    with _figure(path, 9.6, 5.2) as figure:
        grid = figure.add_gridspec(2, 3, width_ratios=[4, 4, 1.5])
        for place, (title, name) in enumerate(panels):
            axes = figure.add_subplot(grid[place // 2, place % 2])
            _pairs(axes, [getattr(b, name) for b in before.blocks], [getattr(b, name) for b in after.blocks])
            axes.set_title(title, loc="left")
            axes.set_xticks(range(0, count, max(1, count // 12)))
            axes.set_xlabel("block")
        axes = figure.add_subplot(grid[:, 2])
        _pairs(axes, before.embed_dims, after.embed_dims)
        axes.set_title("EMB width", loc="left")
        axes.set_xticks([])
        handles, names = axes.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)


def _pairs(axes: Any, before: Sequence[int], after: Sequence[int]) -> None:
    axes.bar([p - 0.2 for p in range(len(before))], before, width=0.38, color=BEFORE, label="before")
    bars = axes.bar([p + 0.2 for p in range(len(after))], after, width=0.38, color=AFTER, label="after")
    if len(after) <= 12:
        axes.bar_label(bars, fontsize=8, padding=1)
    axes.set_ylim(0, max(*before, *after) * 1.15)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="x", visible=False)


def path_of_pruning(path: Path, events: Sequence[Event]) -> None:
    """Accuracy against the share of MACs left, from the dense model to the finetuned one."""
    dense = next(e for e in events if e["event"] == "dense")
    compact = next(e for e in events if e["event"] == "compact")
    result = next(e for e in events if e["event"] == "result")
    epochs = [e for e in events if e["event"] == "epoch" and e["stage"] == "prune"]
    shares = [100.0] + [100 * e["macs"] for e in epochs]
    accuracy = [dense["top1"]] + [e["top1"] for e in epochs]
    end = shares[-1]
    with _figure(path, 7.2, 3.8) as figure:
        axes = figure.subplots()
        axes.plot(shares, accuracy, color=_STAGES["prune"], marker="o", markersize=4, label="while pruning")
        axes.plot([100], [dense["top1"]], "s", color=_STAGES["train"], markersize=8, label="dense")
        axes.plot([end], [compact["top1"]], "D", color="#edae49", markersize=7, label="compacted")
        axes.plot([end], [result["model"]["top1"]], "^", color=AFTER, markersize=9, label="finetuned")
        axes.invert_xaxis()
        axes.set_xlabel("MACs left, percent of the dense model")
        axes.set_ylabel("top-1 accuracy, %")
        low, high = axes.get_ylim()
        # Noise of a few images must not look like a cliff.
        middle, half = (low + high) / 2, max(2.5, (high - low) / 2)
        axes.set_ylim(middle - half, min(middle + half, 100.5))
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def training(path: Path, events: Sequence[Event]) -> None:
    """Loss and accuracy by epoch, through all stages."""
    epochs = [e for e in events if e["event"] == "epoch"]
    with _figure(path, 9.6, 3.6) as figure:
        loss_axes, top_axes = figure.subplots(1, 2)
        start = 0
        for stage, colour in _STAGES.items():
            mine = [e for e in epochs if e["stage"] == stage]
            if not mine:
                continue
            # Arms of a stage began at the same weights, so they share its place.
            for arm in sorted({e.get("arm", "") for e in mine}):
                run = [e for e in mine if e.get("arm", "") == arm]
                numbers = [start + i + 1 for i in range(len(run))]
                line = ("o" if len(run) == 1 else "") + ("--" if arm in _BASELINES else "-")
                label = f"{stage} ({arm})" if arm else stage
                loss_axes.plot(numbers, [e["train_loss"] for e in run], line, color=colour, label=label)
                top_axes.plot(numbers, [e["top1"] for e in run], line, color=colour, label=label)
            if start:
                for axes in (loss_axes, top_axes):
                    axes.axvline(start + 0.5, color="#cbd5e1", linewidth=1, linestyle="--")
            start += max(e["epoch"] for e in mine)
        loss_axes.set_ylabel("training loss")
        top_axes.set_ylabel("test top-1 accuracy, %")
        for axes in (loss_axes, top_axes):
            axes.set_xlabel("epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
        handles, names = loss_axes.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)


def growth(path: Path, events: Sequence[Event]) -> None:
    """Accuracy and training loss against training operations of the target, from scratch and grown."""
    grown = next(e for e in events if e["event"] == "grown")
    found = next(e for e in events if e["event"] == "saving")
    flops = grown["flops"]
    with _figure(path, 9.6, 3.8) as figure:
        top_axes, loss_axes = figure.subplots(1, 2)
        for arm in ("scratch", grown["method"]):
            mine = [e for e in events if e["event"] == "epoch" and e.get("arm") == arm]
            before = 0.0 if arm == "scratch" else flops.get("operator", 0.0)
            places = [(before + e["updates"] * flops["update"]) / 1e12 for e in mine]
            line, colour = ("--", BEFORE) if arm == "scratch" else ("-", AFTER)
            loss_axes.plot(places, [e["train_loss"] for e in mine], line, color=colour)
            tops = [e["top1"] for e in mine]
            if arm != "scratch":
                places, tops = [before / 1e12, *places], [grown["top1"], *tops]
            top_axes.plot(places, tops, line, color=colour, label=arm)
        top_axes.axhline(
            found["goal"], color=MARK, linewidth=1, linestyle=":", label="goal: the end of scratch"
        )
        top_axes.set_ylabel("test top-1 accuracy, %")
        loss_axes.set_ylabel("training loss")
        for axes in (top_axes, loss_axes):
            axes.set_xlabel("operations of target and operator, millions of millions")
        handles, names = top_axes.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)


def semantic_tokens(path: Path, model: Any, samples: Tensor) -> None:
    """Images; the token that takes in most of each patch; and what the most spread of them take in.

    Args:
        path: PNG file.
        model: with ``token_attention``, on the CPU.
        samples: images [B, C, H, W] as the model takes them.
    """
    maps = model.token_attention(samples.to(next(model.parameters()).dtype))  # [B, M, h, w]
    shares = (maps / maps.flatten(2).sum(-1)[..., None, None].clamp(min=1e-12)).numpy()
    shown = min(6, maps.shape[1])
    low, high = (f(samples.float().flatten(1), dim=1)[:, None, None, None] for f in (amin, amax))
    pictures = ((samples.float() - low) / (high - low).clamp(min=1e-12)).permute(0, 2, 3, 1).numpy()
    extent = (0, samples.shape[3], samples.shape[2], 0)
    with _figure(path, 1.5 * (shown + 2), 1.6 * len(samples) + 0.4) as figure:
        rows = figure.subplots(len(samples), shown + 2, squeeze=False)
        for row, picture, image_maps, owners in zip(
            rows, pictures, shares, maps.argmax(1).numpy(), strict=True
        ):
            owned = [int((owners == token).sum()) for token in range(len(image_maps))]
            tokens = sorted(range(len(image_maps)), key=lambda t: -owned[t])[:shown]
            grey = picture.mean(-1)
            row[0].imshow(picture if picture.shape[-1] == 3 else grey, cmap="gray")
            row[1].imshow(grey, cmap="gray", extent=extent)
            row[1].imshow(
                owners, cmap="tab20", alpha=0.6, extent=extent, vmin=0, vmax=max(19, len(image_maps))
            )
            for axes, token in zip(row[2:], tokens, strict=True):
                axes.imshow(grey, cmap="gray", extent=extent)
                axes.imshow(image_maps[token], cmap="magma", alpha=0.65, extent=extent, vmin=0)
                axes.set_title(f"token {token}", fontsize=8)
            for axes in row:
                axes.set_axis_off()
        rows[0][0].set_title("image", fontsize=8)
        rows[0][1].set_title("largest weight", fontsize=8)


def heads(path: Path, found: Event) -> None:
    """Accuracy of each head by class, ranks of both tokens and attention distances after each block."""
    colours = {"cls": MARK, "dist": "#edae49", "avg": AFTER}
    with _figure(path, 10.5, 3.4) as figure:
        classes, ranks, distances = figure.subplots(1, 3)
        order = sorted(range(len(found["counts"])), key=lambda c: -found["counts"][c])
        for head, accuracy in found["by_class"].items():
            classes.plot([accuracy[c] for c in order], color=colours[head], marker=".", label=head.upper())
        classes.set_xlabel("classes, the most frequent first")
        classes.set_ylabel("top-1 accuracy, %")
        images = classes.twinx()
        images.bar(range(len(order)), [found["counts"][c] for c in order], color=BEFORE, alpha=0.35)
        images.set_ylabel("training images")
        images.grid(visible=False)
        classes.set_zorder(images.get_zorder() + 1)
        classes.patch.set_visible(False)
        classes.legend(frameon=False)
        for token, values in found["rank"].items():
            ranks.plot(
                range(1, len(values) + 1), values, color=colours[token], marker=".", label=token.upper()
            )
        ranks.set_xlabel("block")
        ranks.set_ylabel("components of 99 % of the variance")
        if found["rank"]:
            ranks.legend(frameon=False)
        for block, values in enumerate(found["attention_distance"], 1):
            distances.plot([block] * len(values), values, "o", color=AFTER, alpha=0.6, markersize=4)
        if "not_looked_at" in found:
            for panel in (ranks, distances):
                panel.set_title("not for this kind of model", fontsize=9)
        distances.set_xlabel("block")
        distances.set_ylabel("attention distance of heads, pixels")
