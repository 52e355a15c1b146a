"""STViT-Swin and STViT-R-Swin: counts of the paper, windows against whole maps, images of any size."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import nn
from torch.nn import functional as F

import pyvitfast as vf
from pyvitfast.models.stvit_swin import (
    Reach,
    SemanticBlock,
    STViTSwin,
    WindowTokensConfig,
    centred,
    from_windows,
    pool_windows,
    to_windows,
)
from pyvitfast.models.stvit_swin_config import STViTSwinConfig
from pyvitfast.prune import NViTPruner
from pyvitfast.quantize import QuantConfig, convert, prepare
from pyvitfast.tokens import to_stvit
from tests.methods.test_stvit import shaken

TINY = {
    "embed_dim": 8,
    "depths": (1, 1, 6, 2),
    "num_heads": (1, 2, 4, 4),
    "num_classes": 5,
    "drop_path_rate": 0.0,
}


def tiny(seed: int = 0, stem: str = "patch", **semantic):
    torch.manual_seed(seed)
    config = STViTSwinConfig(WindowTokensConfig(**semantic), stem, **TINY)
    return shaken(config.build(), seed)


def images(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)).double()


def block() -> SemanticBlock:
    torch.manual_seed(0)
    return shaken(SemanticBlock(12, 3, qkv_bias=True, init_values=0.5))


class TestCounts:
    @pytest.mark.parametrize(("size", "params"), [("small", 49_625_518), ("base", 87_812_336)])
    def test_published_parameters(self, size, params):
        model = timm.create_model(f"stvit_r_swin_{size}")
        assert sum(p.numel() for p in model.parameters()) == params
        assert vf.summary(model).params == params

    @pytest.mark.parametrize(
        ("name", "gmacs"),
        [
            ("stvit_swin_tiny_4", 2.987),
            ("stvit_swin_tiny", 3.427),
            ("stvit_swin_tiny_16", 4.048),
            ("stvit_swin_small_4", 5.941),
            ("stvit_swin_small", 6.524),
            ("stvit_swin_small_16", 7.349),
            ("stvit_swin_base_4", 10.470),
            ("stvit_swin_base", 11.502),
            ("stvit_swin_base_16", 12.958),
            ("stvit_r_swin_small", 5.824),
            ("stvit_r_swin_base", 10.261),
        ],
    )
    def test_macs(self, name, gmacs):
        assert vf.summary(timm.create_model(name)).macs / 1e9 == pytest.approx(gmacs, rel=5e-3)

    @pytest.mark.parametrize(
        ("size", "base", "gmacs"), [("tiny", 1, 3.136), ("small", 8, 5.943), ("base", 8, 10.476)]
    )
    def test_macs_of_a_module_moved_forward(self, size, base, gmacs):
        model = timm.create_model(f"stvit_swin_{size}", base=base)
        assert vf.summary(model).macs / 1e9 == pytest.approx(gmacs, rel=5e-3)

    def test_macs_with_the_patch_stem(self):
        model = timm.create_model("stvit_swin_small", stem="patch")
        assert vf.summary(model).macs / 1e9 == pytest.approx(6.393, rel=5e-3)

    @pytest.mark.parametrize(
        ("size", "image", "gathered", "unfolded"),
        [
            ("small", (800, 1280), 130.9, 238.5),
            ("base", (800, 1280), 226.4, 417.4),
            ("small", (512, 512), 34.4, 62.4),
            ("base", (512, 512), 59.6, 109.3),
        ],
    )
    def test_macs_of_detection(self, size, image, gathered, unfolded):
        config = STViTSwinConfig.from_model(timm.create_model(f"stvit_r_swin_{size}"))
        assert config.macs(image) / 1e9 == pytest.approx(gathered, rel=5e-3)
        assert config.macs(image, unfolded=True) / 1e9 == pytest.approx(unfolded, rel=5e-3)

    def test_blocks_of_a_unit(self):
        """What six more blocks cost is the sum of the six figures."""
        unit = 0.354945 + 0.185655 + 0.128502 + 0.064088 + 0.064904 + 0.305871
        shape = {"embed_dim": 96, "num_heads": (3, 6, 12, 24)}
        one, two = (STViTSwinConfig(depths=(2, 2, depth, 2), **shape).macs() / 1e9 for depth in (6, 12))
        assert two - one == pytest.approx(unit, rel=1e-4)

    @pytest.mark.parametrize("recover", [True, False])
    @pytest.mark.parametrize("stem", ["conv", "patch"])
    @pytest.mark.parametrize("layer_scale", [None, 1e-5])
    @pytest.mark.parametrize("image", [(224, 224), (300, 500), (64, 96)])
    def test_parameters(self, recover, stem, layer_scale, image):
        semantic = WindowTokensConfig(recover=recover, layer_scale=layer_scale, global_centers=True)
        config = STViTSwinConfig(semantic, stem, **{**TINY, "img_size": image})
        model = config.build()
        assert config.params() == sum(p.numel() for p in model.parameters())
        assert STViTSwinConfig.from_model(model) == config
        assert STViTSwinConfig.from_dict(config.to_dict()) == config


class TestWindows:
    @pytest.mark.parametrize("shape", [(14, 14), (9, 16), (7, 3), (15, 22)])
    @pytest.mark.parametrize("mode", ["max", "avg"])
    def test_pool_sees_the_cells_of_the_image_only(self, shape, mode):
        x = torch.randn(2, *shape, 4).double()
        tokens = pool_windows(x, (7, 7), (3, 3), mode)
        pool = F.adaptive_max_pool2d if mode == "max" else F.adaptive_avg_pool2d
        for i in range(tokens.shape[1]):
            for j in range(tokens.shape[2]):
                part = x[:, 7 * i : 7 * i + 7, 7 * j : 7 * j + 7].permute(0, 3, 1, 2)
                want = pool(part, 3).flatten(2).transpose(1, 2)
                torch.testing.assert_close(tokens[:, i, j], want)

    @pytest.mark.parametrize("shape", [(14, 14), (9, 16), (6, 3)])
    def test_there_and_back(self, shape):
        x = torch.randn(2, *shape, 4)
        windows = to_windows(x, (7, 7))
        assert torch.equal(from_windows(windows, (7, 7))[:, : shape[0], : shape[1]], x)
        assert windows.sum().item() == pytest.approx(x.sum().item(), abs=1e-3)

    def test_centres_of_the_released_windows(self):
        """Digest section 10.5: strides and offsets of the detection code."""
        assert centred((14, 14), (7, 7)) == Reach((14, 14), (7, 7), (-3, -3))
        assert centred((21, 21), (7, 7)) == Reach((21, 21), (7, 7), (-7, -7))
        assert centred((27, 27), (3, 3)) == Reach((27, 27), (3, 3), (-12, -12))
        ten = tiny().layers[2]._ten((14, 14))
        assert ten == Reach((10, 10), (4, 4), (0, 0))

    def test_a_window_over_everything_is_global_attention(self):
        b, x = block(), torch.randn(2, 14, 14, 12).double()
        queries = torch.randn(2, 2, 2, 9, 12).double()
        reach = Reach((28, 28), (1, 1), (-7, -7))
        got = b.gather(queries, x, reach, shortcut=queries)
        flat = queries.flatten(1, 3)
        want = b.everywhere(flat, x.flatten(1, 2), shortcut=flat).view_as(queries)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("side", [21, 27])
    def test_released_windows_cover_a_map_of_224_pixels(self, side):
        """Windows of 21 and 27 see the whole map at 224, so masking must leave it whole."""
        b = block()
        step, cells, count = (7, 14, 9) if side == 21 else (3, 6, 49)
        x, queries = torch.randn(1, cells, cells, 12).double(), torch.randn(1, 2, 2, count, 12).double()
        got = b.gather(queries, x, centred((side, side), (step, step)), shortcut=queries)
        flat = queries.flatten(1, 3)
        want = b.everywhere(flat, x.flatten(1, 2), shortcut=flat).view_as(queries)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("shape", [(14, 21), (10, 16)])
    def test_gathered_windows_equal_cut_out_ones(self, shape):
        """Windows cut out of a padded map, padding masked, against windows read in place."""
        b, x = block(), torch.randn(2, *shape, 12).double()
        queries = pool_windows(x, (7, 7), (3, 3), "avg")
        got = b.gather(queries, x, centred((14, 14), (7, 7)), shortcut=queries)
        down, across = queries.shape[1:3]
        pad = (3, 4 + 7 * across - shape[1], 3, 4 + 7 * down - shape[0])
        there = F.pad(torch.ones(1, 1, *shape), pad).bool()[0, 0]
        padded = F.pad(b.norm1(x).permute(0, 3, 1, 2), pad).permute(0, 2, 3, 1)
        wq, wk, wv = b.attn.qkv.weight.chunk(3)
        bq, bk, bv = b.attn.qkv.bias.chunk(3)
        for i in range(down):
            for j in range(across):
                rows, columns = slice(7 * i, 7 * i + 14), slice(7 * j, 7 * j + 14)
                cells = padded[:, rows, columns].flatten(1, 2)
                q, k, v = (
                    F.linear(t, w, c).unflatten(2, (3, 4)).transpose(1, 2)
                    for t, w, c in ((b.norm1(queries[:, i, j]), wq, bq), (cells, wk, bk), (cells, wv, bv))
                )
                mask = there[rows, columns].flatten()
                mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(9, -1))
                hidden = queries[:, i, j] + b.ls1(b.attn.proj(mixed.transpose(1, 2).flatten(2)))
                want = hidden + b.ls2(b.mlp(b.norm2(hidden)))
                torch.testing.assert_close(got[:, i, j], want, rtol=0, atol=1e-10)


class TestStages:
    def test_recovery_adds_nothing_without_layer_scale(self):
        stage = tiny(layer_scale=0.1).layers[2]
        b = stage.blocks[5]
        nn.init.zeros_(b.ls1.gamma)
        nn.init.zeros_(b.ls2.gamma)
        for grid in ((14, 14), (30, 17)):
            x = torch.randn(1, *grid, 32).double()
            tokens = torch.randn(1, -(-grid[0] // 7), -(-grid[1] // 7), 9, 32).double()
            assert torch.equal(stage.recover(b, x, tokens), x)

    def test_layouts_agree_where_windows_see_everything(self):
        """At 224 the module's second block and the recovery of both layouts differ in the keys S1 only."""
        stage = tiny(layer_scale=0.5).layers[2]
        x = torch.randn(1, 14, 14, 32).double()
        tokens = pool_windows(x, (7, 7), (3, 3), "max")
        b = stage.blocks[5]
        whole = stage.recover(b, x, tokens)
        windows = b.gather(
            to_windows(x, (7, 7)),
            from_windows(tokens, (3, 3)),
            centred((27, 27), (3, 3)),
            shortcut=to_windows(x, (7, 7)),
        )
        torch.testing.assert_close(from_windows(windows, (7, 7)), whole, rtol=0, atol=1e-10)

    def test_ordinary_blocks_of_units_never_shift(self):
        model = timm.create_model("stvit_r_swin_small", embed_dim=8, num_heads=(1, 1, 2, 2), img_size=448)
        plain = [b for b in model.layers[2].blocks if isinstance(b, SwinTransformerBlock)]
        assert [tuple(b.shift_size) for b in plain] == [(0, 0)] * 3
        assert isinstance(model.layers[0], nn.Module)
        assert any(any(b.shift_size) for b in model.layers[0].blocks)

    @pytest.mark.parametrize("recover", [True, False])
    @pytest.mark.parametrize("layout", ["global", "windows", "auto"])
    @pytest.mark.parametrize("size", [(224, 224), (200, 328), (448, 256)])
    def test_images_of_any_size(self, recover, layout, size):
        model = tiny(recover=recover, layout=layout, global_centers=True, stem="conv")
        x = images(*size)[:1]
        maps = model.forward_intermediates(x, intermediates_only=True)
        grids = STViTSwinConfig.from_model(model).grids(size)
        if not recover:
            semantic = tuple(-(-n // 7) * 3 for n in grids[2])
            grids = [*grids[:2], semantic, semantic]
        assert [tuple(m.shape[2:]) for m in maps] == grids
        assert all(torch.isfinite(m).all() for m in maps)
        assert model(x).shape == (1, 5)

    def test_the_residual_of_the_first_block_is_left_out_in_the_classification_reading(self):
        stage, other = tiny(layer_scale=0.5).layers[2], tiny(layer_scale=0.5, compat="cls").layers[2]
        x = torch.randn(1, 14, 14, 32).double()
        first = [s.blocks[1] for s in (stage, other)]
        tokens = pool_windows(x, (7, 7), (3, 3), "max")
        reach = stage._ten((14, 14))
        kept = first[0].gather(tokens, x, reach, own=True, shortcut=tokens)
        left = first[1].gather(tokens, x, reach, own=True)
        assert (kept - left).abs().max() > 0.1
        assert stage(images(8, 8)[:, :1].new_zeros(1, 28, 28, 16)).shape == (1, 14, 14, 32)

    @pytest.mark.parametrize("recover", [True, False])
    def test_every_parameter_learns_and_checkpointing_changes_nothing(self, recover):
        model = tiny(recover=recover, layer_scale=0.5, global_centers=True).train()
        gradients = []
        for enabled in (False, True):
            model.set_grad_checkpointing(enabled)
            model.zero_grad()
            model(images(224, 224)).square().sum().backward()
            idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
            assert idle == []
            gradients.append([p.grad.clone() for p in model.parameters()])
        for plain, saved in zip(*gradients, strict=True):
            torch.testing.assert_close(saved, plain, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("layout", ["global", "windows"])
    def test_quantised_layers_are_called(self, layout):
        """Windows read thirds of a fused weight, which must not pass by its quantisation."""
        model = tiny(layout=layout, layer_scale=0.5).float()
        x = images(224, 224).float()
        plain = model(x)
        low = prepare(model, QuantConfig(weight_bits=2)).eval()
        expected = low(x)
        assert (expected - plain).abs().max() > 1e-3
        reads = [b.attn.qkv for b in low.layers[2].blocks if isinstance(b, SemanticBlock)]
        seen = []
        for layer in reads:
            layer.register_forward_hook(lambda layer, *_: seen.append(layer))
        torch.testing.assert_close(low(x), expected)
        assert {id(layer) for layer in seen} == {id(layer) for layer in reads}
        torch.testing.assert_close(convert(low)(x), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("recover", [True, False])
    def test_saved_and_loaded(self, recover, tmp_path):
        model = tiny(recover=recover, global_centers=True, stem="conv")
        vf.save(model, tmp_path / "m.safetensors")
        again = vf.load(tmp_path / "m.safetensors")
        assert torch.equal(again(images(96, 128)), model(images(96, 128)))

    def test_swin_weights_load_but_for_the_bias_of_the_new_blocks(self):
        torch.manual_seed(0)
        plain = SwinTransformer(**TINY)
        model = STViTSwin(WindowTokensConfig(layer_scale=None), "patch", **TINY)
        missing, surplus = model.load_state_dict(plain.state_dict(), strict=False)
        assert missing == []
        assert {n.rpartition(".")[2] for n in surplus} == {"relative_position_bias_table"}
        assert len(surplus) == 5

    @pytest.mark.parametrize(
        ("options", "arguments", "reason"),
        [
            ({}, {"depths": (1, 1, 4, 1)}, "units of 6"),
            ({"recover": False, "base": 5}, {}, "needs 7 blocks"),
            ({}, {"depths": (1, 1)}, "4 stages"),
        ],
    )
    def test_bad_settings(self, options, arguments, reason):
        given = {**TINY, **arguments}
        given["num_heads"] = given["num_heads"][: len(given["depths"])]
        with pytest.raises(ValueError, match=reason):
            STViTSwinConfig(WindowTokensConfig(**options), **given)

    def test_what_does_not_compose_says_why(self):
        with pytest.raises(NotImplementedError, match="Prune first"):
            NViTPruner(tiny(), target=0.5, budget="macs")
        with pytest.raises(TypeError, match="VisionTransformer"):
            to_stvit(tiny())
        with pytest.raises((TypeError, NotImplementedError), match="STViTSwin"):
            vf.grow.grow(tiny(), SwinTransformer(**TINY), method="fpi")


def test_a_detector_learns_to_find_boxes():
    """torchvision's RetinaNet on the feature maps: one step on synthetic boxes."""
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import FeaturePyramidNetwork

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = timm.create_model(
                "stvit_r_swin_tiny",
                features_only=True,
                out_indices=(1, 2, 3),
                **{k: v for k, v in TINY.items() if k != "num_classes"},
            )
            self.out_channels = 16
            self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), 16)

        def forward(self, x):
            return self.fpn({str(i): m for i, m in enumerate(self.body(x))})

    torch.manual_seed(0)
    anchors = AnchorGenerator(((16,), (32,), (64,)), ((1.0,),) * 3)
    model = RetinaNet(Backbone(), 2, anchor_generator=anchors, min_size=160, max_size=224).train()
    picture = torch.zeros(3, 160, 224)
    picture[:, 40:80, 60:120] = 1
    target = [{"boxes": torch.tensor([[60.0, 40.0, 120.0, 80.0]]), "labels": torch.tensor([1])}]
    losses = model([picture], target)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.backbone.body.parameters())
    with torch.no_grad():
        assert set(model.eval()([picture])[0]) == {"boxes", "scores", "labels"}
