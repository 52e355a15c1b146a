"""The attention of a layer that generates semantic tokens: LayerNorm, projections, softmax, output layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor

from benchmarks.measure import Case, Peer, directed
from pyvitfast import ops, reference
from pyvitfast.ops.semantic_pool_attention import absorbed_macs, plain_macs

Form = Callable[[Block, Tensor, Tensor], Tensor]


def _heads(block: Block, query: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    attn = block.attn
    channels = query.shape[2]
    weight, bias = attn.qkv.weight, attn.qkv.bias
    q = F.linear(block.norm1(query), weight[:channels], bias[:channels])
    kv = F.linear(block.norm1(tokens), weight[channels:], bias[channels:])
    k, v = kv.unflatten(2, (2, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    return q.unflatten(2, (attn.num_heads, attn.head_dim)).transpose(1, 2), k, v


def eager(block: Block, query: Tensor, tokens: Tensor) -> Tensor:
    """As a user writes it from a timm block."""
    q, k, v = _heads(block, query, tokens)
    weights = (q * block.attn.scale @ k.transpose(2, 3)).softmax(-1)
    mixed: Tensor = block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
    return mixed


def with_sdpa(block: Block, query: Tensor, tokens: Tensor) -> Tensor:
    """The same around the built-in attention."""
    q, k, v = _heads(block, query, tokens)
    mixed = F.scaled_dot_product_attention(q, k, v, scale=block.attn.scale)
    out: Tensor = block.attn.proj(mixed.transpose(1, 2).flatten(2))
    return out


def absorbed(block: Block, query: Tensor, tokens: Tensor) -> Tensor:
    """Keys and values moved to the queries' side, in torch's products."""
    attn, channels = block.attn, query.shape[2]
    q_weight, k_weight, v_weight = (w.view(attn.num_heads, -1, channels) for w in attn.qkv.weight.chunk(3))
    q_bias, _, v_bias = attn.qkv.bias.view(3, attn.num_heads, -1)
    x = block.norm1(tokens)
    q = torch.einsum("bmc,hdc->bhmd", block.norm1(query), q_weight) + q_bias.unsqueeze(1)
    u = (attn.scale * q @ k_weight).flatten(1, 2)  # [B, H M, C]
    z = (u @ x.transpose(1, 2)).softmax(-1) @ x
    o = z.unflatten(1, (attn.num_heads, -1)) @ v_weight.transpose(1, 2) + v_bias.unsqueeze(1)
    out: Tensor = attn.proj(o.transpose(1, 2).flatten(2))
    return out


PEERS: dict[str, Form] = {"eager": eager, "sdpa": with_sdpa, "absorbed": absorbed}


def ours(block: Block, query: Tensor, tokens: Tensor, op: Any = ops.semantic_pool_attention) -> Tensor:
    q, k, v = block.attn.qkv.weight.chunk(3)
    q_bias, k_bias, v_bias = block.attn.qkv.bias.chunk(3)
    out: Tensor = op(
        query,
        tokens,
        q,
        k,
        v,
        block.attn.proj.weight,
        num_heads=block.attn.num_heads,
        q_bias=q_bias,
        k_bias=k_bias,
        v_bias=v_bias,
        proj_bias=block.attn.proj.bias,
        norm_weight=block.norm1.weight,
        norm_bias=block.norm1.bias,
        eps=block.norm1.eps,
    )
    return out


def case(device: str, name: str, batch: int, channels: int, queries: int, rows: int, direction: str) -> Case:
    """One model width, numbers of queries and tokens, batch and direction."""
    torch.manual_seed(0)
    heads = max(1, channels // 64)
    block = Block(channels, heads, qkv_bias=True).to(device)
    for p in block.parameters():
        p.data.add_(0.02 * torch.randn_like(p))
    gradient = direction != "forward"
    query = torch.randn(batch, queries, channels, device=device, requires_grad=gradient)
    tokens = torch.randn(batch, rows, channels, device=device, requires_grad=gradient)
    upstream = torch.randn(batch, queries, channels, device=device)
    parameters = [block.attn.qkv.weight, block.attn.proj.weight, block.norm1.weight]
    leaves = [query, tokens, *parameters]
    compiled = torch.compile(lambda q, t: eager(block, q, t), dynamic=False)

    def candidate(form: Callable[[], Tensor]) -> Callable[[], Any]:
        return directed(form, leaves, [upstream], direction)

    def expected() -> Any:
        wide = Block(channels, heads, qkv_bias=True).double().to(device)
        wide.load_state_dict(block.state_dict())
        inputs = [t.detach().double().requires_grad_(gradient) for t in (query, tokens)]
        mine = [*inputs, wide.attn.qkv.weight, wide.attn.proj.weight, wide.norm1.weight]
        return directed(
            lambda: ours(wide, *inputs, op=reference.semantic_pool_attention),
            mine,
            [upstream.double()],
            direction,
        )()

    macs = min(absorbed_macs(queries, rows, channels, heads), plain_macs(queries, rows, channels))
    passes = {"forward": 1, "backward": 2, "both": 3}[direction]
    size = batch * channels * (rows + 2 * queries) + 4 * channels**2
    return Case(
        op="semantic_pool_attention",
        case=f"{name} batch {batch}",
        shape=f"{queries} of [{batch}, {rows}, {channels}], {heads} heads",
        dtype="float32",
        direction=direction,
        ours=candidate(lambda: ours(block, query, tokens)),
        peers={
            **{n: Peer(candidate(lambda form=form: form(block, query, tokens))) for n, form in PEERS.items()},
            "compile": Peer(candidate(lambda: compiled(query, tokens))),
        },
        expected=expected,
        least_bytes=4 * size * passes,
        flops=2 * batch * macs * passes,
        tolerance=1e-5 if direction == "forward" else 1e-4,
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    """DeiT-S and -B over 196 tokens, and 4096 tokens."""
    if quick:
        yield case(device, "tiny/4/49", 2, 128, 4, 49, "forward")
        yield case(device, "tiny/4/49", 2, 128, 4, 49, "both")
        return
    for batch in (1, 32):
        yield case(device, "S/16/196", batch, 384, 16, 196, "forward")
    for queries in (36, 64, 100):
        yield case(device, f"S/{queries}/196", 32, 384, queries, 196, "forward")
    yield case(device, "B/16/196", 32, 768, 16, 196, "forward")
    yield case(device, "S/16/4096", 4, 384, 16, 4096, "forward")
    yield case(device, "S/16/196", 32, 384, 16, 196, "both")
    yield case(device, "S/16/4096", 4, 384, 16, 4096, "both")
