"""CrossViT's cross-attention with one query, against timm's module, SDPA and the folded algebra in torch.

Shapes are (N, C, heads) with the CLS row in N. Inputs are normalised rows, except where the LayerNorm is
timed too: there the query is a tensor of its own, as in the model, and peers concatenate and normalise first.
With gradients our query and tokens are leaves of their own over the same memory, and peers have one leaf:
each gets the form that costs it least. The gradient of the key bias is asked for but not compared: it is
zero, and eager's is rounding noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.crossvit import CrossAttention
from torch import Tensor, nn

from benchmarks.measure import Case, Peer, directed
from pyvitfast import ops, reference


class Shape(NamedTuple):
    """Rows with the CLS row, channels, heads."""

    name: str
    rows: int
    channels: int
    heads: int


SHAPES = (
    Shape("15-L", 197, 384, 6),
    Shape("15-S", 401, 192, 6),
    Shape("18-L", 197, 448, 7),
    Shape("18-S", 401, 224, 7),
)
SCALING = (49, 197, 401, 785, 1577, 4096)
# Rounding of the result is at most half of a unit in the last place, 2^-9; the rest is the sum's.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}


def build_module(shape: Shape, dtype: torch.dtype, device: str) -> CrossAttention:
    """timm's module with random weights, biases too: zeros would hide errors."""
    module = CrossAttention(shape.channels, shape.heads, qkv_bias=True)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(std=0.1 if name.endswith("bias") else shape.channels**-0.5)
    return module.to(device, dtype)


def build_norm(channels: int, dtype: torch.dtype, device: str) -> nn.LayerNorm:
    norm = nn.LayerNorm(channels, eps=1e-6)
    with torch.no_grad():
        norm.weight.normal_(1.0, 0.1)
        norm.bias.normal_(0.0, 0.1)
    return norm.to(device, dtype)


def with_sdpa(module: CrossAttention, x: Tensor) -> Tensor:
    """The same matrix products around the built-in attention."""
    batch, rows, channels = x.shape
    heads = module.num_heads
    q = module.wq(x[:, :1]).view(batch, 1, heads, -1).transpose(1, 2)
    k = module.wk(x).view(batch, rows, heads, -1).transpose(1, 2)
    v = module.wv(x).view(batch, rows, heads, -1).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, scale=module.scale)
    return module.proj(out.transpose(1, 2).reshape(batch, channels))


def heads_first(u: Tensor, x: Tensor) -> Tensor:
    """Scores as [B, H, N]."""
    return torch.bmm(torch.bmm(u, x.transpose(1, 2)).softmax(2), x)


def tokens_first(u: Tensor, x: Tensor) -> Tensor:
    """Scores as [B, N, H]."""
    return torch.bmm(torch.bmm(x, u.transpose(1, 2)).softmax(1).transpose(1, 2), x)


def one_wide_head(u: Tensor, x: Tensor) -> Tensor:
    """Attention with H queries and one head as wide as the tokens, which are keys and values."""
    x = x.unsqueeze(1)
    return F.scaled_dot_product_attention(u.unsqueeze(1), x, x, scale=1.0).squeeze(1)


def folded(core: Callable[[Tensor, Tensor], Tensor], module: CrossAttention, x: Tensor) -> Tensor:
    """The key projection moved to the query and the value projection behind the sum: no keys, no values."""
    batch, _, channels = x.shape
    heads = module.num_heads
    k_weight = module.wk.weight.view(heads, -1, channels)
    v_weight = module.wv.weight.view(heads, -1, channels)
    q = module.wq(x[:, 0]).view(batch, heads, -1).transpose(0, 1)  # [H, B, D]
    u = torch.bmm(q, k_weight).transpose(0, 1) * module.scale  # [B, H, C]
    c = core(u, x)  # [B, H, C]
    o = torch.bmm(c.transpose(0, 1), v_weight.transpose(1, 2)).transpose(0, 1)  # [B, H, D]
    return module.proj(o.reshape(batch, channels) + module.wv.bias)


def eager(module: CrossAttention, x: Tensor) -> Tensor:
    return module(x)[:, 0]


PEERS: dict[str, Callable[[CrossAttention, Tensor], Tensor]] = {
    "eager": eager,
    "sdpa": with_sdpa,
    "fold_bmm_heads_first": lambda module, x: folded(heads_first, module, x),
    "fold_bmm_tokens_first": lambda module, x: folded(tokens_first, module, x),
    "fold_sdpa": lambda module, x: folded(one_wide_head, module, x),
}


def build(
    device: str,
    shape: Shape,
    batch: int,
    direction: str = "forward",
    dtype: torch.dtype = torch.float32,
    norm: bool = False,
    peers: tuple[str, ...] = (*PEERS, "compile"),
    name: str = "",
) -> Case:
    """One shape, batch, direction and dtype; with ``norm`` the LayerNorm and the concatenation are timed."""
    torch.manual_seed(0)
    rows, channels, heads = shape[1:]
    module = build_module(shape, dtype, device)
    layer_norm = build_norm(channels, dtype, device) if norm else None
    memory = torch.randn(batch, rows, channels, device=device).to(dtype)
    if norm:
        # The branch's own CLS stays in memory, unread: the query takes its place.
        query, tokens = torch.randn(batch, channels, device=device).to(dtype), memory[:, 1:]
    else:
        memory = F.layer_norm(memory, (channels,))
        query, tokens = memory[:, 0], memory[:, 1:]
    linears = (module.wq, module.wk, module.wv, module.proj)
    weights = [linear.weight for linear in linears] + [linear.bias for linear in linears]
    weights += [layer_norm.weight, layer_norm.bias] if layer_norm is not None else []
    compared = [i for i, weight in enumerate(weights) if weight is not module.wk.bias]
    needs_grad = direction != "forward"
    ours_given = [t.detach().requires_grad_(needs_grad) for t in (query, tokens)]
    peer_given = ours_given if norm else [memory.detach().requires_grad_(needs_grad)]
    gradient = torch.randn(batch, channels, device=device).to(dtype)

    def rows_of(given: list[Tensor]) -> Tensor:
        if layer_norm is None:
            return given[0]
        return layer_norm(torch.cat((given[0].unsqueeze(1), given[1]), dim=1))

    def call(op: Callable[..., Tensor], query: Tensor, tokens: Tensor, *weights: Tensor) -> Tensor:
        named = dict(
            zip(("q_bias", "k_bias", "v_bias", "proj_bias", "norm_weight", "norm_bias"), weights[4:])
        )
        return op(query, tokens, *weights[:4], num_heads=heads, eps=1e-6, **named)

    def arranged(found: Any) -> Any:
        """Gradients as (query, tokens, weights...), whatever the leaves were."""
        if direction == "forward":
            return found
        activations = found[: len(found) - len(weights)]
        if len(activations) == 1:
            activations = (activations[0][:, 0], activations[0][:, 1:])
        after = found[len(found) - len(weights) :]
        return [*activations, *(after[i] for i in compared)]

    def candidate(function: Callable[[], Tensor], given: list[Tensor]) -> Callable[[], Any]:
        run = directed(function, [*given, *weights], [gradient], direction)
        return lambda: arranged(run())

    def expected() -> Any:
        inputs = [t.detach().double().requires_grad_(needs_grad) for t in (*ours_given, *weights)]
        run = directed(
            lambda: call(reference.linear_cross_attention, *inputs), inputs, [gradient.double()], direction
        )
        return arranged(run())

    def our_forward() -> Tensor:
        return call(ops.linear_cross_attention, *ours_given, *weights)

    forwards: dict[str, Callable[[], Tensor]] = {}
    for peer in peers:
        if peer != "compile":
            forwards[peer] = lambda form=PEERS[peer]: form(module, rows_of(peer_given))
    if "compile" in peers:
        compiled = torch.compile(lambda given: eager(module, rows_of(given)), dynamic=False)
        forwards["compile"] = lambda: compiled(peer_given)
    # A pass reads the tokens, the backward pass reads them again and writes as many gradients.
    passes = {"forward": 1, "backward": 2, "both": 3}[direction]
    size = batch * rows * channels + sum(weight.numel() for weight in weights) + batch * channels
    macs = batch * (2 * rows * channels * heads + 4 * channels**2)
    return Case(
        op="linear_cross_attention",
        case=name or f"{shape.name}{' with LayerNorm' if norm else ''} batch {batch}",
        shape=f"[{batch}, {rows}, {channels}], {heads} heads",
        dtype=str(dtype).removeprefix("torch."),
        direction=direction,
        ours=candidate(our_forward, ours_given),
        peers={peer: Peer(candidate(forward, peer_given)) for peer, forward in forwards.items()},
        expected=expected,
        least_bytes=passes * size * dtype.itemsize,
        flops=2 * passes * macs,
        tolerance=TOLERANCE[dtype] * (10 if needs_grad else 1),
        forwards={"ours": our_forward, "eager": forwards["eager"]} if needs_grad else {},
        given=[*ours_given, *peer_given, *weights],
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    """The four modules of CrossViT-15 and -18; then gradients, LayerNorm, bfloat16, and ever more tokens."""
    shapes = (SHAPES[0], SHAPES[3]) if quick else SHAPES
    batches = (1, 4) if quick else (1, 32, 128)
    middle = batches[1]
    for direction in ("forward", "both"):
        for shape in shapes:
            for batch in batches:
                yield build(device, shape, batch, direction)
    for shape in shapes:
        yield build(device, shape, middle, "backward")
    for direction in ("forward", "both"):
        for shape in shapes:
            yield build(device, shape, middle, direction, norm=True)
    for shape in shapes:
        yield build(device, shape, middle, dtype=torch.bfloat16)
    for batch in batches[:1] if quick else (1, 8):
        for rows in SCALING[:3] if quick else SCALING:
            shape = Shape("scaling", rows, 384, 6)
            name = f"{rows} tokens batch {batch}"
            yield build(device, shape, batch, peers=("eager", "fold_sdpa"), name=name)
