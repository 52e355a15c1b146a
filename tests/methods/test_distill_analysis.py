"""Analyses of the two tokens against direct computations."""

import math

import pytest
import timm
import torch
from torch import nn

from pyvitfast.distill import attention_distance, attention_rollout, expert_diversity, feature_rank
from pyvitfast.models.vision_transformer import two_width_attention
from pyvitfast.tokens import to_stvit
from tests.methods.conftest import pruned


def recorded_maps(model, images):
    """Attention of each block from timm's unfused path."""
    maps = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(lambda _m, args: maps.append(args[0].detach()))
    model(images)
    for block in model.blocks:
        block.attn.fused_attn = True
        block.attn.attn_drop._forward_pre_hooks.clear()
    return maps


def recorded_pruned(model, images):
    """Attention of each block of a pruned model: what an identity in place of its values comes out as."""
    maps = []
    inputs = []
    hooks = [b.attn.register_forward_pre_hook(lambda _m, a: inputs.append(a[0])) for b in model.blocks]
    model(images)
    for hook in hooks:
        hook.remove()
    for block, x in zip(model.blocks, inputs, strict=True):
        q, k, _ = (
            part.view(len(x), x.shape[1], block.attn.num_heads, -1).transpose(1, 2)
            for part in block.attn.qkv(x).split(block.attn.splits, dim=-1)
        )
        values = torch.eye(x.shape[1]).expand(*q.shape[:2], -1, -1)
        maps.append(two_width_attention(q, k, values, block.attn.scale, None, 0.0, False).detach())
    return maps


def test_diversity(micro, batch):
    images, _ = batch()
    model = micro(distilled=True).train()
    found = expert_diversity(model, images)
    assert model.training
    tokens = model.eval().forward_features(images).detach().double()
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(tokens[:, 0], tokens[:, 1])]
    assert found == pytest.approx(1 - sum(cosines) / len(cosines), abs=1e-6)


def test_feature_rank(micro):
    model = micro(distilled=True).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(90, 1, 8, 8, generator=generator)
    outputs = []
    hooks = [b.register_forward_hook(lambda _m, _a, out: outputs.append(out)) for b in model.blocks]
    model(images)
    for hook in hooks:
        hook.remove()
    for threshold in (0.9, 0.99):
        found = feature_rank(model, [(part, None) for part in images.split(40)], threshold)
        for name, token in (("cls", 0), ("dist", 1)):
            expected = []
            for out in outputs:
                x = out[:, token].detach().double()
                s = torch.linalg.svdvals(x - x.mean(0)) ** 2
                expected.append(int((s.cumsum(0) / s.sum() < threshold).sum()) + 1)
            assert getattr(found, name) == expected
    assert all(not b._forward_hooks for b in model.blocks)


def test_feature_rank_of_known_features(micro):
    """Blocks that add a token of rank 3 with a mean of 1000 to the class token, and nothing to the other."""

    class Rank(nn.Module):
        def forward(self, x):
            basis = torch.eye(48)[:3] * 5
            added = torch.randn(len(x), 3, generator=torch.Generator().manual_seed(len(x))) @ basis + 1000
            out = torch.zeros_like(x)
            out[:, 0] = added
            return out

    model = micro(distilled=True)
    model.blocks = nn.Sequential(Rank())
    found = feature_rank(model, [torch.zeros(20, 1, 8, 8), torch.zeros(31, 1, 8, 8)], 0.9999)
    assert found.cls == [3] and found.dist == [0]


def test_attention_distance(micro, batch):
    images, _ = batch()
    model = micro(distilled=True).eval()
    expected = torch.zeros(4, 4, dtype=torch.float64)
    places = [(2 * r, 2 * c) for r in range(4) for c in range(4)]
    for b, attention in enumerate(recorded_maps(model, images)):
        patches = attention[:, :, 2:, 2:].double()
        patches = patches / patches.sum(-1, keepdim=True)
        for i, p in enumerate(places):
            for j, q in enumerate(places):
                expected[b] += patches[:, :, i, j].mean(0) * math.dist(p, q) / len(places)
    found = attention_distance(model, images)
    assert found.shape == (4, 4)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_uniform_attention_looks_as_far_as_patches_are_apart(micro, batch):
    images, _ = batch()
    model = micro()
    for block in model.blocks:
        nn.init.zeros_(block.attn.qkv.weight), nn.init.zeros_(block.attn.qkv.bias)
    places = [(2 * r, 2 * c) for r in range(4) for c in range(4)]
    mean = sum(math.dist(p, q) for p in places for q in places) / 256
    torch.testing.assert_close(attention_distance(model, images), torch.full((4, 4), mean))


def test_rollout(micro, batch):
    images, _ = batch()
    model = micro(distilled=True).eval()
    flow = torch.eye(18, dtype=torch.float64)
    for attention in recorded_maps(model, images):
        flow = (0.5 * attention.double().mean(1) + 0.5 * torch.eye(18)) @ flow
    found = attention_rollout(model, images)
    assert found.shape == (8, 2, 4, 4)
    torch.testing.assert_close(found.double(), flow[:, :2, 2:].reshape(8, 2, 4, 4), rtol=1e-5, atol=1e-7)


def test_pruned_models_are_read_too(micro, batch):
    images, _ = batch()
    slim = pruned(micro(distilled=True), 0.5).compact()
    rollout = attention_rollout(slim, images)
    assert rollout.shape == (8, 2, 4, 4) and (rollout >= 0).all()
    heads = [block.attn.num_heads for block in slim.blocks]
    assert len(set(heads)) > 1
    found = attention_distance(slim, images)
    assert found.shape == (4, max(heads)) and found.isfinite().sum(1).tolist() == heads
    for row, attention in zip(found, recorded_pruned(slim, images), strict=True):
        grid = [(2 * r, 2 * c) for r in range(4) for c in range(4)]
        distances = torch.tensor([[math.dist(p, q) for q in grid] for p in grid])
        patches = attention[..., 2:, 2:]
        expected = (patches / patches.sum(-1, keepdim=True) * distances).sum(-1).mean((0, 2))
        torch.testing.assert_close(row[: len(expected)], expected)


def test_bad_calls(micro, batch):
    images, _ = batch()
    with pytest.raises(TypeError, match="2 or more tokens before its patches, got VisionTransformer with 1"):
        expert_diversity(micro(), images)
    with pytest.raises(TypeError, match="got Linear with 0"):
        attention_distance(nn.Linear(2, 2), images)
    with pytest.raises(ValueError, match="`threshold` must be above 0 and up to 1, got 0"):
        feature_rank(micro(distilled=True), [images], 0)
    with pytest.raises(ValueError, match="at least one batch"):
        feature_rank(micro(distilled=True), [])


def test_modes_of_modules_are_kept(micro, batch):
    images, _ = batch()
    model = micro(distilled=True).train()
    model.blocks[1].eval()
    before = [module.training for module in model.modules()]
    expert_diversity(model, images)
    attention_distance(model, images)
    assert [module.training for module in model.modules()] == before


def test_what_cannot_be_read_is_refused(micro):
    images = torch.zeros(2, 3, 28, 28)
    registers = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=28, depth=1)
    with pytest.raises(TypeError, match="must have a distillation token, got VisionTransformer"):
        expert_diversity(registers, images)
    with pytest.raises(TypeError, match="must have a distillation token"):
        feature_rank(registers, [images])
    assert attention_distance(registers, images).shape == (1, 6)
    rotary = timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=1)
    with pytest.raises(TypeError, match="plain attention in each block, got EvaAttention"):
        attention_distance(rotary, images)
    relative = timm.create_model("vit_relpos_small_patch16_224", img_size=32, depth=1)
    with pytest.raises(TypeError, match="plain attention in each block, got RelPosAttention"):
        attention_distance(relative, torch.zeros(2, 3, 32, 32))
    tokens = to_stvit(micro(distilled=True), tokens=(2, 2))
    small = torch.zeros(2, 1, 8, 8)
    for read in (attention_distance, attention_rollout, lambda model, images: feature_rank(model, [images])):
        with pytest.raises(TypeError, match="got STViTDistilled, which runs 2 of them so"):
            read(tokens, small)
