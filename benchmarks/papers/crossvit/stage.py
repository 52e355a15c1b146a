"""The fusion stage of one encoder: f, both cross-attentions with their LayerNorm, g, and new class tokens.

Both sides run their whole multi-scale encoder, whose blocks hand their input through, so that the stage is
all that is timed. In inference ours stores the class tokens into the tensor that the last block made, so each
call of each side gets tokens that were written anew; that copy is made before the clock starts.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import timm
import torch
from rich.console import Console
from rich.progress import Progress
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from benchmarks import run as tables
from benchmarks.measure import Case, Limits, Peer, directed, measure
from pyvitfast.models import accelerate


@contextmanager
def empty_blocks() -> Iterator[None]:
    """Transformer blocks that return their input; in the class, as a changed module would not be timm's."""
    with patch.object(Block, "forward", lambda self, x, *rest: x):
        yield


def perturb(model: nn.Module) -> nn.Module:
    """Biases and norms away from 0 and 1, where errors would hide."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def stage_of(model: nn.Module) -> nn.Module:
    """The first encoder, with a single block in each branch."""
    encoder = model.blocks[0]
    encoder.blocks = nn.ModuleList(nn.Sequential(branch[0]) for branch in encoder.blocks)
    return encoder


def build(name: str, batch: int, direction: str) -> Case:
    """One model's stage: inference, or the forward pass with the gradients of tokens and parameters."""
    torch.manual_seed(0)
    model = perturb(timm.create_model(name)).eval()
    changed = copy.deepcopy(model)
    accelerate(changed)
    theirs, ours = stage_of(model), stage_of(changed)
    sizes = [position.shape[1:] for position in (model.pos_embed_0, model.pos_embed_1)]
    tokens = [torch.randn(batch, *size) for size in sizes]
    gradients = [torch.randn_like(t) for t in tokens]
    needs_grad = direction != "forward"
    given = [t.clone().requires_grad_(needs_grad) for t in tokens]

    def refill() -> None:
        if not needs_grad:
            for t, source in zip(given, tokens):
                t.copy_(source)

    def parameters(encoder: nn.Module) -> dict[str, nn.Parameter]:
        return {n: p for n, p in encoder.named_parameters() if not n.startswith("blocks.")}

    names = list(parameters(theirs))

    def candidate(encoder: nn.Module, call: Any, inputs: list[Tensor], outer: list[Tensor]) -> Any:
        run = directed(lambda: call(inputs), [*inputs, *parameters(encoder).values()], outer, direction)

        def compared() -> Any:
            found = run()
            if not needs_grad:
                return found
            # The key bias has no influence: its gradient is zero or rounding noise.
            after = zip(names, found[2:])
            return [*found[:2], *(g for n, g in after if not n.endswith("attn.wk.bias"))]

        return compared

    def expected() -> list[Tensor]:
        exact = copy.deepcopy(theirs).double()
        inputs = [t.double().requires_grad_(needs_grad) for t in tokens]
        return list(candidate(exact, exact, inputs, [g.double() for g in gradients])())

    heads = [fusion.attn.num_heads for fusion in theirs.fusion]
    small, large = sizes
    passes = 3 if needs_grad else 1
    weights = sum(p.numel() for p in parameters(theirs).values())
    macs = 4 * small[1] * large[1]  # f and g of both directions
    for (rows, channels), count in zip((large, small), heads):
        macs += 2 * rows * channels * count + 4 * channels**2
    return Case(
        op="fusion stage",
        case=f"{name} batch {batch}",
        shape=" and ".join(f"[{batch}, {rows}, {channels}]" for rows, channels in sizes),
        dtype="float32",
        direction=direction,
        ours=candidate(ours, ours, given, gradients),
        peers={
            "eager": Peer(candidate(theirs, theirs, given, gradients)),
            "compile": Peer(candidate(theirs, torch.compile(theirs, dynamic=False), given, gradients)),
        },
        expected=expected,
        least_bytes=4 * passes * (sum(t.numel() for t in tokens) + weights),
        flops=2 * passes * batch * macs,
        tolerance=1e-4,
        before=refill,
        forwards={"ours": lambda: ours(given), "eager": lambda: theirs(given)} if needs_grad else {},
        given=[*given, *parameters(theirs).values(), *parameters(ours).values()],
    )


def run(
    names: tuple[str, ...],
    batches: tuple[int, ...],
    options: argparse.Namespace,
    limits: Limits,
    progress: Progress,
    failed: list[str],
) -> list[dict[str, Any]]:
    """A row for each model, direction and batch."""
    rows = []
    plan = [(n, d, b) for n in names for d in ("forward", "both") for b in batches]
    for name, direction, batch in progress.track(plan, description="fusion stage"):
        with empty_blocks():
            case = build(name, batch, direction)
            try:
                rows.append(measure(case, "cpu", options.threads, limits, 1.0 if options.quick else 10.0))
            except AssertionError as wrong:
                failed.append(str(wrong))
        torch._dynamo.reset()
    return rows


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Against timm's own stage at batch 32: how much faster, and how much less is kept for backward."""
    found = []
    for row in rows:
        if not row["case"].endswith("batch 32"):
            continue
        goals = [("ratio_eager", "times as fast as timm's", 12.0 if row["direction"] == "forward" else 5.0)]
        if row["direction"] == "both":
            goals.append(("saved_ratio", "times fewer bytes kept for backward than timm's", 10.0))
        for key, what, least in goals:
            text = f"fusion stage of {row['case']}, {row['direction']}: at least {least:g} {what}"
            value = row[key]
            held = value is not None and value >= least
            found.append({"claim": text, "margin": least, "measured": value, "held": held})
    return found


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    console.print("\nFusion stage of one encoder; eager is timm's")
    tables.show(console, rows)
