"""Saliency of all matrices of a DeiT, against the loop a user would write, foreach and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Case, Peer
from pyvitfast import ops, reference


def block_shapes(embed: int, mlp: int) -> list[tuple[int, int]]:
    """The four matrices of a block: qkv, proj, fc1, fc2."""
    return [(3 * embed, embed), (embed, embed), (mlp, embed), (embed, mlp)]


def naive_block(block: list[tuple[Tensor, Tensor]], heads: int) -> list[Tensor]:
    """Per-unit sums of one block, structure by structure as the method reads, products made anew."""
    (qkv, dqkv), (proj, dproj), (fc1, dfc1), (fc2, dfc2) = block
    embed = proj.shape[0]
    dim = embed // heads
    sums = []
    for first in range(3):
        part = slice(first * embed, (first + 1) * embed)
        sums.append((qkv[part] * dqkv[part]).view(heads, dim, embed).sum((1, 2)))  # head rows
    for first in (0, 2):
        part = slice(first * embed, (first + 1) * embed)
        product = (qkv[part] * dqkv[part]).view(heads, dim, embed).permute(1, 0, 2).contiguous()
        sums.append(product.view(dim, -1).sum(1))  # QK, V dims of all heads
    sums.append((fc1 * dfc1).sum(1))
    for first in range(3):
        part = slice(first * embed, (first + 1) * embed)
        sums.append((qkv[part] * dqkv[part]).sum(0))  # readers of EMB
    sums += [(proj * dproj).sum(1), (fc1 * dfc1).sum(0), (fc2 * dfc2).sum(1)]
    return sums


def naive(blocks: list[list[tuple[Tensor, Tensor]]], heads: int, check: bool = True) -> list[list[Tensor]]:
    """The loop over blocks with its host-blocking check of each slice."""
    out = []
    for block in blocks:
        sums = naive_block(block, heads)
        if check:
            for value in sums:
                if not torch.isfinite(value).all().item():
                    value.zero_()
        out.append(sums)
    return out


def unit_sums(workspace: Tensor, embed: int, mlp: int, heads: int, depth: int) -> list[list[Tensor]]:
    """The same sums out of row and column sums: a few thousand additions."""
    dim = embed // heads
    out = []
    at = 0
    for _ in range(depth):
        parts = []
        for rows, cols in block_shapes(embed, mlp):
            parts.append((workspace[at : at + rows], workspace[at + rows : at + rows + cols]))
            at += rows + cols
        (qkv_rows, _), (proj_rows, _), (fc1_rows, fc1_cols), (fc2_rows, _) = parts
        by_head = qkv_rows.view(3, heads, dim)
        sums = [by_head[i].sum(1) for i in range(3)]
        sums += [by_head[0].sum(0), by_head[2].sum(0), fc1_rows, parts[0][1], proj_rows, fc1_cols, fc2_rows]
        out.append(sums)
    return out


def joined(blocks: list[list[Tensor]]) -> list[Tensor]:
    """Readers of q, k and v are separate in the naive loop and one column sum in ours."""
    return [torch.cat([*s[:6], s[6] + s[7] + s[8], *s[9:]]) if len(s) == 12 else torch.cat(s) for s in blocks]


def taylor(embed: int) -> Any:
    """Torch-Pruning's Taylor importance of all groups of the timm model; another quantity, |w g| summed."""
    import timm
    import torch_pruning as tp

    name = {768: "vit_base_patch16_224", 384: "vit_small_patch16_224", 192: "vit_tiny_patch16_224"}[embed]
    model = timm.create_model(name)
    image = torch.randn(1, 3, 224, 224)
    model(image).sum().backward()
    heads = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv")}
    pruner = tp.pruner.MetaPruner(
        model,
        image,
        importance=tp.importance.GroupTaylorImportance(),
        num_heads=heads,
        ignored_layers=[model.head],
    )
    groups = list(
        pruner.DG.get_all_groups(
            ignored_layers=[model.head], root_module_types=[torch.nn.Linear, torch.nn.Conv2d]
        )
    )
    score = tp.importance.GroupTaylorImportance()
    return lambda: [score(group) for group in groups]


def build(device: str, name: str, embed: int, mlp: int, heads: int, depth: int, dtype: torch.dtype) -> Case:
    """One model's matrices in one dtype."""
    shapes = block_shapes(embed, mlp) * depth
    weights = [torch.randn(s, device=device).to(dtype) for s in shapes]
    grads = [torch.randn(s, device=device).to(dtype) for s in shapes]
    blocks = [list(zip(weights[i : i + 4], grads[i : i + 4], strict=True)) for i in range(0, len(shapes), 4)]
    compiled = torch.compile(naive_block)

    def ours() -> list[Tensor]:
        return joined(unit_sums(ops.saliency_rowcol(weights, grads), embed, mlp, heads, depth))

    def eager() -> list[Tensor]:
        return joined(unit_sums(reference.saliency_rowcol(weights, grads), embed, mlp, heads, depth))

    def foreach() -> list[Tensor]:
        products = torch._foreach_mul(weights, grads)
        sums = torch.cat([s for p in products for s in (p.sum(1), p.sum(0))])
        return joined(unit_sums(sums, embed, mlp, heads, depth))

    def expected() -> list[Tensor]:
        exact = [s for w, g in zip(weights, grads, strict=True) for s in row_col(w.double() * g.double())]
        return joined(unit_sums(torch.cat(exact), embed, mlp, heads, depth))

    def row_col(product: Tensor) -> Iterator[Tensor]:
        yield product.sum(1)
        yield product.sum(0)

    peers = {
        "naive": Peer(lambda: joined(naive(blocks, heads))),
        "eager": Peer(eager),
        "compile": Peer(lambda: joined([compiled(block, heads) for block in blocks])),
        "foreach": Peer(foreach),
    }
    if dtype == torch.float32 and device == "cpu":
        prepared: list[Any] = []

        def torch_pruning() -> None:
            if not prepared:
                prepared.append(taylor(embed))
            prepared[0]()

        peers["torch_pruning_taylor"] = Peer(
            torch_pruning, same=False, note="another quantity; timed, no ratio"
        )
    elements = sum(o * i for o, i in shapes)
    edges = sum(o + i for o, i in shapes)
    return Case(
        op="saliency_rowcol",
        case=name,
        shape=f"{len(shapes)} matrices, {elements} weights",
        dtype=str(dtype).removeprefix("torch."),
        direction="forward",
        ours=ours,
        peers=peers,
        expected=expected,
        least_bytes=2 * elements * dtype.itemsize + 4 * edges,
        flops=3 * elements,
        tolerance=1e-5,
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    """DeiT-B and DeiT-Ti; only DeiT-Ti in the quick run."""
    models = [("deit_tiny", 192, 768, 3, 12)]
    if not quick:
        models.insert(0, ("deit_base", 768, 3072, 12, 12))
    for model in models:
        for dtype in (torch.float32, torch.bfloat16):
            yield build(device, *model, dtype)
