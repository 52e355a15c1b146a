"""CrossViT against timm's class with the same weights, and its counts against the published table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import timm.optim
import torch
import torch.nn.functional as F
from timm.models.crossvit import CrossVit, MultiScaleBlock
from torch import nn

import pyvitfast as vf
from pyvitfast.models import CrossViT, CrossViTConfig, LinearMultiScaleBlock, crossvit_filter_fn
from pyvitfast.prune import LatencyTable, NViTPruner, sparsify

# Parameters, and GMAC as published (without norms) to four digits.
TABLE = {
    "tiny_240": (7_014_800, 1.5627),
    "small_240": (26_856_272, 5.6156),
    "base_240": (105_025_232, 21.1915),
    "9_240": (8_553_296, 1.8408),
    "15_240": (27_528_464, 5.7906),
    "18_240": (43_271_408, 9.0312),
    "9_dagger_240": (8_776_592, 1.9790),
    "15_dagger_240": (28_209_008, 6.1123),
    "18_dagger_240": (44_266_976, 9.4732),
    "15_dagger_408": (28_500_080, 21.3986),
    "18_dagger_408": (44_606_560, 32.4091),
    "18_dagger_480": (44_887_904, 56.6025),
}
# MMAC of all six cross-attentions: as timm computes them, and folded.
FOLDED = {
    "15_240": (265.0, 7.7),
    "18_240": (360.5, 10.5),
    "base_240": (1058, 30.8),
    "15_dagger_408": (770, 18.2),
    "18_dagger_408": (1048, 24.8),
}
TIMM = [name for name in TABLE if name != "18_dagger_480"]  # timm has no such name; its class can be built so
SMALL = {
    "img_size": 30,
    "img_scale": (1.0, 28 / 30),
    "patch_size": (6, 7),
    "num_classes": 5,
    "embed_dim": (16, 24),
    "depth": ((1, 2, 0), (1, 2, 0)),
    "num_heads": (2, 3),
    "mlp_ratio": (2.0, 2.0, 1.0),
}


def shaken(model: nn.Module, noise: float = 0.02) -> nn.Module:
    """No bias left at 0 and no norm at 1: a forgotten one would not show."""
    for parameter in model.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    return model.eval()


def small(noise: float = 0.2, **changes: object) -> CrossVit:
    """timm's own class, small and in double precision."""
    return shaken(CrossVit(**{**SMALL, **changes}), noise).double()


def twin(model: CrossVit, **changes: object) -> CrossViT:
    """Ours with the weights of ``model``."""
    config = replace(CrossViTConfig.from_model(model), timm_class=False, linear=True, **changes)
    ours = config.build().to(next(model.parameters()).dtype)
    ours.load_state_dict(model.state_dict(), strict=True)
    return ours.train(model.training)


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


def shapes(model: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, tensor.shape) for name, tensor in model.state_dict().items()]


def timm_480() -> CrossVit:
    # 480 / 504 is no exact binary fraction, and timm cuts the product off.
    return CrossVit(
        img_size=504,
        img_scale=(1.0, 480.5 / 504),
        patch_size=(12, 16),
        embed_dim=(224, 448),
        depth=((1, 6, 0),) * 3,
        num_heads=(7, 7),
        mlp_ratio=(3.0, 3.0, 1.0),
        multi_conv=True,
    )


class TestEveryVariant:
    @pytest.mark.parametrize("name", TABLE)
    def test_counts_are_the_published(self, name):
        model = on_meta(f"linear_crossvit_{name}")
        config = CrossViTConfig.from_model(model)
        params, gmac = TABLE[name]
        assert sum(p.numel() for p in model.parameters()) == config.params() == params
        assert round(config.macs(folded=False) / 1e9, 4) == gmac
        assert vf.summary(model).macs == config.macs() == config.macs(folded=True)

    @pytest.mark.parametrize("name", FOLDED)
    def test_folding_saves_what_the_algebra_says(self, name):
        config = CrossViTConfig.from_model(on_meta(f"linear_crossvit_{name}"))
        whole, folded = FOLDED[name]
        # Both figures are printed to four digits or to a tenth of a MMAC.
        saved = (config.macs(folded=False) - config.macs(folded=True)) / 1e6
        assert saved == pytest.approx(whole - folded, abs=0.6)

    @pytest.mark.parametrize("name", TIMM)
    def test_keys_shapes_and_facts_are_timms(self, name):
        theirs, ours = on_meta(f"crossvit_{name}"), on_meta(f"linear_crossvit_{name}")
        assert shapes(ours) == shapes(theirs)
        assert ours.feature_info == theirs.feature_info
        assert ours.img_size_scaled == theirs.img_size_scaled
        assert ours.no_weight_decay() == theirs.no_weight_decay()
        assert ours.group_matcher() == theirs.group_matcher()
        assert [type(b) for b in ours.blocks] == [LinearMultiScaleBlock] * 3
        mine, their = ours.pretrained_cfg, theirs.pretrained_cfg
        assert mine["hf_hub_id"] == f"timm/crossvit_{name}.in1k"
        assert {**mine, "architecture": ""} == {**their, "architecture": ""}

    @pytest.mark.parametrize("name", TABLE)
    def test_logits_and_gradients_are_timms(self, name):
        theirs = timm_480() if name == "18_dagger_480" else timm.create_model(f"crossvit_{name}")
        shaken(theirs)
        ours = timm.create_model(f"linear_crossvit_{name}").eval()
        ours.load_state_dict(theirs.state_dict(), strict=True)
        x = torch.randn(1, 3, *theirs.img_size)
        weights = torch.randn(1, 1000)
        expected, found = theirs(x), ours(x)
        # float32 rounds at 6e-8; 18 blocks of sums leave about 1e-6.
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        (expected * weights).sum().backward()
        (found * weights).sum().backward()
        reference = dict(theirs.named_parameters())
        for key, parameter in ours.named_parameters():
            right = reference[key].grad
            if key.endswith("attn.wk.bias"):
                # Zero in exact arithmetic: a key bias moves all scores alike. timm's is rounding noise.
                scale = reference[key.replace("wk", "wq")].grad.norm()
                assert parameter.grad.norm() <= 1e-4 * scale, key
            else:
                assert (parameter.grad - right).norm() <= 1e-4 * right.norm(), key
        theirs.load_state_dict(ours.state_dict(), strict=True)


class TestSmallInDouble:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"depth": ((1, 2, 1), (2, 3, 1))},
            {"depth": ((1, 1, 2), (1, 2, 3))},
            {"qkv_bias": False},
            {"crop_scale": True},
            {"global_pool": "avg"},
            {"num_classes": 0},
            {"img_size": 32, "img_scale": (0.75, 1.0), "patch_size": (4, 8)},
            {"img_size": (24, 48), "img_scale": (1.0, 1.0), "patch_size": (6, 8)},
            {"img_size": 96, "img_scale": (1.0, 1.0), "patch_size": (12, 16), "multi_conv": True},
            {"mlp_ratio": (1.3, 2.7, 1.0), "in_chans": 2, "embed_dim": (24, 24), "num_heads": (4, 2)},
        ],
        ids=str,
    )
    def test_outputs_and_gradients(self, changes):
        theirs = small(**changes)
        ours = twin(theirs)
        size = theirs.img_size
        x = torch.randn(3, theirs.in_chans, *size, dtype=torch.float64)
        expected, found = theirs(x), ours(x)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        with torch.no_grad():  # the class tokens are stored in place
            torch.testing.assert_close(ours(x), expected, rtol=1e-12, atol=1e-12)
        for out in (expected, found):
            out.square().sum().backward()
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
            if b.grad is None:
                assert a.grad is None, name
            else:
                # Gradients of sums over tokens are of the order of 1 to 100 here.
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-12, msg=name)
        assert shapes(ours) == shapes(theirs)
        assert CrossViTConfig.from_model(theirs).params() == sum(p.numel() for p in theirs.parameters())

    def test_training_with_every_dropout_is_timms_with_the_same_seed(self):
        rates = {"drop_rate": 0.1, "pos_drop_rate": 0.1, "proj_drop_rate": 0.2, "drop_path_rate": 0.3}
        theirs = small(**rates, depth=((1, 2, 2), (1, 2, 1))).train()
        ours = twin(theirs)
        x = torch.randn(4, 3, 30, 30, dtype=torch.float64)
        for model in (theirs, ours):
            torch.manual_seed(3)
            model.logits = model(x)
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(ours.logits, ours.eval()(x))
        drops = [
            [getattr(m, "drop_prob", 0.0) for name, m in model.named_modules() if "drop_path" in name]
            for model in (theirs, ours)
        ]
        assert drops[0] == pytest.approx(drops[1])

    def test_features(self):
        theirs = small()
        ours = twin(theirs)
        x = torch.randn(2, 3, 30, 30, dtype=torch.float64)
        for arguments in ({}, {"indices": [0, 3], "norm": True}, {"indices": 1, "stop_early": True}):
            final, found = ours.forward_intermediates(x, **arguments)
            last, expected = theirs.forward_intermediates(x, **arguments)
            for a, b in zip([*final, *found], [*last, *expected], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
            with torch.no_grad():
                for a, b in zip(ours.forward_intermediates(x, **arguments)[1], expected, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        head = theirs.forward_head(theirs.forward_features(x), pre_logits=True)
        torch.testing.assert_close(ours.forward_head(ours.forward_features(x), pre_logits=True), head)

    def test_gradient_checkpointing_changes_memory_only(self):
        ours = twin(small(drop_path_rate=0.2).train())
        x = torch.randn(4, 3, 30, 30, dtype=torch.float64)
        found = []
        for enable in (False, True):
            ours.set_grad_checkpointing(enable)
            ours.zero_grad()
            torch.manual_seed(1)
            ours(x).square().sum().backward()
            found.append([p.grad.clone() for p in ours.parameters()])
        assert all(map(torch.equal, *found))


class TestTimmConventions:
    def test_every_name_is_registered_and_nothing_else(self):
        names = {f"linear_crossvit_{name}" for name in TABLE} | {"linear_crossvit_micro_8"}
        assert set(timm.list_models("linear_crossvit_*")) == names
        weights = {name.split(".")[0] for name in timm.list_models("linear_crossvit_*", pretrained=True)}
        assert weights == {f"linear_crossvit_{name}" for name in TIMM}

    def test_features_only(self):
        wide = {"pretrained": False, "features_only": True, "depth": ((1, 1, 0), (1, 1, 0))}
        theirs = timm.create_model("crossvit_9_240", **wide)
        ours = timm.create_model("linear_crossvit_9_240", **wide)
        assert ours.feature_info.channels() == theirs.feature_info.channels() == [128, 256]
        assert ours.feature_info.reduction() == theirs.feature_info.reduction()
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(1, 3, 240, 240)
        for a, b in zip(ours.eval()(x), theirs.eval()(x), strict=True):
            assert a.shape[1:] in [(128, 20, 20), (256, 14, 14)]
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # maps of order 1 in float32

    def test_classifier(self):
        model = timm.create_model("linear_crossvit_micro_8", num_classes=7)
        x = torch.randn(2, 1, 8, 8)
        assert model(x).shape == (2, 7)
        assert model.get_classifier() is model.head
        model.reset_classifier(3)
        assert model(x).shape == (2, 3)
        assert CrossViTConfig.from_model(model).num_classes == 3
        model.reset_classifier(0)
        assert model(x).shape == (2, 96)

    def test_optimizer_exempts_tokens_and_positions(self):
        model = timm.create_model("linear_crossvit_micro_8")
        groups = timm.optim.create_optimizer_v2(
            model, "adamw", weight_decay=0.05, layer_decay=0.9
        ).param_groups
        exempt = {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
        assert {id(model.pos_embed_0), id(model.pos_embed_1), id(model.cls_token_0)} <= exempt
        assert id(model.head[0].weight) not in exempt

    def test_untrained_names_have_no_weights(self):
        with pytest.raises(RuntimeError, match="No pretrained weights exist for linear_crossvit_micro_8"):
            timm.create_model("linear_crossvit_micro_8", pretrained=True)

    @pytest.mark.parametrize("ibm", [False, True])
    def test_pretrained_weights_come_in_timms_way(self, ibm, tmp_path):
        short = {"depth": ((1, 1, 0),), "num_classes": 1000}
        theirs = shaken(timm.create_model("crossvit_9_240", **short))
        weights = theirs.state_dict()
        if ibm:
            weights = {
                k.replace("pos_embed_", "pos_embed.").replace("cls_token_", "cls_token."): v
                for k, v in weights.items()
            }
            weights = {"model": weights}
        torch.save(weights, tmp_path / "w.pth")
        overlay = {"file": str(tmp_path / "w.pth")}
        ours = timm.create_model("linear_crossvit_9_240", True, pretrained_cfg_overlay=overlay, **short)
        assert all(torch.equal(v, ours.state_dict()[k]) for k, v in theirs.state_dict().items())

    def test_weights_of_another_image_size(self):
        with torch.no_grad():
            low = shaken(timm.create_model("crossvit_9_240", depth=((1, 1, 0),)))
            high = timm.create_model("linear_crossvit_9_240", depth=((1, 1, 0),), img_size=408)
        assert high.img_size_scaled == [(408, 408), (384, 384)]
        kept = {k: v.clone() for k, v in low.state_dict().items()}
        high.load_state_dict(crossvit_filter_fn(low.state_dict(), high), strict=True)
        assert all(torch.equal(v, kept[k]) for k, v in low.state_dict().items())
        for i, (old, new) in enumerate([(20, 34), (14, 24)]):
            before, after = getattr(low, f"pos_embed_{i}"), getattr(high, f"pos_embed_{i}")
            assert torch.equal(before[:, 0], after[:, 0])
            grid = before[:, 1:].transpose(1, 2).unflatten(2, (old, old))
            right = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True)
            # Both in float32 on values of 0.1.
            torch.testing.assert_close(after[:, 1:], right.flatten(2).transpose(1, 2), rtol=0, atol=1e-6)


class TestConfig:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"fusion": "concat"}, "`fusion` must be one of cross_attention, all_attention, class_token"),
            ({"embed_dim": (15, 24)}, r"`embed_dim` must be multiples of the heads, here \(2, 3\)"),
            ({"embed_dim": (16, 24, 32)}, "`embed_dim` must be two positive numbers"),
            ({"patch_size": (6, 0)}, "`patch_size` must be two positive numbers"),
            ({"multi_conv": True}, "`patch_size` must be 12 or 16 with `multi_conv`"),
            ({"depth": ()}, "`depth` must be an"),
            ({"depth": ((1, 2),)}, "`depth` must be an"),
            ({"depth": ((0, 0, 0),)}, "`depth` must be at least one block in each encoder"),
            ({"depth": ((1, 2, -1),)}, "`depth` must be an"),
            ({"mlp_ratio": (2.0,)}, "`mlp_ratio` must be two or three numbers"),
            (
                {"mlp_ratio": (0.01, 2.0)},
                "`mlp_ratio` must be two or three numbers that give each branch an MLP",
            ),
            ({"drop_path_rate": 1.0}, "`drop_path_rate` must be at least 0 and below 1"),
            ({"global_pool": "max"}, "`global_pool` must be token or avg"),
            ({"in_chans": 0}, "`in_chans` must be at least 1"),
            ({"norm_eps": 0.0}, "`norm_eps` must be positive"),
            ({"num_classes": -1}, "`num_classes` must be at least 0"),
            # What timm's class would stumble over later.
            (
                {"timm_class": True, "depth": ((3, 2, 0),)},
                "1 <= N <= M with `timm_class`; our class takes it",
            ),
            ({"timm_class": True, "depth": ((0, 2, 0),)}, "1 <= N <= M"),
            ({"timm_class": True, "depth": ((1, 0, 0),)}, "1 <= N <= M"),
            (
                {"timm_class": True, "img_size": 224},
                "multiple of its patch with `timm_class`; our class takes it",
            ),
            ({"timm_class": True, "fusion": "none"}, "cross_attention with `timm_class`"),
        ],
    )
    def test_refusals(self, changes, message):
        with pytest.raises(ValueError, match=message):
            CrossViTConfig(**{**SMALL, **changes})

    @pytest.mark.parametrize("name", ["15_240", "18_dagger_408"])
    def test_round_trip_through_json(self, name):
        for model in (on_meta(f"crossvit_{name}"), on_meta(f"linear_crossvit_{name}")):
            config = CrossViTConfig.from_model(model)
            assert CrossViTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config

    def test_other_models_are_refused(self):
        with pytest.raises(TypeError, match="must be timm's CrossVit or ours, got torch"):
            CrossViTConfig.from_model(nn.Linear(2, 2))
        for change, message in (
            (lambda m: setattr(m.blocks[0].blocks[0][0], "attn", nn.Identity()), "blocks.0.blocks.0.0"),
            (lambda m: setattr(m.blocks[1].fusion[0].norm1, "eps", 1e-5), "blocks.1.fusion.0.norm1"),
            (lambda m: m.add_module("extra", nn.Linear(2, 2)), "added modules"),
            (lambda m: setattr(m.blocks[1].fusion[0].attn, "scale", 0.3), "blocks.1.fusion.0.attn.scale"),
            (
                lambda m: setattr(m.blocks[1].blocks[0][0].attn, "scale", 0.3),
                "blocks.1.blocks.0.0.attn.scale",
            ),
            (
                lambda m: setattr(m.blocks[1].projs[0], "1", nn.Tanh()),
                "blocks.1.projs.0.1: must be a module of",
            ),
            (lambda m: setattr(m.blocks[0].projs[0][1], "approximate", "tanh"), "approximate: must be none"),
            (lambda m: setattr(m.patch_embed, "0", nn.Identity()), "patch_embed.0"),
            (lambda m: setattr(m.blocks[0], "__class__", LinearMultiScaleBlock), "all of one class"),
        ):
            model = small()
            change(model)
            with pytest.raises(NotImplementedError, match=message):
                CrossViTConfig.from_model(model)

    @pytest.mark.parametrize(
        ("img_size", "sizes"),
        [(224, (228, 208)), (384, (384, 352)), (480, (480, 448)), (256, (252, 240)), ((240, 408), None)],
    )
    def test_sides_are_rounded_to_whole_patches(self, img_size, sizes):
        model = timm.create_model("linear_crossvit_9_240", img_size=img_size, depth=((1, 1, 0),)).eval()
        if sizes is None:
            assert model.img_size_scaled == [(240, 408), (224, 384)]
        else:
            assert model.img_size_scaled == [(side, side) for side in sizes]
        image = (img_size, img_size) if isinstance(img_size, int) else img_size
        assert model(torch.randn(1, 3, *image)).isfinite().all()
        assert CrossViTConfig.from_model(model).img_size == image

    @pytest.mark.parametrize(
        "depth", [((3, 1, 0), (1, 2, 0)), ((0, 2, 0),) * 2, ((2, 0, 1),), ((1, 2, 0), (0, 1, 2))]
    )
    def test_depths_that_timm_cannot_build(self, depth):
        config = CrossViTConfig(**{**SMALL, "depth": depth, "drop_path_rate": 0.2})
        model = shaken(config.build(), 0.2).double()
        assert [[len(b) for b in e.blocks] for e in model.blocks] == [list(e[:2]) for e in depth]
        assert CrossViTConfig.from_model(model) == config
        x = torch.randn(2, 3, 30, 30, dtype=torch.float64)
        kept = model(x)
        with torch.no_grad():
            torch.testing.assert_close(model(x), kept, rtol=1e-12, atol=1e-12)
        # The same modules run by timm's forward.
        vf.models.accelerate(model, enable=False)
        torch.testing.assert_close(model(x), kept, rtol=1e-12, atol=1e-12)
        model.train()(x).sum().backward()
        assert all(p.grad is not None for p in model.parameters())

    def test_an_empty_branch_keeps_its_place(self):
        # Without blocks of its own the small branch is embedding and exchanges only: written out.
        model = shaken(CrossViTConfig(**{**SMALL, "depth": ((0, 1, 0),)}).build(), 0.2).double()
        x = torch.randn(2, 3, 30, 30, dtype=torch.float64)
        a, b = model._embed(x)
        encoder = model.blocks[0]
        b = encoder.blocks[1](b)
        new_a = encoder.revert_projs[0](
            encoder.fusion[0](torch.cat((encoder.projs[0](a[:, :1]), b[:, 1:]), 1))
        )
        new_b = encoder.revert_projs[1](
            encoder.fusion[1](torch.cat((encoder.projs[1](b[:, :1]), a[:, 1:]), 1))
        )
        heads = [head(norm(cls[:, 0])) for head, norm, cls in zip(model.head, model.norm, (new_a, new_b))]
        torch.testing.assert_close(model(x), (heads[0] + heads[1]) / 2, rtol=1e-12, atol=1e-12)


# CrossViT-S: millions of parameters and GMAC, as printed.
PRINTED = {
    "none": (23.7, 5.3),
    "class_token": (24.2, 5.4),
    "pairwise": (24.2, 5.5),
    "all_attention": (None, 7.6),  # the printed 27.7 M is not reached; see the page
}


class TestSchemes:
    @pytest.mark.parametrize("fusion", PRINTED)
    def test_counts_against_the_ablation(self, fusion):
        with torch.device("meta"):
            model = timm.create_model("linear_crossvit_small_240", fusion=fusion)
        config = CrossViTConfig.from_model(model)
        millions, gmac = PRINTED[fusion]
        assert sum(p.numel() for p in model.parameters()) == config.params()
        assert round(config.macs() / 1e9, 1) == gmac
        if millions is not None:
            assert round(config.params() / 1e6, 1) == millions
        assert not config.linear

    @pytest.fixture
    def made(self, request):
        config = CrossViTConfig(**{**SMALL, "fusion": request.param})
        model = shaken(config.build(), 0.2).double()
        tokens = [
            torch.randn(2, n, c, dtype=torch.float64) for n, c in zip(config.tokens(), config.embed_dim)
        ]
        return model.blocks[0], tokens, [b(t) for b, t in zip(model.blocks[0].blocks, tokens)]

    @pytest.mark.parametrize("made", ["none"], indirect=True)
    def test_none(self, made):
        block, tokens, own = made
        assert all(map(torch.equal, block(tokens), own))

    @pytest.mark.parametrize("made", ["class_token"], indirect=True)
    def test_class_token(self, made):
        block, tokens, (a, b) = made
        new_a, new_b = block(tokens)
        total = block.projs[0](a[:, 0]) + b[:, 0]
        torch.testing.assert_close(new_a[:, 0], block.revert_projs[0](total), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(new_b[:, 0], total, rtol=1e-12, atol=1e-12)
        assert torch.equal(new_a[:, 1:], a[:, 1:])
        assert torch.equal(new_b[:, 1:], b[:, 1:])

    @pytest.mark.parametrize("made", ["pairwise"], indirect=True)
    def test_pairwise(self, made):
        block, tokens, (a, b) = made
        new_a, new_b = block(tokens)
        f_a = block.projs[0](a)
        down = F.interpolate(f_a[:, 1:].transpose(1, 2).reshape(2, 24, 5, 5), size=(4, 4), mode="bilinear")
        expected = b[:, 1:] + down.flatten(2).transpose(1, 2)
        torch.testing.assert_close(new_b[:, 1:], expected, rtol=1e-12, atol=1e-12)
        up = F.interpolate(b[:, 1:].transpose(1, 2).reshape(2, 24, 4, 4), size=(5, 5), mode="bilinear")
        expected = block.revert_projs[0](f_a[:, 1:] + up.flatten(2).transpose(1, 2))
        torch.testing.assert_close(new_a[:, 1:], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(new_b[:, 0], f_a[:, 0] + b[:, 0], rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("made", ["all_attention"], indirect=True)
    def test_all_attention(self, made):
        block, tokens, (a, b) = made
        new_a, new_b = block(tokens)
        y = torch.cat((block.projs[0](a), block.projs[1](b)), dim=1)
        q, k, v = block.attn.qkv(block.norm1(y)).chunk(3, dim=-1)
        heads = []
        for j in range(3):
            part = slice(8 * j, 8 * (j + 1))
            scores = q[..., part] @ k[..., part].transpose(1, 2) / 8**0.5
            heads.append(scores.softmax(-1) @ v[..., part])
        o = y + block.attn.proj(torch.cat(heads, dim=-1))
        torch.testing.assert_close(new_a, block.revert_projs[0](o[:, :26]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(new_b, block.revert_projs[1](o[:, 26:]), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("fusion", PRINTED)
    def test_train_compile_and_round_trip(self, fusion, tmp_path):
        model = CrossViTConfig(**{**SMALL, "fusion": fusion, "drop_path_rate": 0.1}).build()
        x = torch.randn(2, 3, 30, 30)
        model(x).sum().backward()
        # The last encoder's exchange of patches reaches no classifier, all parameters still get a gradient.
        assert all(p.grad is not None for p in model.parameters())
        model.eval()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        vf.save(model, tmp_path / "m.safetensors")
        again = vf.load(tmp_path / "m.safetensors")
        assert torch.equal(again(x), model(x))
        with pytest.raises(TypeError, match="other fusion schemes"):
            vf.models.accelerate(model)


class TestFilesAndSummary:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: CrossVit(**SMALL),
            lambda: CrossVit(**{**SMALL, "depth": ((1, 2, 2),), "drop_path_rate": 0.2, "qkv_bias": False}),
            lambda: CrossViTConfig(**SMALL).build(),
            lambda: (
                CrossViTConfig(**{**SMALL, "depth": ((0, 2, 0), (3, 1, 0)), "img_size": 33}).build().double()
            ),
            lambda: timm.create_model("linear_crossvit_micro_8", num_classes=3).train(),
            lambda: CrossVit(
                **{**SMALL, "img_size": (24, 48), "img_scale": (1.0, 1.0), "patch_size": (6, 8)}
            ),
        ],
    )
    @pytest.mark.parametrize("linear", [False, True])
    def test_round_trip(self, make, linear, tmp_path):
        model = make()
        vf.models.accelerate(model, linear)
        vf.save(model, tmp_path / "m.safetensors")
        again = vf.load(tmp_path / "m.safetensors")
        assert type(again) is type(model)
        assert {type(b) for b in again.blocks} == {LinearMultiScaleBlock if linear else MultiScaleBlock}
        assert again.training == model.training
        assert CrossViTConfig.from_model(again) == CrossViTConfig.from_model(model)
        x = torch.randn(2, model.in_chans, *model.img_size, dtype=next(model.parameters()).dtype)
        assert torch.equal(again.eval()(x), model.eval()(x))
        drops = [[getattr(m, "drop_prob", 0) for m in part.modules()] for part in (model, again)]
        assert drops[0] == pytest.approx(drops[1])

    def test_summary(self):
        model = timm.create_model("crossvit_9_240")
        before = vf.summary(model)
        assert before.embed_dims == (128, 256)
        assert [b.heads * b.v_dim for b in before.blocks] == [128, 256, 256, 256] * 3
        assert {b.mlp for b in before.blocks} == {384, 768}
        assert before.params == 8_553_296
        # What torch counts as it runs, with the norms of no cost.
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(torch.randn(1, 3, 240, 240))
        assert counter.get_total_flops() == 2 * before.macs
        vf.models.accelerate(model)
        assert vf.summary(model).macs == CrossViTConfig.from_model(model).macs(folded=True) < before.macs
        assert "128, 256" in str(before)

    def test_pruning_says_that_it_is_not_there_and_sparsity_works(self):
        for model in (CrossVit(**SMALL), CrossViTConfig(**SMALL).build()):
            with pytest.raises(NotImplementedError, match="CrossViT is not pruned yet"):
                NViTPruner(model)
            with pytest.raises(NotImplementedError, match="CrossViT is not pruned yet"):
                LatencyTable.from_macs(model)
        model = timm.create_model("linear_crossvit_micro_8")
        _, report = sparsify(model)
        assert "blocks.0.fusion.0.attn.wk" in report.matched


def test_page_states_the_counts():
    page = (Path(__file__).parents[2] / "docs" / "methods" / "crossvit.md").read_text()
    for name, (params, gmac) in TABLE.items():
        folded = CrossViTConfig.from_model(on_meta(f"linear_crossvit_{name}")).macs() / 1e9
        assert f"| `linear_crossvit_{name}` | {params:,} | {gmac:.4f} | {folded:.4f} |" in page
