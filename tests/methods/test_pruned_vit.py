"""The pruned Vision Transformer against timm's."""

import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from pyvitfast.models import (
    BlockDims,
    PrunedVisionTransformer,
    PrunedVisionTransformerDistilled,
    ViTConfig,
    ViTDims,
)

VARIANTS = {
    "plain": {},
    "distilled": {"distilled": True},
    "registers": {"reg_tokens": 3, "no_embed_class": True},
    "layer scale": {"init_values": 0.1},
    "average pool, fc_norm": {"global_pool": "avg", "class_token": False},
    "average pool with class token": {"global_pool": "avg"},
    "pre-norm": {"pre_norm": True},
    "no pos embed": {"pos_embed": "none"},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "no classifier": {"num_classes": 0},
    "dynamic size": {"dynamic_img_size": True},
    "odd mlp": {"mlp_ratio": 3.3},
    "other layers": {"act_layer": "quick_gelu", "norm_layer": torch.nn.LayerNorm},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_same_widths_load_timm_weights_and_give_timm_outputs(name, micro, batch):
    dense = micro(**VARIANTS[name]).eval()
    config = ViTConfig.from_model(dense)
    ours = config.prune(config.dims).build().eval()
    assert ours.load_state_dict(dense.state_dict()).missing_keys == []
    x = batch()[0]
    torch.testing.assert_close(ours(x), dense(x))
    torch.testing.assert_close(ours.forward_features(x), dense.forward_features(x))


@pytest.mark.parametrize("name", VARIANTS)
def test_config_rebuilds_the_model_it_was_read_from(name, micro):
    dense = micro(**VARIANTS[name])
    config = ViTConfig.from_model(dense)
    again = config.build()
    assert type(again) is type(dense)
    assert ViTConfig.from_model(again) == config
    assert ViTConfig.from_dict(config.to_dict()) == config
    assert {n: p.shape for n, p in again.named_parameters()} == {
        n: p.shape for n, p in dense.named_parameters()
    }


def test_explicit_scale_and_unequal_widths():
    """One block by hand: softmax(s q k^T) v with QK = 3, V = 5, without SDPA."""
    torch.manual_seed(0)
    dims = ViTDims(16, (BlockDims(2, 3, 5, 7),))
    model = PrunedVisionTransformer(
        dims, [0.37], img_size=8, patch_size=4, in_chans=1, num_classes=3
    ).double()
    attn = model.blocks[0].attn
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    qkv = x @ attn.qkv.weight.T + attn.qkv.bias
    outs = []
    for h in range(2):
        q, k = qkv[..., 3 * h : 3 * h + 3], qkv[..., 6 + 3 * h : 9 + 3 * h]
        v = qkv[..., 12 + 5 * h : 17 + 5 * h]
        outs.append((0.37 * q @ k.transpose(1, 2)).softmax(-1) @ v)
    expected = torch.cat(outs, -1) @ attn.proj.weight.T + attn.proj.bias
    torch.testing.assert_close(attn(x), expected)
    assert model(torch.randn(2, 1, 8, 8, dtype=torch.float64)).shape == (2, 3)


def small(distilled=False, **kwargs):
    torch.manual_seed(0)
    dims = ViTDims(24, (BlockDims(2, 4, 8, 20), BlockDims(3, 2, 6, 10)))
    kind = PrunedVisionTransformerDistilled if distilled else PrunedVisionTransformer
    return kind(dims, [0.3, 0.3], img_size=8, patch_size=2, in_chans=1, num_classes=10, **kwargs)


def test_timm_conventions():
    model = small()
    assert isinstance(model, VisionTransformer)
    assert model.get_classifier() is model.head
    assert model.no_weight_decay() >= {"pos_embed", "cls_token"}
    features = model.forward_features(torch.randn(2, 1, 8, 8))
    assert features.shape == (2, 17, 24)
    assert model.forward_head(features, pre_logits=True).shape == (2, 24)
    model.reset_classifier(3)
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 3)
    assert model.forward_intermediates(torch.randn(2, 1, 8, 8))[1][0].shape == (2, 24, 4, 4)


def test_distilled_conventions():
    model = small(distilled=True)
    assert isinstance(model, VisionTransformerDistilled)
    model.set_distilled_training(True)
    x = torch.randn(2, 1, 8, 8)
    pair = model.train()(x)
    assert isinstance(pair, tuple)
    torch.testing.assert_close(model.eval()(x), (pair[0] + pair[1]) / 2)


@pytest.mark.parametrize("distilled", [False, True])
def test_compiles_without_graph_breaks(distilled):
    model = small(distilled).eval()
    x = torch.randn(2, 1, 8, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("eva02_tiny_patch14_224", "Eva"),
        ("swin_tiny_patch4_window7_224", "SwinTransformer"),
        ("resnet18", "ResNet"),
        ("vit_tiny_r_s16_p8_224", "HybridEmbed"),
    ],
)
def test_unsupported_models_are_refused_by_name(name, part):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises((TypeError, NotImplementedError), match=part):
        ViTConfig.from_model(model)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"qk_norm": True}, "q_norm"),
        ({"scale_attn_norm": True}, r"attn\.norm"),
        ({"scale_mlp_norm": True}, r"blocks\.0\.mlp"),
        ({"mlp_layer": timm.layers.SwiGLU}, "SwiGLU"),
        ({"block_fn": timm.models.vision_transformer.ParallelScalingBlock}, "ParallelScalingBlock"),
        ({"block_fn": timm.models.vision_transformer.ResPostBlock, "init_values": 0.1}, "ResPostBlock"),
        ({"global_pool": "map"}, "attn_pool"),
        ({"norm_layer": "rmsnorm"}, "RmsNorm"),
        ({"attn_layer": "diff"}, "DiffAttention"),
    ],
)
def test_unsupported_parts_are_refused_by_name(change, part, micro):
    with pytest.raises(NotImplementedError, match=part):
        ViTConfig.from_model(micro(**change))


def test_gated_attention_is_refused(micro):
    model = micro()
    model.blocks[2].attn = timm.layers.Attention(48, 4, qkv_bias=True, gated=True)
    with pytest.raises(NotImplementedError, match=r"blocks\.2\.attn\.gate: must be None"):
        ViTConfig.from_model(model)


def test_added_parameters_are_refused(micro):
    model = micro()
    model.blocks[1].adapter = torch.nn.Linear(2, 2)
    with pytest.raises(NotImplementedError, match="added modules"):
        ViTConfig.from_model(model)
