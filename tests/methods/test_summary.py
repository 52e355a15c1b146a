"""Counts against torch's FLOP counter and against the paper's integers."""

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import pyvitfast as vf
from pyvitfast.models import BlockDims, PrunedVisionTransformer, ViTConfig, ViTDims


def counted(model, size):
    """Half the FLOPs of one forward pass, attention as separate products."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, *size))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"distilled": True},
        {"reg_tokens": 3, "init_values": 0.1},
        {"global_pool": "avg", "class_token": False},
        {"pre_norm": True, "qkv_bias": False},
        {"num_classes": 0},
        {"no_embed_class": True, "pos_embed": "none"},
        {"final_norm": False},
    ],
)
def test_micro_models_agree_with_the_counter(change, micro):
    model = micro(**change)
    found = vf.summary(model)
    assert found.macs == counted(model, (1, 8, 8))
    assert found.params == sum(p.numel() for p in model.parameters()) == ViTConfig.from_model(model).params()


def test_pruned_model_agrees_with_the_counter():
    dims = ViTDims(24, (BlockDims(2, 4, 8, 20), BlockDims(3, 2, 6, 10)))
    model = PrunedVisionTransformer(
        dims, [0.3, 0.3], img_size=(8, 12), patch_size=2, in_chans=1, num_classes=10
    )
    found = vf.summary(model)
    # The counter also sees the zeros that make the two widths of a head equal.
    tokens = 4 * 6 + 1
    zeros = sum(tokens**2 * b.heads * (2 * max(b.qk_dim, b.v_dim) - b.qk_dim - b.v_dim) for b in dims.blocks)
    assert found.macs + zeros == counted(model, (1, 8, 12))
    assert found.params == sum(p.numel() for p in model.parameters())
    assert found.blocks == dims.blocks
    assert found.embed_dims == (24,)
    assert found.input_size == (1, 8, 12)


@pytest.mark.parametrize(
    ("size", "width", "heads", "params", "distilled_params"),
    [
        ("base", 768, 12, 86_567_656, 87_338_192),
        ("small", 384, 6, 22_050_664, 22_436_432),
        ("tiny", 192, 3, 5_717_416, 5_910_800),
    ],
)
def test_deit(size, width, heads, params, distilled_params):
    """MACs by the paper's accounting, 196 patches and 197 tokens; parameters as timm counts them."""
    with torch.device("meta"):
        plain = ViTConfig.from_model(timm.create_model(f"deit_{size}_patch16_224"))
        distilled = ViTConfig.from_model(timm.create_model(f"deit_{size}_distilled_patch16_224"))
    assert (plain.params(), distilled.params()) == (params, distilled_params)
    block = 197 * width * heads * 256 + 197**2 * heads * 128 + 8 * 197 * width**2
    assert plain.macs() == 196 * 768 * width + 1000 * width + 12 * block


def test_other_input_size(micro):
    model = micro(dynamic_img_size=True)
    assert vf.summary(model, (1, 12, 16)).macs == counted(model, (1, 12, 16)) > vf.summary(model).macs


def test_models_we_have_no_formula_for():
    model = timm.create_model("resnet10t", num_classes=3)
    found = vf.summary(model, (3, 64, 64))
    assert found.macs == counted(model, (3, 64, 64))
    assert found.blocks == ()
    assert "block" not in str(found)
    with pytest.raises(ValueError, match="`input_size` must be given"):
        vf.summary(torch.nn.Linear(2, 2))


def test_latency_and_text(micro):
    model = micro().train()
    found = vf.summary(model, latency=True, batch_size=2, repeats=3)
    assert 0 < found.latency < 10_000
    assert model.training
    text = str(found)
    assert "114,778" in text
    assert "1,994,592" in text
    assert "batch 2" in text
    assert vf.summary(model).latency is None
    with pytest.raises(ValueError, match="at least 1"):
        vf.summary(model, batch_size=0)
    with pytest.raises(ValueError, match="channels, height, width"):
        vf.summary(model, (8, 8))
